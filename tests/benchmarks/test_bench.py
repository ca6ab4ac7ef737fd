"""`tritium bench` on a tiny model: it prints what it writes, its figures agree with each other, refusals are a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tritium.benchmarks import bench
from tritium.benchmarks.machine import PARTS, decode_step
from tritium.benchmarks.stepping import keys_of
from tritium.runtime import cli
from tritium.runtime.loading import load_config

SIZE = """
family: qwen3
vocab_size: 96
context_length: 160
embedding_dim: 32
num_layers: 2
num_heads: 4
num_kv_heads: 2
head_dim: 16
hidden_dim: 48
norm_eps: 1.0e-6
rope_base: 1000000.0
rope_scaling: null
tie_embeddings: true
dtype: float32
"""
LIMITS = {
    "read_bytes_per_second": 1e9, "copy_bytes_per_second": 1e9, "matmul_flop_per_second": 1e12, "launch_seconds": 1e-6,
}  # fmt: skip
SMALL = ["--batch", "1", "3", "--prompt", "5", "--steps", "4", "--device", "cpu", "--backend", "torch"]


@pytest.fixture
def size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(bench, "limits", lambda device: LIMITS)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    path = tmp_path / "pocket.yaml"
    path.write_text(SIZE)
    return str(path)


def test_what_it_prints_is_what_it_writes(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert cli.main(["bench", "--config", size, *SMALL, "--context", "20", "160", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    out, err = capsys.readouterr()
    assert (out, err) == (bench.summary(found) + "\n", "")
    assert found["model"] == {
        "name": "pocket", "parameters": bench.parameter_count(load_config(size)), "dtype": "float32",
        "quantise": None, "backend": "torch", "form": "fused",
    }  # fmt: skip
    assert [(row["batch"], row["context"]) for row in found["steps"]] == [(1, 20), (1, 160), (3, 20), (3, 160)]
    for row in found["steps"]:
        taken = row["step_us"]["p50"]
        work = decode_step(load_config(size), row["batch"], keys_of(row["context"]), item=4)
        assert row["parts_us"]["weights"] == pytest.approx(work.weights / 1e3)
        assert row["parts_us"]["cache"] == pytest.approx(work.cache / 1e3)
        assert row["parts_us"]["launches"] == pytest.approx(2 * 5 + 4)
        assert set(row["parts_us"]) == set(PARTS)
        assert row["floor_us"] + row["unexplained_us"] == pytest.approx(taken)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 1e6 / taken)
    assert [row["batch"] for row in found["generation"]] == [1, 3]
    for row in found["generation"]:
        assert row["prefill_tokens_per_second"] == pytest.approx(row["batch"] * 5e3 / row["prefill_ms"])
        assert row["first_token_ms"] > 0
    lines = out.splitlines()
    assert lines[2].split() == [
        "batch", "context", "tok/s", "us", "floor", "share", "weights", "cache", "logits", "launches", "unexplained",
        "largest",
    ]  # fmt: skip
    assert "launch 1.00 us" in out


def test_a_step_of_the_triton_path_is_that_of_its_decode_loop(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter: a trial of the way there, whose times mean nothing."""

    class Once(bench.Stopwatch):
        def _rounds(self, timer: Any, fewest: int) -> int:
            return 1

    monkeypatch.setattr(bench, "Stopwatch", Once)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr("tritium.benchmarks.measure.WARM_UP", 1)
    options = ["--batch", "1", "--context", "20", "--prompt", "3", "--steps", "2", "--device", "cpu"]
    assert bench.main(["--config", size, *options, "--backend", "triton"]) == 0


def test_what_has_no_room_is_named(
    size: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {20: 0, 5 + 4: 0, 160: 3}  # GiB

    def no_room(spec: Any, parameters: int, rows: int, tokens: int, *rest: Any) -> str | None:
        return "needs 3.0 GiB, and 2.0 are free" if needed[tokens] > 2 else None

    monkeypatch.setattr(bench, "no_room", no_room)
    assert bench.main(["--config", size, *SMALL, "--context", "20", "160"]) == 0
    out = capsys.readouterr().out
    assert "batch 3, context 160: needs 3.0 GiB, and 2.0 are free" in out
    assert [line.split()[:2] for line in out.splitlines()[3:5]] == [["1", "20"], ["3", "20"]]


def test_a_quantised_model_is_measured_beside_a_lower_floor(size: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert bench.main(["--config", size, *SMALL, "--context", "20", "--quantise", "int4", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    work = decode_step(load_config(size), 1, keys_of(20), item=4, quantise="int4")
    assert found["steps"][0]["parts_us"]["weights"] == pytest.approx(work.weights / 1e3)
    assert (found["model"]["quantise"], found["model"]["dtype"]) == ("int4", "float32")


def test_contexts_and_prompts_that_a_model_has(size: str) -> None:
    class Options:
        context = None
        batch, prompt, steps, quantise, json = [1], None, 2, None, None

    options: Any = Options()
    bench._check(options, load_config(size))
    assert (options.context, options.prompt) == ([128], 158)
    options.context = options.prompt = None
    bench._check(options, load_config(size).replace(context_length=50))
    assert (options.context, options.prompt) == ([50], 48)
    options.prompt = None
    bench._check(options, load_config(size).replace(context_length=1000))
    assert options.prompt == bench.PROMPT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model"),
        (["--model", "qwen3", "--config", "SIZE"], "name a model"),
        (["--model", "qwen3", "--size", "9B"], "'9B'"),
        (["--model", "qwen9"], "did you mean qwen"),
        (["--config", "SIZE", "--size", "8B"], "--size needs --model"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "SIZE", "--context", "161"], "--context: 161 exceeds the model's context length of 160"),
        (["--config", "SIZE", "--context", "1"], "--context: must be 2 or more, got 1"),
        (["--config", "SIZE", "--batch", "1", "0"], "--batch: must be 1 or more, got 0"),
        (["--config", "SIZE", "--prompt", "100", "--steps", "61"], "100 + 61 tokens exceed"),
        (["--config", "SIZE", "--steps", "1"], "--steps: must be 2 or more"),
        (["--config", "SIZE", "--quantise", "int3"], "quantise: unknown 'int3'"),
        (["--config", "SIZE", "--backend", "triton", "--form", "other"], "form: must be one of fused, persistent"),
        (["--config", "SIZE", "--form", "fused"], "is of the Triton path's steps"),
        (["--config", "SIZE", "--json", "/nowhere/x.json"], "a folder that exists"),
        (["--config", "SIZE", "--dtype", "float12"], "'float12'"),
        (["--config", "SIZE", "--batch", "1000000000000"], "are free on cpu: --quantise takes less"),
    ],
)
def test_mistakes_are_one_line(
    size: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [size if part == "SIZE" else part for part in arguments]
    small = {"--prompt": "5", "--steps": "4", "--device": "cpu"}
    rest = [part for name, value in small.items() if name not in given for part in (name, value)]
    assert cli.main(["bench", *given, *rest]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("tritium bench: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_device_that_is_not_there(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--config", size, "--prompt", "5", "--steps", "4", "--device", "cuda"]) == 2
    assert "cuda is not there" in capsys.readouterr().err
