"""`tritium generate --prompts`: an answer a line, those of `generate` and `chat`; what is wrong, by its line."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tritium.runtime import cli
from tritium.runtime.engine.engine import Engine
from tritium.runtime.engine.prompts import read_prompts, submit, write
from tritium.runtime.errors import TritiumError
from tritium.runtime.text import TextGenerator
from tritium.runtime.tokenizer import Tokenizer

from tests.runtime.test_triton_path import small
from tests.tiny import byte_level

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    words = Tokenizer(byte_level(), chat_template=TEMPLATE)
    return TextGenerator(small(vocab_size=340).use_backend("torch").to("cpu"), words)


def file_of(folder: Path, *lines: Any) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def answers(generator: TextGenerator, path: Path, *how: Any, **usual: Any) -> list[dict[str, Any]]:
    out, engine = io.StringIO(), Engine(generator.model, generator.tokenizer, tokens=1000)
    took = write(engine, submit(engine, generator, read_prompts(path), usual, *how), out)
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert took.startswith(f"{len(found)} prompts, {sum(one['tokens'] for one in found)} new tokens, ")
    return found


def test_the_texts_of_generate_and_chat(generator: TextGenerator, tmp_path: Path) -> None:
    """In the order of the lines, options of a line before the usual ones, the usual seed counted up by the line."""
    talk = [{"role": "user", "content": "hello"}]
    path = file_of(
        tmp_path,
        {"prompt": "The quick", "max_new_tokens": 20, "seed": 9},
        "",
        {"messages": talk},
        {"prompt": "The END", "temperature": 0, "top_k": 3, "top_p": 0.5, "max_new_tokens": 3},
        {"prompt": "jaź"},
    )
    found = answers(generator, path, max_new_tokens=6, temperature=0.8, seed=3)
    expected = [
        generator.generate("The quick", max_new_tokens=20, temperature=0.8, seed=9),
        generator.chat(talk, max_new_tokens=6, temperature=0.8, seed=4),
        generator.generate("The END", max_new_tokens=3, temperature=0),
        generator.generate("jaź", max_new_tokens=6, temperature=0.8, seed=6),
    ]
    assert [one["text"] for one in found] == expected
    assert [one["index"] for one in found] == [0, 1, 2, 3]
    assert [one["tokens"] for one in found] == [20, 6, 3, 6]
    assert {one["reason"] for one in found} == {"length"}


def test_a_stop_string_ends_an_answer(generator: TextGenerator, tmp_path: Path) -> None:
    (whole,) = answers(generator, file_of(tmp_path, {"prompt": "The"}), max_new_tokens=30, temperature=0)
    stop = whole["text"][10:12]
    (cut,) = answers(generator, file_of(tmp_path, {"prompt": "The"}), [stop], max_new_tokens=30, temperature=0)
    assert cut["text"] == whole["text"].partition(stop)[0]
    assert cut["reason"] == "stop"
    assert cut["tokens"] < whole["tokens"]
    assert cut["text"] == generator.generate("The", max_new_tokens=30, temperature=0, stop=[stop])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON; a line is such as"),
        ("[1]", "line 2: must be an object such as .*, got list"),
        ({"prompt": "a", "top": 1}, "line 2: unknown key 'top'; "),
        ({"seed": 1}, "line 2: must have either prompt or messages"),
        ({"prompt": "a", "messages": []}, "line 2: must have either prompt or messages"),
        ({"prompt": 3}, "line 2: prompt must be a text, got 3"),
        ({"messages": []}, "line 2: messages must be a list of objects"),
        ({"messages": ["a"]}, "line 2: messages must be a list of objects"),
        ({"prompt": "a", "top_p": 2}, "line 2: top_p: must be above 0 and at most 1, got 2"),
        ({"prompt": "a", "max_new_tokens": "3"}, "line 2: max_new_tokens: must be a whole number, got '3'"),
        ({"prompt": ""}, "line 2: the prompt is empty"),
        ({"prompt": "a", "max_new_tokens": 600}, "line 2: the prompt has 1 tokens, and 600 more would exceed"),
    ],
)
def test_a_bad_line_is_named(generator: TextGenerator, tmp_path: Path, line: Any, message: str) -> None:
    """Before anything runs."""
    path, engine = file_of(tmp_path, {"prompt": "a"}, line), Engine(generator.model, generator.tokenizer, tokens=1000)
    with pytest.raises(TritiumError, match=f"prompts.jsonl: {message}") as caught:
        submit(engine, generator, read_prompts(path), {})
    assert "\n" not in str(caught.value)


def test_a_file_without_prompts(tmp_path: Path) -> None:
    with pytest.raises(TritiumError, match="holds no prompts"):
        read_prompts(file_of(tmp_path, "", " "))
    with pytest.raises(TritiumError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the bundled model; into a file, or the output; flags that do not go together are named."""
    path, out = file_of(tmp_path, {"prompt": "ROMEO:"}, {"prompt": "JULIET:"}), tmp_path / "out.jsonl"
    asked = ["generate", "--backend", "torch", "--max-new-tokens", "3", "--seed", "1"]
    assert cli.main([*asked, "--prompts", str(path), "--stats"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["tokens"] for line in shown.out.splitlines()] == [3, 3]
    assert "2 prompts, 6 new tokens, " in shown.err
    assert cli.main([*asked, "--prompts", str(path), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == shown.out
    assert capsys.readouterr().out == ""
    wrong = {
        ("--prompts", str(path), "--stream"): "--prompts: not with --stream",
        ("--prompts", str(path), "--tensor-parallel", "2"): "--prompts: not with --tensor-parallel",
        ("--prompt", "a", "--out", "b"): "--out: needs --prompts",
        ("--prompts", str(tmp_path / "none")): "none: no such file",
        ("--prompts", str(path), "--out", str(tmp_path)): "give a file in a folder that exists",
    }
    for flags, message in wrong.items():
        assert cli.main([*asked, *flags]) == 2
        assert message in capsys.readouterr().err
