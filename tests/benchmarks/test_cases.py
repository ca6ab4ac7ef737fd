"""The benchmark's own eyes: every gate sees a disturbed result, floors count what inputs and outputs hold."""

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.benchmarks.case import Case, Draw, call, far, wrong
from tritium.benchmarks.kernels.attention import attend, sampled
from tritium.benchmarks.kernels.sampling import misplaced
from tritium.benchmarks.peers import sdpa
from tritium.benchmarks.shapes import ITEM, MODELS, projections
from tritium.benchmarks.suite import KERNELS, OPERATIONS
from tritium.benchmarks.worker import find
from tritium.kernels import tuning
from tritium.kernels.attention import attention_reference
from tritium.kernels.sampling import sample_reference

CPU = torch.device("cpu")
SMOKE = [(operation, case) for operation in (*KERNELS, "experts") for case in find(operation, smoke=True).values()]
IDS = [f"{operation}: {case.name}" for operation, case in SMOKE]


def disturbed(case: Case) -> Any:
    """The definition as a contender, its first output off by a hundredth (tokens: by one)."""

    def off(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return (off(out[0]), *out[1:])
        return out * 1.01 if out.is_floating_point() else out + 1

    return lambda *args: lambda: off(case.definition(*args))


@pytest.mark.parametrize(("operation", "case"), SMOKE, ids=IDS)
def test_the_gate_sees_what_is_off(operation: str, case: Case) -> None:
    assert wrong(case, call(case.definition), CPU, seed=1) is None
    assert wrong(case, disturbed(case), CPU, seed=1) is not None
    assert far(case, disturbed(case), CPU, seed=1) is not None


def test_the_gate_sees_missing_numbers_and_other_types() -> None:
    case = find("rms_norm", smoke=True)["3 x 64"]

    def broken(x: Tensor, weight: Tensor) -> Tensor:
        y = case.definition(x, weight)
        y[-1, -1] = float("nan")
        return y

    assert "largest error inf" in str(wrong(case, call(broken), CPU, seed=1))
    assert "not torch.float32" in str(wrong(case, call(lambda x, w: case.definition(x, w).double()), CPU, seed=1))
    assert "output 0 is" in str(wrong(case, call(lambda x, w: case.definition(x, w)[:2]), CPU, seed=1))


def test_the_gate_sees_a_cache_that_was_not_written() -> None:
    """What a call writes into its arguments is part of its result."""
    case = next(iter(find("qk_norm_rope", smoke=True).values()))

    def forgetful(*args: Any) -> Any:
        kept = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        return case.definition(*kept)

    assert "output 1" in str(wrong(case, call(forgetful), CPU, seed=1))


@pytest.mark.parametrize("operation", ["rms_norm", "layer_norm", "swiglu", "linear", "combine", "sampling"])
def test_floors_count_every_input_and_output_once(operation: str) -> None:
    for case in find(operation, smoke=True).values():
        args = case.make(Draw(CPU, 0))
        out = case.observe(case.definition(*args), args)
        held = [x.numel() for x in args if isinstance(x, Tensor) and x.dtype == torch.float32]
        if operation == "sampling":  # one number a row is not counted
            assert (case.reads, case.writes) == (held[0] * ITEM, out[0].numel() * 8)
        else:
            assert (case.reads, case.writes) == (sum(held) * ITEM, sum(x.numel() for x in out) * ITEM)


def test_floors_of_experts() -> None:
    """By hand: eight experts of 3 * 768 * 2048 for one token, at most all 128 for many; and what is written is new."""
    one = find("grouped_linear", smoke=False)["qwen3 30B-A3B gate_up 1 x 1536 x 2048"]
    assert one.reads == pytest.approx(2 * (8 * 2 * 768 * 2048 + 2048), rel=1e-3)
    layers = find("experts", smoke=False)
    assert layers["30B-A3B layer 1"].reads == 2 * (8 * 3 * 768 * 2048 + 128 * 2048 + 2 * 2048)
    assert layers["30B-A3B layer 2048"].reads == 2 * (128 * 3 * 768 * 2048 + 128 * 2048 + 2 * 2048 * 2048)
    assert layers["30B-A3B layer 2048"].flop == 2 * 2048 * (8 * 3 * 768 * 2048 + 128 * 2048)


@pytest.mark.parametrize("table", tuning.load("sm_90"))
def test_every_table_can_be_tuned(table: str) -> None:
    """`tritium tune` finds cases for each table by its name: those of the file that its operation is in."""
    assert len(find(table, smoke=False)) > 0
    assert len(find(table, smoke=True)) > 0


def test_floors_of_attention() -> None:
    """By hand: 64 query heads of 128, 2048 tokens, each of which sees itself and those before it."""
    case = find("attention", smoke=False)["GQA 64/8 d128 2048"]
    assert case.flop == 4 * 64 * 128 * (2048 * 2049 // 2)
    case = find("decode_attention", smoke=False)["30B-A3B 32/4 d128 batch 1 keys 1024"]
    assert case.reads == 2 * (2 * 1024 * 4 * 128 + 32 * 128)
    lengths = {
        name.split()[-1] for name in find("attention", smoke=False) if name.startswith("mobilellm 950m 24/6 d64")
    }
    assert {"2048", "32768"} <= lengths
    assert "30B-A3B 32/4 d128 batch 1 keys 131072" in find("decode_attention", smoke=False)
    case = find("attention_backward", smoke=False)["GQA 64/8 d128 2048"]
    assert case.flop == 10 * 64 * 128 * (2048 * 2049 // 2)
    assert case.reads == 2 * 2048 * 128 * (3 * 64 + 2 * 8) + 4 * 2048 * 64
    assert case.writes == 2 * 2048 * 128 * (64 + 2 * 8)
    chunk = find("attention", smoke=False)["qwen3 8B 32/8 d128 1024 of 8192 paged"]
    assert chunk.flop == 4 * 32 * 128 * sum(range(8192 - 1024 + 1, 8192 + 1))


def test_shapes_are_the_models() -> None:
    names = {f"{operation}: {case}" for operation in OPERATIONS for case in find(operation, smoke=False)}
    assert {
        "linear: qwen3 8B gate_up 1 x 24576 x 4096",
        "linear: qwen3 0.6B head 1 x 151936 x 1024",
        "rms_norm: 4096 x 1536",
        "swiglu: 1 x 12288",
        "qk_norm_rope: mobilellm 950m 24/6 d64 tokens 64",
        "experts: 30B-A3B layer 16",
        "models: qwen3 8B decode batch 1 context 128",
    } <= names
    assert projections("mobilellm 950m")["qkv"] == ((24 + 2 * 6) * 64, 1536)
    weights = 2 * (28 * 1024 * (4096 + 2048 + 3 * 3072) + 151936 * 1024)
    assert find("models", smoke=False)["qwen3 0.6B generate"].reads == weights
    assert len(MODELS) == 3


def test_the_sampled_definition_of_attention() -> None:
    """Is the definition of kernels/attention.py for the queries that it takes, the ends among them."""
    draw = Draw(CPU, 3)
    q, k, v = draw.normal(130, 4, 8), draw.normal(130, 2, 8), draw.normal(130, 2, 8)
    rows = sampled(130)
    assert {0, 1, 2, 129} <= set(rows)
    expected = attention_reference(q, k, v, [0, 130], 0.3)[rows]
    torch.testing.assert_close(attend(q[rows], k, v, torch.tensor(rows), 0.3), expected)
    across = [x.unsqueeze(0).transpose(1, 2) for x in (q, k, v)]
    peer = sdpa("MATH", lambda *args: tuple(across), True, 0.3)(q, k, v)()  # type: ignore[arg-type]
    torch.testing.assert_close(peer[rows], expected)


def test_flashinfer_gets_the_keys_in_its_own_pages() -> None:
    """The arguments of its batch decoding, read as it reads them, give what the definition gives."""

    class Wrapper:
        def __init__(self, work: Tensor, layout: str, use_tensor_cores: bool) -> None:
            assert (layout, use_tensor_cores) == ("HND", False)

        def plan(self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, *rest: Any, **named: Any) -> None:
            assert (heads, *rest) == (4, 2, 16, 16)
            self.pages = [indices[a:b].long() for a, b in pairwise(indptr.tolist())]
            self.last, self.scale = last.tolist(), named["sm_scale"]

        def run(self, q: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
            rows = []
            for row, (pages, last) in enumerate(zip(self.pages, self.last, strict=True)):
                length = (len(pages) - 1) * 16 + last
                k, v = (x[pages].transpose(1, 2).flatten(0, 1)[:length] for x in cache)  # [L, Hk, D]
                rows.append(attend(q[row : row + 1], k, v, torch.tensor([length - 1]), self.scale))
            return torch.cat(rows)

    case = find("decode_attention", smoke=True)["tiny 4/2 d16 batch 2 keys 300"]
    package = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", package)
        assert far(case, case.peers["flashinfer"], CPU, seed=1) is None


def test_misplaced_tokens() -> None:
    """Right is what the definition takes, and only the token whose part of the distribution holds the number."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50, generator=generator)
    uniform = torch.rand(64, generator=generator)
    for setting in ((1.0, 0, 1.0), (0.8, 0, 0.9), (0.7, 5, 0.9)):
        tokens = sample_reference(logits, *setting, uniform)
        assert misplaced(tokens, logits, *setting, uniform) is None
        for row in (0, 63):
            off = tokens.clone()
            off[row] = (off[row] + 1) % 50
            assert f"row {row}" in str(misplaced(off, logits, *setting, uniform))
    greedy = logits.argmax(-1)
    assert misplaced(greedy, logits, 0.0, 0, 1.0, None) is None
    assert "row 0" in str(misplaced(torch.zeros_like(greedy) + (greedy[0] == 0), logits, 0.0, 0, 1.0, None))
    assert "tokens are" in str(misplaced(greedy.int(), logits, 0.0, 0, 1.0, None))


def test_a_peer_may_round_but_not_differ() -> None:
    case = find("rms_norm", smoke=True)["3 x 64"]
    near = call(lambda x, weight: case.definition(x, weight) * (1 + 2e-5))
    assert far(case, near, CPU, seed=1) is None
    assert "differs from the definition by 0.01" in str(far(case, disturbed(case), CPU, seed=1))


def test_drawn_inputs_repeat_and_differ() -> None:
    a, b, other = (Draw(CPU, seed).normal(8) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert sorted(Draw(CPU, 1).permutation(9).tolist()) == list(range(9))
