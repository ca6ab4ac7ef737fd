"""A configuration says what is wrong with it in one line, before anything is written."""

import copy
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import yaml
from tritium.runtime import cli
from tritium.runtime.errors import TritiumError
from tritium.runtime.registry import MODELS
from tritium.runtime.training.config import Data, TrainingConfig, parse, read_config

import tritium

from .conftest import LETTERS, NARROW

Write = Callable[[dict[str, Any]], Path]
READY = sorted(MODELS.glob("*/train/*.yaml"))


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value under a dotted key; `...` takes the key away."""
    values = copy.deepcopy(values)
    *sections, name = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    return values


MISTAKES = [
    ("learning_rate", 1.0, "unknown key 'learning_rate'; "),
    ("optimizer.learningrate", 1.0, "optimizer: unknown key 'learningrate'; did you mean learning_rate "),
    ("data", ..., "missing data"),
    ("optimizer", {}, "optimizer: missing learning_rate"),
    ("optimizer", [1], "optimizer: must hold keys and values, got [1]"),
    ("overrides", 3, "overrides: must hold keys and values, got 3"),
    ("optimizer.learning_rate", "1e-3", "optimizer: learning_rate: must be a number, got '1e-3' (YAML reads 1e-6 as"),
    ("optimizer.learning_rate", -1, "optimizer: learning_rate: must be above 0, got -1"),
    ("optimizer.learning_rate", float("nan"), "optimizer: learning_rate: must be above 0, got nan"),
    ("optimizer.minimum_rate", 1.0, "optimizer: minimum_rate: must be 0 to the learning_rate, got 1.0"),
    ("optimizer.betas", [0.9], "optimizer: betas: must be a list of 2, got [0.9]"),
    ("optimizer.betas", [0.9, 1.0], "optimizer: betas: must be 0 or more and below 1, got [0.9, 1.0]"),
    ("optimizer.betas", [0.9, "x"], "optimizer: betas[1]: must be a number, got 'x'"),
    ("optimizer.weight_decay", -0.1, "optimizer: weight_decay: must be 0 or more, got -0.1"),
    ("optimizer.clip", 0, "optimizer: clip: must be above 0, got 0"),
    ("optimizer.average", True, "optimizer: average: must be a whole number, got True"),
    ("schedule.steps", 0, "schedule: steps: must be above 0, got 0"),
    ("schedule.steps", 1.5, "schedule: steps: must be a whole number, got 1.5"),
    ("schedule.warmup", 7, "schedule: warmup: must be a number of steps, or a part of them below 1, got 7"),
    ("schedule.warmup", 1.5, "schedule: warmup: must be a number of steps, or a part of them below 1, got 1.5"),
    ("schedule.decay", "line", "schedule: decay: must be one of cosine, constant, got 'line'"),
    ("seed", -1, "seed: must be 0 to 2^63 - 1, got -1"),
    ("compute_dtype", "float16", "compute_dtype: must be one of bfloat16, float32, got 'float16'"),
    ("backend", "cuda", "backend: must be one of auto, triton, torch, got 'cuda'"),
    ("gradient_checkpointing", "all", "gradient_checkpointing: must be one of nothing, attention, products, got 'all'"),
    ("initialise", {"std": 0}, "initialise: std: must be above 0, got 0"),
    ("loss", {"label_smoothing": 1}, "loss: label_smoothing: must be 0 or more and below 1, got 1"),
    ("loss", {"z_loss": -1}, "loss: z_loss: must be 0 or more, got -1"),
    ("evaluation", {"tokens": "all"}, "evaluation: tokens: must be one of whole, got 'all'"),
    ("evaluation", {"tokens": 0}, "evaluation: tokens: must be above 0, got 0"),
    ("evaluation", {"window": 8, "stride": 9}, "evaluation: stride: must be at most the window of 8, got 9"),
    ("checkpoint", {"keep": 0}, "checkpoint: keep: must be above 0, got 0"),
    ("log.every", 0, "log: every: must be above 0, got 0"),
    ("data.batch_tokens", 64, "data: give either batch_size or batch_tokens"),
    ("data.batch_size", ..., "data: give either batch_size or batch_tokens"),
    ("data.train", [], "data: train: must name at least one file"),
    ("data.train", [3], "data: train[0]: must be text, got 3"),
    ("data.validation", {"fraction": 1}, "data: validation: fraction: must be above 0 and below 1, got 1"),
    ("data.validation", {"part": 0.1}, "data: validation: unknown key 'part'; known: fraction"),
    ("data.held_out", 1.0, "data: held_out: must be 0 or more and below 1, got 1.0"),
    ("data.tokenizer", {"vocab_size": 100}, "data: tokenizer: vocab_size: must be 257 or more"),
    ("data.sampling", "random", "data: sampling: must be one of windows, documents, got 'random'"),
    ("data.sampling", "documents", "data: batch_size: documents are packed into batches of so many tokens"),
    ("data.merge_dropout", 0.1, "data: group and merge_dropout: are for sampling: documents"),
    ("data.document_separator", "", "data: document_separator: must not be empty"),
    ("data.eos_id", -1, "data: eos_id: must be 0 or more, got -1"),
    ("data.sequence_length", 0, "data: sequence_length: must be above 0, got 0"),
    ("data.sequence_length", "16", "data: sequence_length: must be a whole number, got '16' (remove the quotes)"),
    (
        "data.sequence_length",
        [[0.5, 8]],
        "data: sequence_length: a schedule is a list of [part of the training, length]",
    ),
    ("data.sequence_length", [[0.0, 8], [0.0, 9]], "data: sequence_length: a schedule is a list of [part of the train"),
    ("data.sequence_length", [[0.0, 8], 9], "data: sequence_length[1]: must be a list of 2, got 9"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_in_the_file_is_one_line(
    values: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    path = write(changed(values, key, value))
    assert cli.main(["train", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tritium: error: {path}: {message}")
    assert err.count("\n") == 1
    assert not Path(values["output"]).exists()


def in_folder(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


LATER = [
    ("overrides.vocabsize", 3, "overrides: gpt spec: unknown key 'vocabsize'; did you mean vocab_size"),
    ("overrides.num_heads", 3, "overrides: gpt spec: num_heads (3) must be a multiple of num_kv_heads (2)"),
    ("overrides.vocab_size", LETTERS - 1, "{}/text.txt: token "),
    ("model", "models/gpt/smal.yaml", "models/gpt/smal.yaml: no such file"),
    ("model", "gpt:smal", "gpt: unknown size 'smal'; did you mean small?"),
    ("model", "/nowhere", "/nowhere: no such checkpoint folder"),
    ("device", "gpu", "device: unknown 'gpu'"),
    ("freeze", ["embeding.*"], "no parameter matches 'embeding.*'; "),
    ("freeze", ["*"], "freeze: leaves no parameter to train"),
    ("data.tokenizer", ..., "data: tokenizer: this model has none of its own: give characters, a folder, or one to"),
    ("data.tokenizer", "{}", "{}: has no tokenizer.json"),
    ("data.train", "{}/no.txt", "{}/no.txt: no such data file"),
    ("data.train", "{}/empty.txt", "{}/empty.txt: the data file is empty"),
    ("data.train", "{}/blank.txt", "{}/blank.txt: the data file is empty"),
    ("data.train", "{}/latin.txt", "{}/latin.txt: not UTF-8 text"),
    ("data.train", "{}/empty.npy", "{}/empty.npy: the data file is empty"),
    ("data.train", "{}/none.npy", "{}/none.npy: the data file is empty"),
    ("data.train", "{}/text.npy", "{}/text.npy: not a file of token ids ("),
    ("data.train", "{}/floats.npy", "{}/floats.npy: must hold whole numbers in one row, got float64 [4]"),
    ("data.train", "{}/square.npy", "{}/square.npy: must hold whole numbers in one row, got int64 [2, 2]"),
    ("data.train", "{}/far.npy", "{}/far.npy: token 37 has the id 99, outside the model's vocabulary of 0 to "),
    (
        "data.train",
        "{}/negative.npy",
        "{}/negative.npy: token 39 has the id -1, outside the model's vocabulary of 0 to",
    ),
    ("data.train", "{}/ids.bin", "{}/ids.bin: of which type are its ids? give data: dtype: uint16 or uint32"),
    ("data.train", "{}/list.jsonl", '{}/list.jsonl: line 2 must be a JSON object with "text"'),
    ("data.train", "{}/cut.jsonl", '{}/cut.jsonl: line 1 must be a JSON object with "text"'),
    ("data.train", "{}/short.txt", "data: train: 9 tokens are too few for a sequence_length of 16"),
    ("data.train", ["{}/text.txt", "{}/ids.npy"], "data: give either texts or token files, not both in one list"),
    ("data.validation", "{}/no.txt", "{}/no.txt: no such data file"),
    ("data.validation", "{}/one.txt", "data: validation: is too short: it needs two tokens at least"),
    ("data.sequence_length", 33, "data: sequence_length: 33 tokens exceed the model's context of 32"),
    ("evaluation.window", 33, "data: sequence_length: 33 tokens exceed the model's context of 32"),
]


@pytest.mark.parametrize(("key", "value", "message"), LATER, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_together_is_one_line(
    values: dict[str, Any],
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: Any,
    message: str,
) -> None:
    """Would break: a traceback, a device fault in the first step, or an output folder in the way of the next try."""
    contents = {"empty.txt": b"", "blank.txt": b"\n \n", "latin.txt": b"caf\xe9", "empty.npy": b"", "text.npy": b"text"}
    contents |= {"short.txt": b"green wall", "one.txt": b"g", "ids.bin": b"\x01\x00" * 40, "cut.jsonl": b'{"text": "a'}
    contents |= {"list.jsonl": b'{"text": "green"}\n["wall"]\n'}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ids = np.arange(40) % LETTERS
    for name, array in {
        "none": ids[:0],
        "floats": np.zeros(4),
        "square": np.zeros((2, 2), np.int64),
        "far": np.where(np.arange(40) == 37, 99, ids),
        "negative": np.where(np.arange(40) == 39, -1, ids),
        "ids": ids.astype(np.uint16),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
    text = yaml.safe_dump(changed(values, key, value)).replace("{}", str(tmp_path))
    changed_values = yaml.safe_load(text)
    if str(value).endswith((".npy", ".bin")):
        del changed_values["data"]["tokenizer"]
    path = write(changed_values)
    assert cli.main(["train", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"tritium: error: {message.replace('{}', str(tmp_path))}"), err
    assert err.count("\n") == 1
    assert not Path(values["output"]).exists()


def test_a_checkpoint_of_another_shape_is_one_line(
    values: dict[str, Any], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tritium.load_config("models/gpt/small.yaml").replace(**NARROW, vocab_size=LETTERS, context_length=32)
    tritium.save_pretrained(tritium.load_model(spec, device="cpu"), tmp_path / "saved")
    path = write({**values, "model": str(tmp_path / "saved"), "overrides": {"hidden_dim": 40}})
    assert cli.main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tritium: error: {tmp_path}/saved: ")
    assert "[16, 32]" in err
    assert "[16, 40]" in err
    assert err.count("\n") == 1
    assert not Path(values["output"]).exists()


def test_the_file_itself(tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (b"a: [", "not valid YAML (line 1)"),
        (b"- a", "must hold keys and values"),
        (b"", "must"),
    ):
        (tmp_path / "bad.yaml").write_bytes(content)
        assert cli.main(["train", str(tmp_path / "bad.yaml")]) == 2
        assert capsys.readouterr().err.startswith(f"tritium: error: {tmp_path}/bad.yaml: {message}")
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"tritium: error: {tmp_path}/no.yaml: no such file\n"


def test_set_lays_values_over_the_file(values: dict[str, Any], write: Write) -> None:
    path = write(values)
    config = read_config(
        path, ["optimizer.learning_rate=2.0e-4", "evaluation.every=7", "data.tokenizer={vocab_size: 300}"]
    )
    assert config.optimizer.learning_rate == 2e-4
    assert config.evaluation.every == 7
    assert config.data.sequence_length == 16
    for change in ("optimizer", "=3", ".a=3", "a.=3"):
        with pytest.raises(TritiumError, match="--set: must be KEY=VALUE, such as"):
            read_config(path, [change])
    with pytest.raises(TritiumError, match="--set: seed: not a YAML value: '\\['"):
        read_config(path, ["seed=["])
    with pytest.raises(TritiumError, match="optimizer: unknown key 'rate'"):
        read_config(path, ["optimizer.rate=1.0"])


def test_defaults_and_forms(values: dict[str, Any]) -> None:
    config = parse(values, "test")
    assert config.data.train == (values["data"]["train"],)
    assert config.data.length_at(0.99) == 16
    assert config.data.tokens_at(0.0) == 64
    assert config.schedule.warmup_steps == 0
    assert parse(changed(values, "schedule.warmup", 0.5), "test").schedule.warmup_steps == 3
    schedule = parse(changed(values, "data.sequence_length", [[0.0, 8], [0.5, 16]]), "test").data
    assert [schedule.length_at(done) for done in (0.0, 0.49, 0.5, 0.9)] == [8, 8, 16, 16]
    assert schedule.lengths == [8, 16]
    assert schedule.tokens_at(0.5) == 64


def keys(kind: Any) -> dict[str, Any]:
    """The fields of a section, and of those within it that stand in every file."""
    hints = get_type_hints(kind)
    return {name: keys(hints[name]) if is_dataclass(hints[name]) else None for name in hints}


def test_the_page_has_every_key_with_its_default() -> None:
    page = (MODELS.parent / "docs/development/training.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert block
    shown = yaml.safe_load(block[1])
    assert list(shown) == list(keys(TrainingConfig))
    required = {
        "data": {"train", "sequence_length", "batch_size"},
        "optimizer": {"learning_rate"},
        "schedule": {"steps"},
    }
    least = {name: shown[name] for name in ("model", "output")}
    least |= {name: {key: shown[name][key] for key in some} for name, some in required.items()}
    for name, inner in keys(TrainingConfig).items():
        if inner is not None:
            assert list(shown[name]) == list(inner)
    assert parse(shown, "page") == parse(least, "page")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_made_ones_are_whole(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are found, and what they name is found, from any folder."""
    monkeypatch.chdir(tmp_path)
    config = read_config(str(path.relative_to(MODELS.parent)))
    assert isinstance(config.data, Data)
    assert config.schedule.steps >= 700
    assert (MODELS.parent / config.data.train[0]).is_file()
