"""The command line: what it prints, that it repeats, how a conversation goes, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tritium.runtime import cli
from tritium.runtime.registry import families, get_family
from tritium.runtime.spec import ModelSpec
from tritium.runtime.text import Stats, TextGenerator
from tritium.runtime.tokenizer import Tokenizer

import tritium

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model whose 96 tokens are the characters of ASCII, with a chat template."""
    directory = tmp_path_factory.mktemp("tiny checkpoint")  # with a space
    sizes: dict[str, Any] = {"vocab_size": 96, "context_length": 256, "embedding_dim": 16, "num_layers": 2}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 24, "tie_embeddings": True}
    rest = {"norm_eps": 1e-6, "rope_base": 10000.0, "rope_scaling": None, "dtype": "float32"}
    spec = get_family("qwen3").spec_from({**sizes, **heads, **rest}, "tiny")
    tritium.save_pretrained(tritium.load_model(spec, device="cpu"), directory)
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    fast = FastTokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def generator(checkpoint: Path) -> TextGenerator:
    model, tokenizer, _ = tritium.load(checkpoint, device="cpu")
    return TextGenerator(model, tokenizer)


Say = Callable[..., str]


@pytest.fixture
def say(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command on the checkpoint and gives what it printed; it must succeed with nothing on stderr."""

    def run(command: str, *arguments: str) -> str:
        assert cli.main([command, "--checkpoint", str(checkpoint), "--device", "cpu", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return str(out)

    return run


LENGTH = ["--max-new-tokens", "40"]
SEEDED = [*LENGTH, "--seed", "3"]


def test_generate_prints_prompt_and_continuation(say: Say, generator: TextGenerator) -> None:
    text = generator.generate("To be,", max_new_tokens=40, seed=3)
    assert isinstance(text, str)
    assert len(text) == 40
    assert say("generate", "--prompt", "To be,", *SEEDED) == f"To be,{text}\n"


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"temperature": 0.3}, {"top_k": 2}, {"top_p": 0.1}, {"top_p": 1.0, "temperature": 2.0}],
    ids=str,
)
def test_sampling_options_reach_the_generator(say: Say, generator: TextGenerator, options: dict[str, float]) -> None:
    """Would break: an option is parsed and dropped."""
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    text = generator.generate("ab", max_new_tokens=40, seed=3, **options)  # type: ignore[arg-type]
    assert say("generate", "--prompt", "ab", *SEEDED, *flags) == f"ab{text}\n"
    assert say("generate", "--prompt", "ab", *SEEDED, *flags, "--stream") == f"ab{text}\n"
    if options:
        assert text != generator.generate("ab", max_new_tokens=40, seed=3)


def test_seeds(say: Say) -> None:
    texts = [say("generate", "--prompt", "x", *LENGTH, "--seed", str(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_without_a_seed_every_run_differs(say: Say) -> None:
    assert say("generate", "--prompt", "x", *LENGTH) != say("generate", "--prompt", "x", *LENGTH)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_stop(say: Say, stream: list[str]) -> None:
    """Would break: text behind a stop string shows, or the stop string itself, or only one of several is seen."""
    whole = say("generate", "--prompt", "x", *SEEDED).removeprefix("x")
    early, late = whole[7:9], whole[20:22]
    shown = say("generate", "--prompt", "x", *SEEDED, *stream, "--stop", late, "--stop", early)
    assert shown == f"x{whole[: min(whole.index(early), whole.index(late))]}\n"


def test_stats_go_to_stderr_behind_the_text(
    say: Say, checkpoint: Path, generator: TextGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    """Would break: they stand in the text, or count another text's tokens."""
    text = say("generate", "--prompt", "To be,", *SEEDED)
    source = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert cli.main(["generate", *source, "--prompt", "To be,", *SEEDED, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == text
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"model loaded in {number} s; first token {number} s after a prompt of 6; "
        rf"40 new tokens, {number} tokens/s after the first\n",
        err,
    )
    assert cli.main(["chat", *source, "--prompt", "hello", *SEEDED, "--stats", "--stream"]) == 0
    assert "after a prompt of 11; 40 new tokens" in capsys.readouterr().err  # <u>hello<a>


def test_stats_of_a_text(generator: TextGenerator) -> None:
    pieces = generator.generate("To be,", stream=True, max_new_tokens=9, seed=3)
    next(iter(pieces))
    assert generator.last_stats is not None
    assert generator.last_stats.new_tokens == 1
    assert generator.last_stats.tokens_per_second == 0
    "".join(pieces)
    stats = generator.last_stats
    assert (stats.prompt_tokens, stats.new_tokens) == (6, 9)
    assert 0 < stats.first_token_seconds < stats.seconds
    assert stats.tokens_per_second * (stats.seconds - stats.first_token_seconds) == pytest.approx(8)
    generator.generate("a", max_new_tokens=0)
    assert generator.last_stats == Stats(prompt_tokens=1)
    stats = Stats(prompt_tokens=2)
    for seconds in (0.5, 0.75, 1.0):
        stats.note(seconds)
    assert stats == Stats(prompt_tokens=2, new_tokens=3, first_token_seconds=0.5, seconds=1.0)
    assert str(stats) == "first token 0.500 s after a prompt of 2; 3 new tokens, 4.0 tokens/s after the first"


def test_no_new_tokens(say: Say) -> None:
    assert say("generate", "--prompt", "just this", "--max-new-tokens", "0") == "just this\n"


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_chat_answers_one_message(say: Say, generator: TextGenerator, stream: list[str]) -> None:
    """Would break: the answer is not to the rendered conversation, or the prompt is printed with it."""
    by_hand = generator.generate("<s>be brief<u>hello<a>", max_new_tokens=40, seed=3)
    asked = ["--prompt", "hello", "--system", "be brief"]
    assert say("chat", *asked, *SEEDED, *stream) == f"{by_hand}\n"
    assert (
        say("chat", "--prompt", "hello", *SEEDED, *stream) == f"{generator.chat('hello', max_new_tokens=40, seed=3)}\n"
    )


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def typed(prompt: str = "") -> str:
        line = next(waiting)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_conversation(say: Say, generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, stream: list[str]) -> None:
    """Would break: the second answer does not know the first turn, or an empty line is sent."""
    type_in(monkeypatch, "one", "", "   ", "two", EOFError)
    first = generator.generate("<s>be brief<u>one<a>", max_new_tokens=40, seed=3)
    second = generator.generate(f"<s>be brief<u>one<a>{first}<u>two<a>", max_new_tokens=40, seed=3)
    assert say("chat", "--system", "be brief", *SEEDED, *stream) == f"{first}\n{second}\n\n"


def test_no_thinking_reaches_the_template(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = Tokenizer.apply_chat_template

    def spy(self: Tokenizer, messages: Any, **options: Any) -> str:
        seen.append(options.get("enable_thinking"))
        return original(self, messages, **options)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", spy)
    say("chat", "--prompt", "a", *SEEDED)
    say("chat", "--prompt", "a", "--no-thinking", *SEEDED)
    assert seen == [None, False]


def test_interrupted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_in(monkeypatch, KeyboardInterrupt)
    assert cli.main(["chat", "--checkpoint", str(checkpoint)]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "\n"


def parameters(spec: ModelSpec, experts: int | None = None) -> int:
    """By the formula; with `experts` counted of a mixture's, or all."""
    width, inner = spec.embedding_dim, spec.hidden_dim
    norm = width * (2 if spec.norm == "layer" else 1)
    qkv, out = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, spec.num_heads * spec.head_dim
    layer = 2 * norm + qkv * (width + spec.qkv_bias) + width * (out + spec.out_bias)
    layer += 2 * spec.head_dim if spec.qk_norm == "weighted" else 0
    if all(spec.expert_layers):
        chosen = spec.num_experts if experts is None else experts
        layer += spec.num_experts * width + chosen * 3 * width * spec.expert_dim
    elif spec.mlp == "gated":
        layer += 3 * width * inner
    else:
        layer += (2 * width + 1) * inner + width  # two matrices and their biases
    embeddings = spec.vocab_size * width * (1 if spec.tie_embeddings else 2)
    embeddings += spec.context_length * width if spec.positions == "learned" else 0
    return embeddings + spec.num_layers * layer + norm


def test_models_lists_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    """Would break: a size is left out, or its numbers are not those of its spec."""
    assert cli.main(["models"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", header.strip())[:6] == [
        "family", "size", "parameters", "active", "context", "weights",
    ]  # fmt: skip
    rows = {tuple(cells[:2]): cells for line in lines if (cells := re.split(r"  +", line.strip()))}
    assert len(rows) == len(lines)
    expected = {}
    for family in families().values():
        for path in family.folder.glob("*.yaml"):
            if path.name != "family.yaml":
                spec = tritium.load_config(path)
                expected[family.name, path.stem] = spec
    assert set(rows) == set(expected)
    for key, spec in expected.items():
        _, _, count, active, context, weights, cache, variants = rows[key]
        assert int(count.replace(",", "")) == parameters(spec)
        assert int(active.replace(",", "")) == parameters(spec, spec.experts_per_token)
        assert int(context.replace(",", "")) == spec.context_length
        mebibytes = parameters(spec) * (4 if spec.dtype == "float32" else 2) / 2**20
        assert int(weights.removesuffix(" MiB").replace(",", "")) == pytest.approx(mebibytes, abs=0.51)
        itemsize = 4 if spec.dtype == "float32" else 2
        per_token = spec.num_layers * spec.layer_repeat * 2 * spec.num_kv_heads * spec.head_dim * itemsize
        assert float(cache.removesuffix(" KiB")) == pytest.approx(per_token / 1024, rel=1e-5)
        assert variants
    assert rows["qwen3", "0.6B"][2] == "596,049,920"  # the published checkpoint's own count
    assert rows["mobilellm", "70b"][7] == "random weights only"
    order = [size for family, size in rows if family == "qwen3"]
    assert [size for size in order if "2507" not in size] == [
        "0.6B", "1.7B", "4B", "8B", "14B", "30B-A3B", "32B", "235B-A22B",
    ]  # fmt: skip


# The real process


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": ""}


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60)


def test_main_py_generates(checkpoint: Path, generator: TextGenerator, tmp_path: Path) -> None:
    """Would break: main.py only works from the root, or prints anything but the text."""
    done = run(command("--checkpoint", str(checkpoint), "--prompt", "To be,", *SEEDED), tmp_path)
    text = generator.generate("To be,", max_new_tokens=40, seed=3)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"To be,{text}\n", "")


def test_main_py_chats(checkpoint: Path, generator: TextGenerator, tmp_path: Path) -> None:
    asked = ["--chat", "--stream", "--checkpoint", checkpoint.name, "--prompt", "hello", *SEEDED]
    done = run(command(*asked), checkpoint.parent)
    text = generator.chat("hello", max_new_tokens=40, seed=3)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{text}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "owner/name"], ["owner/name: no such folder here", "HF_HUB_OFFLINE"]),
        (["--model", "qwen3", "--size", "0.7B"], ["qwen3: unknown size '0.7B'; did you mean", "or 0.6B? known"]),
        (["--checkpoint", "{ck}", "--max-new-tokens", "999", "--stream"], ["1 tokens, and 999 more would exceed"]),
        (["--max-new-tokens", "ten"], ["'ten'"]),
    ],
    ids=lambda part: " ".join(part)[:40],
)
def test_mistakes(checkpoint: Path, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    """What test_errors.py holds in-process. Would break: a warning or an exit handler adds to the one line."""
    given = [argument.replace("{ck}", str(checkpoint)) for argument in arguments]
    done = run(["env", f"HF_HOME={tmp_path}", *command("--prompt", "a", *given)], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tritium")
    assert done.stderr.count("\n") == 1
    assert [part for part in said if part not in done.stderr] == []


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_the_bundled_model(tmp_path: Path, chat: list[str]) -> None:
    """`python main.py --prompt "..."` answers on a machine without network, in a minute's reading of the README."""
    asked = [*chat, "--prompt", "ROMEO:", "--max-new-tokens", "12", "--temperature", "0"]
    done = run(["env", f"HF_HOME={tmp_path}", *command(*asked)], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("" if chat else "ROMEO:")
    assert len(done.stdout) > len("ROMEO:") + 12


@pytest.mark.parametrize("how", ["stream", "whole"])
def test_closed_pipe(checkpoint: Path, how: str) -> None:
    """`tritium ... | head -c 1`. Would break: a BrokenPipeError traceback, at once or while Python closes stdout."""
    if how == "stream":
        asked = ["--checkpoint", str(checkpoint), "--prompt", "abc", "--max-new-tokens", "200", "--stream"]
        process = subprocess.Popen(
            command(*asked), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert process.stdout is not None
        assert process.stdout.read(1) == b"a"
    else:
        asked = ["-m", "tritium.runtime.cli", "models"]
        process = subprocess.Popen(
            [sys.executable, *asked], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_ctrl_c(checkpoint: Path) -> None:
    """Would break: a traceback at the prompt of a conversation."""
    process = subprocess.Popen(
        command("--chat", "--checkpoint", str(checkpoint)),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A background job of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.read(2) == b"> "
    time.sleep(0.3)  # the prompt is out a moment before the process waits for the answer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"\n")
