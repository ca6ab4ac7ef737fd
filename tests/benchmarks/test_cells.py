"""Decode cells: every contender walks the same steps, a wrong token is seen, what does not fit is skipped."""

import dataclasses
from typing import Any

import pytest
import torch
from tritium.benchmarks import stepping, subject
from tritium.benchmarks.case import Draw
from tritium.benchmarks.cells import autotuned_step, cell, compiled_step, fixed_step, transformers_step
from tritium.benchmarks.machine import decode_step
from tritium.benchmarks.shapes import DECODED, TINY, spec
from tritium.benchmarks.stepping import Filled, keys_of, steps
from tritium.benchmarks.subject import Subject
from tritium.benchmarks.worker import Bench, find
from tritium.runtime.decoding import Decoding, room
from tritium.runtime.generation import SamplingOptions
from tritium.runtime.registry import get_family

CPU = torch.device("cpu")
SPECS = {
    "dense": spec("tiny"),
    "mixture": spec("tiny mixture"),
    "pairs": get_family("mobilellm").spec("950m").replace(**TINY),  # transformers rotates neighbours
}
LIMITS = {
    "read_bytes_per_second": 1e9, "copy_bytes_per_second": 1e9, "matmul_flop_per_second": 1e12,
    "launch_seconds": 1e-6, "barrier_seconds": 1e-6,
}  # fmt: skip


@pytest.fixture(params=list(SPECS))
def of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(subject, "spec", SPECS.__getitem__)
    return Subject(request.param, CPU)


@torch.inference_mode()
def test_all_contenders_take_the_same_steps(of: Subject) -> None:
    """Ours, and those of transformers with a growing and with a static cache, into a second walk: which begins anew."""
    filled = Filled(of.model, 3, 21, seed=1)
    tokens = Draw(CPU, 2).integers(96, 3)
    contenders = {
        "torch": steps(of.on("torch"), filled, tokens),
        "growing": transformers_step(of, filled, tokens),
        "static": transformers_step(of, filled, tokens, static=True),
    }
    taken = {name: [call().clone() for _ in range(filled.span + 2)] for name, call in contenders.items()}
    for name, walked in taken.items():
        assert torch.equal(torch.stack(walked), torch.stack(taken["torch"])), name
    assert torch.equal(taken["torch"][0], filled.logits(of.on("torch"), tokens).argmax(-1))
    assert torch.equal(taken["torch"][0], taken["torch"][filled.span])
    assert not torch.equal(taken["torch"][0], taken["torch"][1])


