"""What a checkpoint's files say of its tokenizer: special tokens, templates, defaults, and how broken ones are told."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tritium.runtime.errors import TritiumError
from tritium.runtime.tokenizer import Tokenizer

from tests.tiny import CORPUS, byte_level, tokenizer


def checkpoint(directory: Path, **files: Any) -> Path:
    """A directory with tokenizer.json and the other files, given without their `.json`."""
    byte_level().save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_only_tokenizer_json_is_needed(tmp_path: Path) -> None:
    """A bare tokenizer has no EOS, no template and no defaults, but works."""
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path))
    assert tok.encode("The dog") == tokenizer().encode("The dog")
    assert (tok.eos_ids, tok.chat_template, tok.special, tok.defaults) == ((), None, {}, {})
    with pytest.raises(TritiumError, match="no chat template") as caught:
        tok.apply_chat_template([{"role": "user", "content": "hi"}])
    assert str(tmp_path) in str(caught.value)


def test_saved_padding_and_truncation_are_switched_off(tmp_path: Path) -> None:
    """Some checkpoints were saved with a training length: a long prompt would be cut silently."""
    fast = FastTokenizer.from_str(byte_level().to_str())
    fast.enable_truncation(4)
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer.from_pretrained(str(tmp_path))
    for text in ("a", CORPUS[0]):
        assert tok.encode(text) == tokenizer().encode(text)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 5}, (5, 7)),
        ({"eos_token_id": 7}, {"eos_token_id": [3, 4]}, (3, 4, 7)),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        ({}, {"eos_token_id": True}, ()),
    ],
)
def test_eos_ids_are_the_union(tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    """A chat model stops at <|im_end|> by one file and at <|endoftext|> by the other: both must end a text."""
    files = {"generation_config": generation, "config": config}
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path, **{k: v for k, v in files.items() if v is not None}))
    assert tok.eos_ids == expected


@pytest.mark.parametrize("token", ["<|end|>", {"content": "<|end|>", "special": True, "lstrip": False}])
def test_special_tokens_as_text_or_object(tmp_path: Path, token: Any) -> None:
    """Both spellings occur; without ids elsewhere the EOS token's own id counts."""
    config = {"eos_token": token, "bos_token": None, "pad_token": {"content": "<|start|>"}, "unk_token": 3}
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path, tokenizer_config=config))
    assert tok.special == {"eos_token": "<|end|>", "pad_token": "<|start|>"}
    assert tok.eos_ids == (byte_level().token_to_id("<|end|>"),)


def test_an_eos_token_outside_the_vocabulary_is_none(tmp_path: Path) -> None:
    """It can never be generated."""
    assert Tokenizer.from_pretrained(checkpoint(tmp_path, tokenizer_config={"eos_token": "<|no|>"})).eos_ids == ()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"temperature": 0.6, "do_sample": False}, {"temperature": 0.0}),
        ({"max_length": 20}, {}),
        ({"temperature": 0.6, "top_k": None, "top_p": None}, {"temperature": 0.6}),
    ],
)
def test_sampling_defaults(tmp_path: Path, generation: Any, expected: dict[str, float]) -> None:
    """The checkpoint's own settings; a null says that it has none, and must not reach the sampler."""
    assert Tokenizer.from_pretrained(checkpoint(tmp_path, generation_config=generation)).defaults == expected


MESSAGES = [{"role": "user", "content": "hi"}]


def test_chat_template_file_is_preferred(tmp_path: Path) -> None:
    """transformers writes chat_template.jinja since 4.51; an old copy in the config must not win."""
    checkpoint(tmp_path, tokenizer_config={"chat_template": "old {{ messages[0].content }}"})
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES) == "old hi"
    (tmp_path / "chat_template.jinja").write_text("nœw {{ messages[0].content }}", encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES) == "nœw hi"


def test_named_chat_templates(tmp_path: Path) -> None:
    """Of several the one called default; without it, none, and the error says so."""
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path, tokenizer_config={"chat_template": named}))
    assert tok.apply_chat_template(MESSAGES) == "plain"
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path, tokenizer_config={"chat_template": named[:1]}))
    with pytest.raises(TritiumError, match="chat template"):
        tok.apply_chat_template(MESSAGES)


def test_what_reaches_the_template(tmp_path: Path) -> None:
    """Special tokens, tools and add_generation_prompt always; enable_thinking only when it is given."""
    template = (
        "{{ eos_token }}|{{ bos_token is defined }}|{{ add_generation_prompt }}|{{ tools is none }}|"
        "{{ enable_thinking if enable_thinking is defined else 'absent' }}"
    )
    config = {"chat_template": template, "eos_token": "<|end|>"}
    tok = Tokenizer.from_pretrained(checkpoint(tmp_path, tokenizer_config=config))
    assert tok.apply_chat_template(MESSAGES) == "<|end|>|False|True|True|absent"
    got = tok.apply_chat_template(MESSAGES, add_generation_prompt=False, enable_thinking=False, tools=[{"name": "f"}])
    assert got == "<|end|>|False|False|False|False"


def one_line(error: BaseException, *parts: str) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_missing_tokenizer(tmp_path: Path) -> None:
    """The line names the directory and what it lacks."""
    with pytest.raises(TritiumError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_line(caught.value, str(tmp_path), "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe\x00", b"version https://git-lfs"],
)
def test_malformed_tokenizer(tmp_path: Path, content: bytes) -> None:
    """Truncated downloads and Git LFS pointers are common: one line that names the file, not a library's traceback."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TritiumError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_line(caught.value, str(path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b'{"a": 1,}', b"[1]", b"null", b"\xff\xfe\x00", b"[" * 200_000])
def test_malformed_json(tmp_path: Path, name: str, content: bytes) -> None:
    """Every file that is there must be sound, down to one nested too deeply to read."""
    path = checkpoint(tmp_path) / name
    path.write_bytes(content)
    with pytest.raises(TritiumError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_line(caught.value, str(path))


def test_a_template_file_that_is_not_text(tmp_path: Path) -> None:
    """It, too, is named in one line."""
    path = checkpoint(tmp_path) / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe{{")
    with pytest.raises(TritiumError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    one_line(caught.value, str(path))


def test_text_with_half_a_surrogate_is_refused(tmp_path: Path) -> None:
    """A shell argument that is not UTF-8 arrives so: a person's mistake, not a traceback."""
    with pytest.raises(TritiumError) as caught:
        tokenizer().encode("a\ud83d")
    one_line(caught.value)
