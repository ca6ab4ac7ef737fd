"""Warming up: the launches of a later request are among those of the warm-up, and what was compiled is counted."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tritium.kernels import launch as launching
from tritium.runtime import cli, warmup
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.registry import get_family
from tritium.runtime.spec import ModelSpec

import tritium

ROOT = Path(__file__).resolve().parents[2]
SHAPE: dict[str, Any] = {
    "vocab_size": 40, "context_length": 64, "embedding_dim": 16, "num_layers": 5, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "hidden_dim": 16, "norm_eps": 1e-6, "rope_base": 1e4, "rope_scaling": None,
    "tie_embeddings": True, "dtype": "float32",
}  # fmt: skip


def spec(**changes: Any) -> ModelSpec:
    return get_family("qwen3").spec_from(SHAPE, "tiny").replace(**changes)


def test_layers_that_differ_stay() -> None:
    """Would break: a kind of layer is lost, or its traits move to another, or equal ones are all kept."""
    windows = [None, None, 8, None, 8]
    found = warmup.thinned(spec(windows=windows, qk_norm_layers=[True, True, True, True, False]))
    assert list(zip(found.windows, found.qk_norm_layers, strict=True)) == [
        (None, True), (None, True), (8, True), (None, True), (8, False),
    ]  # fmt: skip
    assert warmup.thinned(spec()).num_layers == 2
    assert warmup.thinned(spec(num_layers=1)) == spec(num_layers=1)
    found = warmup.thinned(spec(num_layers=9, windows=[None] * 7 + [8] * 2))
    assert found.windows == (None, None, 8, 8)
    assert found.replace(num_layers=9, windows=[None] * 7 + [8] * 2) == spec(num_layers=9, windows=[None] * 7 + [8] * 2)


def test_lengths_lie_on_both_sides_of_every_power() -> None:
    assert warmup.lengths(70) == [1, 16, 17, 32, 33, 64, 65]
    assert warmup.lengths(64) == [1, 16, 17, 32, 33, 64]
    assert warmup.lengths(1) == [1]


def _launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> set[tuple[Any, ...]]:
    """What Triton would compile anew for: kernels, dtypes of tensors, and the arguments by name."""
    seen: set[tuple[Any, ...]] = set()
    original = launching.launch

    def note(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *args: Any, **options: Any) -> None:
        kinds = tuple(str(arg.dtype) if isinstance(arg, torch.Tensor) else type(arg).__name__ for arg in (like, *args))
        constants = tuple(sorted((name, str(value)) for name, value in options.items() if name.isupper()))
        seen.add((kernel.fn.__name__, kinds, constants, options.get("num_warps"), options.get("num_stages")))
        original(kernel, grid, like, *args, **options)

    with monkeypatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("tritium.kernels.") and hasattr(module, "launch"):
                patch.setattr(module, "launch", note)
        run()
    return seen


@pytest.mark.skipif(not launching.INTERPRETED, reason="its launches are those of the interpreter")
def test_a_request_launches_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, all ways of sampling, the whole model: no kernel and no form of one that was not warmed up."""
    shape = spec(num_layers=3, context_length=20)
    warm = _launches(monkeypatch, lambda: warmup.warm_up(shape, batches=[2], device="cpu"))
    model = tritium.load_model(shape, device="cpu", backend="triton")

    def request() -> None:
        prompts = [[1, 2, 3], [4] * 11]
        list(generate(model, prompts, SamplingOptions(2, temperature=0)))
        list(generate(model, prompts, SamplingOptions(2, top_k=7, top_p=0.8, seed=1), vocabulary=39))

    asked = _launches(monkeypatch, request)
    assert asked
    assert asked <= warm, sorted(asked - warm)


def test_refusals() -> None:
    for options, words in (
        ({"context": 65}, r"--context: must be 4 to 64 \(the model's\), got 65"),
        ({"context": 3}, "--context: must be 4 to 64"),
        ({"batches": [1, 0]}, "--batch: must be 1 or more, got 0"),
    ):
        with pytest.raises(TritiumError, match=words):
            warmup.warm_up(spec(), device="cpu", **options)  # type: ignore[arg-type]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It warms up the model that was named, as it was asked to."""
    given: list[tuple[ModelSpec, dict[str, Any]]] = []

    def warm_up(spec: ModelSpec, **options: Any) -> warmup.Compiled:
        given.append((spec, options))
        return warmup.Compiled(7, 2)

    monkeypatch.setattr(warmup, "warm_up", warm_up)
    monkeypatch.setattr(warmup, "require_kernels", lambda: None)
    assert cli.main(["warmup", "--model", "qwen3", "--size", "0.6b", "--batch", "1", "8", "--context", "512"]) == 0
    assert given[-1][0] == get_family("qwen3").spec("0.6B")
    assert given[-1][1]["batches"] == [1, 8]
    assert given[-1][1]["context"] == 512
    assert capsys.readouterr().out.startswith("7 kernels compiled, 2 were there, in ")
    tritium.save_pretrained(tritium.load_model(spec(), device="cpu"), tmp_path)
    override = ["--override", "rope_theta=5000.0"]
    assert cli.main(["warmup", "--checkpoint", str(tmp_path), "--device", "cpu", *override]) == 0
    assert given[-1] == (
        spec(rope_base=5000.0),
        {"batches": [1], "context": None, "device": "cpu", "dtype": "auto", "quantise": None},
    )
    for wrong, words in (
        (["--backend", "torch"], "leave --backend out"),
        (["--model", "qwen3", *override], "--override: needs --checkpoint"),
    ):
        capsys.readouterr()
        assert cli.main(["warmup", *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_is_one_line() -> None:
    code = "import sys; from tritium.runtime.cli import main; sys.exit(main(['warmup']))"
    variables = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("tritium: error: warmup cannot run here: it needs a GPU")
    assert done.stderr.count("\n") == 1


def test_compilations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton tells its listener: one compiled, two found; and whoever listened before listens again."""
    knobs = launching.triton.knobs.compilation
    before = object()
    monkeypatch.setattr(knobs, "listener", before)
    with warmup.compilations() as counted:
        for hit in (False, True, True):
            knobs.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
    assert counted == warmup.Compiled(1, 2)
    assert knobs.listener is before
