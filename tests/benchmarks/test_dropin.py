"""The benchmark of accelerated models: every contender's tokens are right here, and a wrong one is seen."""

from importlib import import_module

import pytest
import torch
from tritium.benchmarks.case import Draw
from tritium.benchmarks.worker import Bench, find

CPU = torch.device("cpu")
LIMITS = {"read_bytes_per_second": 1e9, "copy_bytes_per_second": 1e9, "matmul_flop_per_second": 1e12}


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("tritium.kernels.launch"), "obstacle", lambda *args: "none shall run")


def test_every_contender_gives_right_tokens_and_is_timed() -> None:
    bench = Bench("dropin", CPU, smoke=True)
    (case,) = bench.cases.values()
    with torch.inference_mode():
        found = bench.check(case)
        assert found["status"] == "right", found
        assert set(found["absent"]) == {"transformers compiled", "liger"}
        timed = bench.time(case, LIMITS, found["absent"])
    assert timed["status"] == "measured"
    assert timed["times"].keys() == {"tritium", "transformers", "decoder"}


def test_other_tokens_are_seen() -> None:
    (case,) = find("dropin", smoke=True).values()
    assert case.check is not None
    with torch.inference_mode():
        args = case.make(Draw(CPU, 5))
        out = case.ours(*args)()
        assert case.check(out, args) is None
        for place in (2, -1):  # in the prompt, and among the new ones
            off = out.clone()
            off[1, place] = (off[1, place] + 7) % 96
            assert case.check(off, args) is not None