@torch.inference_mode()
def test_the_fixed_step_is_traced_whole() -> None:
    """What is compiled is the first step, and stays it."""
    of = Subject("tiny", CPU)
    filled = Filled(of.model, 2, 40)
    tokens = torch.tensor([3, 4])
    expected = filled.logits(of.on("torch"), tokens).argmax(-1)
    traced = torch.compile(fixed_step(of, filled, tokens), backend="eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        assert torch.equal(traced(tokens), expected)


@torch.inference_mode()
def test_the_twin_shares_the_weights(of: Subject) -> None:
    """Two models of 30B have no room beside each other. Only what a checkpoint holds in another order is a copy."""
    ours = {parameter.untyped_storage().data_ptr() for parameter in of.model.parameters()}
    copied = [name for name, p in of.twin.named_parameters() if p.untyped_storage().data_ptr() not in ours]
    assert all(of.pairs_neighbours and name.endswith(("q_proj.weight", "k_proj.weight")) for name in copied)
    tokens = Draw(CPU, 2).integers(96, 1, 7)
    torch.testing.assert_close(of.twin(tokens).logits, of.on("torch")(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_walk_sees_the_contexts_that_its_floor_counts() -> None:
    of = Subject("tiny", CPU)
    filled = Filled(of.model, 2, 40)
    assert (filled.span, filled.held, keys_of(40)) == (16, 24, 32.5)  # 25 to 40 keys
    assert keys_of(2) == 2
    seen: list[int] = []
    model = of.on("torch")
    run = model.run
    model.run = lambda plan, tokens, batch, **how: (seen.append(batch.longest), run(plan, tokens, batch, **how))[1]  # type: ignore[method-assign]
    step = steps(model, filled, torch.tensor([1, 2]))
    for _ in range(17):
        step()
    assert seen == [*range(25, 41), 25]
    assert sum(seen[:16]) / 16 == keys_of(40)


@torch.inference_mode()
def test_the_cache_is_laid_out_as_the_decode_loop_has_it() -> None:
    of = Subject("tiny", CPU)
    for context in (40, 300, 512):
        made = [Decoding(of.model, of.model.bind(), 2, context, SamplingOptions(temperature=0)) for _ in range(2)]
        assert room(context, of.model.config.context_length) == made[0].cache.capacity
        filled, later = Filled(of.model, 2, context, seed=3), Filled(of.model, 2, context, seed=3)
        for decoding in made:
            filled.lend(decoding.cache)
        pools = [cache.keys[1].data_ptr() for cache in (made[0].cache, made[1].cache, filled.cache)]
        assert pools == [made[0].cache.keys[1].data_ptr()] * 3  # whose own is nobody's second
        assert torch.equal(filled.cache.values[1], later.cache.values[1])


def cell_of(name: str, **changes: Any) -> Any:
    """A cell whose own contender is the PyTorch path: the kernels have tests of their own."""
    case = cell(name, 2, 20, with_peers=True, compiled=True)
    return dataclasses.replace(case, ours=case.peers["torch"], variants={}, **changes)


def test_a_cell_is_checked_and_timed() -> None:
    bench = Bench("models", CPU, smoke=True)
    with torch.inference_mode():
        case = cell_of("tiny")
        found = bench.check(case)
        assert (found["status"], found["absent"]) == (
            "right", {"transformers compiled": "RuntimeError: compared on a GPU only"},
        )  # fmt: skip

        def no_memory(*args: Any) -> Any:
            raise RuntimeError("CUDA out of memory")

        peers = {**case.peers, "large": no_memory}
        row = bench.time(dataclasses.replace(case, peers=peers), LIMITS, found["absent"])
    assert set(row["times"]) == {"tritium", "torch", "transformers"}
    assert row["absent"]["large"] == "RuntimeError: CUDA out of memory"
    step = decode_step(spec("tiny"), 2, keys_of(20), item=4)  # float32 on a CPU
    assert case.step is not None
    gap, taken = row["gap"], row["times"]["tritium"]["p50"]
    assert row["bytes"] == step.weights + step.cache + step.logits
    assert gap["parts_us"]["launches"] == pytest.approx(2 * 5 + 4)
    assert gap["reading_us"] == pytest.approx(row["bytes"] / 1e3)
    assert gap["floor_us"] == pytest.approx(sum(gap["parts_us"].values()))
    assert gap["unexplained_us"] == pytest.approx(taken - gap["floor_us"])
    assert row["tokens_per_second"] == pytest.approx(2e6 / taken)


@torch.inference_mode()
def test_the_gate_of_cells() -> None:
    """Tokens that are not the likeliest, that there are not, and too few of them are seen."""
    case = cell_of("tiny")
    args = case.make(Draw(CPU, 5))
    out = case.ours(*args)()
    assert case.check(out, args) is None
    assert "deviations" in case.check((out + 1) % 96, args)
    assert "beyond" in case.check(out + 96, args)
    assert "beyond" in case.check(out[:1], args)
    for only_there in (compiled_step, autotuned_step):
        with pytest.raises(RuntimeError, match="on a GPU only"):
            only_there(*args)


def test_what_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("models", CPU, smoke=True)
    case = cell_of("tiny")
    monkeypatch.setattr(stepping, "free_bytes", lambda device: 10**5)
    assert case.obstacle is not None
    found = bench.check(case)
    assert found == {"status": "skipped", "reason": "needs 0.0 GiB, and 0.0 are free"}
    monkeypatch.setattr(stepping, "free_bytes", lambda device: None)
    assert case.obstacle(CPU) is None
    monkeypatch.undo()
    free = stepping.free_bytes(CPU)
    assert free is None or free > 2**20


def test_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break: a model of 60 GB is made while the one before it is still there."""
    alive: set[str] = set()

    class Heavy:
        def __init__(self, name: str, device: torch.device) -> None:
            assert not alive
            self.name = name
            alive.add(name)

        def __del__(self) -> None:
            alive.discard(self.name)

    monkeypatch.setattr(subject, "Subject", Heavy)
    monkeypatch.setattr(subject, "_held", {})
    first: Any = subject.subject("one", CPU)
    assert subject.subject("one", CPU) is first
    assert subject.holds("one", CPU)
    del first
    subject.subject("two", CPU)
    assert alive == {"two"}
    assert not subject.holds("one", CPU)
    assert alive == set()


def test_the_cells_are_those_that_are_asked_for() -> None:
    """What matters most first; a context that a model does not have is left out."""
    found = find("models", smoke=False)
    decoded = [name for name in found if " decode " in name]
    assert decoded[:3] == [f"qwen3 0.6B decode batch 1 context {context}" for context in (128, 4096, 32768)]
    assert len(decoded) == 45
    assert list(dict.fromkeys(name.partition(" decode ")[0] for name in decoded)) == list(DECODED)
    assert [name.split()[-3] for name in decoded] == ["1"] * 15 + ["8"] * 15 + ["32"] * 15
    assert set(found["qwen3 0.6B decode batch 32 context 128"].peers) == {"torch", "transformers"}
    assert set(found["qwen3 8B decode batch 1 context 4096"].peers) == {
        "torch", "transformers", "transformers compiled",
    }  # fmt: skip
    assert found["qwen3 8B decode batch 8 context 128"].peers == {}
    assert [name for name, case in found.items() if "torch max-autotune" in case.peers] == [
        "qwen3 0.6B decode batch 8 context 128"
    ]
    large = found["qwen3 0.6B decode batch 32 context 32768"]
    cache = 32 * (32768 - 7.5) * 28 * 2 * 8 * 128 * 2
    assert large.reads == 2 * (28 * 1024 * (4096 + 2048 + 3 * 3072) + 151936 * 1024) + cache
    assert set(large.variants) == {"batch_invariant=False", "sampler_equals_trainer", "fused", "persistent"}
    # Experts have no persistent step.
    assert set(found["qwen3 30B-A3B decode batch 1 context 128"].variants) == {"sampler_equals_trainer"}
    assert "sampler_equals_trainer" not in found["qwen3 8B decode batch 8 context 128"].variants
