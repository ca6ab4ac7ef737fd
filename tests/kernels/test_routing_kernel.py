"""The routing kernels: the choice and its ties exactly, weights by the rule, the sorted assignments, any launch."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from tritium.kernels import routing, tuning
from tritium.kernels.routing import group, group_reference, route, route_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
INF, NAN = math.inf, math.nan
WIDTHS = [(1, 1), (2, 2), (3, 1), (60, 4), (64, 6), (128, 8), (130, 9)]  # experts, and how many are chosen
MANY = 60 if DEVICE == "cuda" else 25
hypothetical = settings(
    deadline=None,
    max_examples=MANY,
    phases=[Phase.generate],  # to shrink an example takes minutes in the interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 60000.0, -60000.0]), st.floats(-30, 30, width=16)
)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Other launches than the tables', which may not matter: many tokens a program, and blocks of eight ids."""
    found = {"ROWS": 8, "BLOCK": 8, "num_warps": 4}

    def config(kernel: str, device: torch.device, operation: str, **key: Any) -> dict[str, int]:
        return {name: value for name, value in found.items() if name != ("BLOCK" if operation == "route" else "ROWS")}

    monkeypatch.setattr(tuning, "config", config)
    return found


def check(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The choice is the definition's, in float64 as at the dtype; NaN are where its are; numbers obey the rule."""
    experts, weights = route(logits, k, renormalise)
    expected, reference = route_reference(logits, k, renormalise)
    truth = truth_of(route_reference, logits, k, renormalise)
    assert torch.equal(experts, expected)
    assert torch.equal(experts, truth[0])
    assert torch.equal(weights.isnan(), truth[1].isnan())
    assert_rule(weights, reference, truth[1], f"{list(logits.shape)} {k} {renormalise}")
    return experts, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("count", "k"), WIDTHS)
def test_rule(count: int, k: int, renormalise: bool, dtype: torch.dtype, options: dict[str, int]) -> None:
    """Nine tokens: a whole program and one more."""
    check(draw(9, count, dtype=dtype, seed=count, scale=2.0), k, renormalise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
def test_flat_and_steep_rows(scale: float, dtype: torch.dtype, options: dict[str, int]) -> None:
    """Weights that are nearly all one number, and weights that underflow."""
    logits = draw(8, 128, dtype=dtype, scale=scale)
    for renormalise in (True, False):
        check(logits, 8, renormalise)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "k"), [(128, 8), (60, 4), (256, 8), (257, 8), (512, 10), (1024, 8), (1000, 1000)])
def test_rule_in_full(count: int, k: int, dtype: torch.dtype) -> None:
    for tokens in (1, 16, 511, 513, 2048):
        for renormalise in (True, False):
            check(draw(tokens, count, dtype=dtype, seed=tokens, scale=2.0), k, renormalise)


@hypothetical
@given(st.data(), st.sampled_from([1, 5, 8, 19]), st.booleans(), st.sampled_from(DTYPES))
def test_any_row(options: dict[str, int], data: st.DataObject, count: int, renormalise: bool, dtype: Any) -> None:
    """Infinities, NaN, both zeros, ties: k distinct experts that exist, the definition's to the last."""
    rows = data.draw(st.lists(st.lists(LOGITS, min_size=count, max_size=count), min_size=1, max_size=4))
    k = data.draw(st.sampled_from([1, min(3, count), count]))  # few: each is compiled where there is a GPU
    experts, _ = check(torch.tensor(rows, device=DEVICE).to(dtype), k, renormalise)
    assert all(len(set(row)) == k and set(row) <= set(range(count)) for row in experts.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_what_is_not_a_number(dtype: torch.dtype) -> None:
    """By hand, at the tables' own launch: also beside the padding of five experts to eight."""
    rows = [[2, 5, 2, 5, 1], [0, -0.0, 0, -0.0, -1], [-INF] * 5, [NAN] * 5, [1, NAN, 3, -INF, 2], [0, INF, 0, INF, INF]]
    experts, weights = route(torch.tensor(rows, device=DEVICE).to(dtype), 4, True)
    assert experts.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [2, 4, 0, 1], [1, 3, 4, 0]]
    expected = torch.tensor([1, 1, math.exp(-3), math.exp(-3)], dtype=torch.float64) / (2 + 2 * math.exp(-3))
    assert weights[0].tolist() == pytest.approx(expected.tolist(), rel=8 * torch.finfo(dtype).eps)
    assert weights[1].tolist() == [0.25] * 4
    assert weights[2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_batch_invariance(renormalise: bool, dtype: torch.dtype, options: dict[str, int]) -> None:
    """A token's bits: alone, among 1 to 17, under any launch, at another place, beside NaN."""
    logits = draw(17, 60, dtype=dtype, scale=2.0)
    whole = route(logits, 4, renormalise)
    for tokens in range(1, 18, 1 if DEVICE == "cuda" else 4):
        got = route(logits[:tokens], 4, renormalise)
        assert all(same_bits(mine, other[:tokens]) for mine, other in zip(got, whole, strict=True))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for rows, warps in ((1, 1), (4, 4), (32, 2)):
        options.update(ROWS=rows, num_warps=warps)
        got = route(logits[order], 4, renormalise)
        assert all(same_bits(mine, other[order]) for mine, other in zip(got, whole, strict=True))
    poisoned = torch.full_like(logits, NAN)
    poisoned[8] = logits[8]
    got = route(poisoned, 4, renormalise)
    assert all(same_bits(mine[8], other[8]) for mine, other in zip(got, whole, strict=True))


def test_every_row_of_the_tables_routes_alike() -> None:
    """Few tokens, more than 512, more than 256 experts."""
    logits = draw(1, 257, dtype=torch.float32)
    check(logits, 3, False)
    token = draw(1, 5, dtype=torch.float32)
    whole = route(token.expand(513, 5), 2, True)
    assert all(same_bits(many, one.expand(513, 2)) for many, one in zip(whole, route(token, 2, True), strict=True))


def test_views_and_empty_input(options: dict[str, int]) -> None:
    storage = draw(6, 40, dtype=torch.float32)
    for logits in (storage[:, 3:20], storage[::2, :16], storage[:5, :7].t()):
        got, expected = route(logits, 3, True), route(logits.contiguous(), 3, True)
        assert all(same_bits(a, b) and a.is_contiguous() for a, b in zip(got, expected, strict=True))
        check(logits, 3, True)
    experts, weights = route(storage[:0], 3, True)
    assert (experts.shape, experts.dtype, weights.shape) == ((0, 3), torch.int32, (0, 3))


def test_rows_beyond_int32_offsets(options: dict[str, int]) -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    logits = torch.empty(2 * apart + 16, dtype=torch.float16, device=DEVICE).as_strided((3, 16), (apart, 1))
    logits.copy_(draw(3, 16, dtype=torch.float16))
    got, expected = route(logits, 3, False), route(logits.contiguous(), 3, False)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_nothing_is_written_beside_the_weights(monkeypatch: pytest.MonkeyPatch, options: dict[str, int]) -> None:
    rooms = room_around_outputs(monkeypatch)
    assert route(draw(9, 20, dtype=torch.float32), 5, True)[1].le(1).all()
    (room,) = rooms
    assert room[:64].eq(7).all()
    assert room[-64:].eq(7).all()


# Grouping.


def ids(tokens: int, k: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (tokens, k), generator=generator, dtype=torch.int32).to(DEVICE)


def check_group(experts: Tensor, count: int) -> None:
    order, starts = group(experts, count)
    assert order.dtype == starts.dtype == torch.int32
    expected = group_reference(experts, count)
    assert torch.equal(order, expected[0])
    assert torch.equal(starts, expected[1])


@hypothetical
@given(st.data(), st.integers(1, 6), st.integers(1, 3))
def test_any_assignments(options: dict[str, int], data: st.DataObject, count: int, k: int) -> None:
    """Experts without tokens, one expert with all, none at all, ids of no expert; several blocks, and whole ones."""
    rows = st.lists(st.integers(-2, count + 1), min_size=k, max_size=k)
    experts = data.draw(st.lists(rows, max_size=12))
    check_group(torch.tensor(experts, dtype=torch.int32, device=DEVICE).reshape(-1, k), count)


@pytest.mark.parametrize("assignments", [1, 7, 8, 9, 15, 16, 17, 32])
def test_around_the_end_of_a_block(assignments: int, options: dict[str, int]) -> None:
    check_group(ids(assignments, 1, 3), 3)
    check_group(torch.full((assignments, 1), 1, dtype=torch.int32, device=DEVICE), 3)


def test_the_blocks_of_the_tables() -> None:
    """A decode step, and around each row's bounds; 65536 assignments."""
    check_group(ids(1, 8, 16), 16)
    for tokens in (512, 513, 4096, 4097, 65536):
        check_group(ids(tokens, 1, 3, seed=tokens), 3)


@pytest.mark.parametrize("none", [-1, 3, -(2**31), 2**31 - 1])
def test_ids_of_no_expert(none: int, options: dict[str, int]) -> None:
    """Among others, first, last, more than two blocks of them, nothing else: every index is one of an assignment."""
    few, padding = ids(7, 2, 3), torch.full((11, 2), none, dtype=torch.int32, device=DEVICE)
    for experts in (torch.cat([few, padding]), torch.cat([padding, few]), padding, padding[:1]):
        check_group(experts, 3)
    order, starts = group(torch.cat([few, padding, few]), 3)
    assert starts[-1] == 28
    assert order[28:].eq(0).all()
    assert set(order[:28].tolist()) == {*range(14), *range(36, 50)}


def test_one_kernel_for_most_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other constexpr is compiled anew, while a server waits."""
    seen: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(routing, "launch", lambda *args, **options: seen.add(tuple(sorted(options.items()))))
    for tokens in range(1, 700):
        group(torch.empty(tokens, 8, dtype=torch.int32, device=DEVICE), 128)
    assert 1 < len(seen) <= 3


@needs_gpu
@pytest.mark.parametrize("count", [1, 8, 60, 128, 256, 1024])
def test_group_in_full(count: int) -> None:
    for tokens in (1, 3, 16, 63, 64, 65, 512, 2048, 8192, 32768):
        check_group(ids(tokens, 8, count, seed=tokens), count)
        check_group(torch.full((tokens, 8), count - 1, dtype=torch.int32, device=DEVICE), count)


def test_grouped_assignments_of_the_router() -> None:
    """From end to end: each expert's tokens are those that chose it."""
    experts, _ = route(draw(6, 5, dtype=torch.float32), 2, True)
    order, starts = group(experts, 5)
    for expert in range(5):
        tokens = (order[starts[expert] : starts[expert + 1]] // 2).tolist()
        assert tokens == (experts == expert).any(-1).nonzero().flatten().tolist()


def test_views_and_no_assignments() -> None:
    experts = ids(4, 6, 3)
    for view in (experts[:, ::2], experts.t(), experts[1:3]):
        check_group(view, 3)
    order, starts = group(experts[:0], 3)
    assert (order.shape, starts.tolist()) == ((0,), [0, 0, 0, 0])


@needs_gpu
def test_no_race() -> None:
    logits = draw(2048, 128, dtype=torch.bfloat16)
    first = route(logits, 8, True)
    sorted_first = group(first[0], 128)
    for _ in range(100):
        again = route(logits, 8, True)
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True))
        assert all(same_bits(a, b) for a, b in zip(group(again[0], 128), sorted_first, strict=True))


def test_refuses_what_does_not_fit() -> None:
    logits = draw(2, 8, dtype=torch.float32)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k must be 1 to 8, the number of experts, got {k}"):
            route(logits, k, True)
    for bad in (logits[0], draw(1, 1025, dtype=torch.float32), logits[:, :0]):
        with pytest.raises(ValueError, match="1 to 1024 experts"):
            route(bad, 1, True)
    with pytest.raises(TypeError, match="float64"):
        route(logits.double(), 2, True)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        route(logits.clone().requires_grad_(), 2, True)
    with pytest.raises(TypeError, match=r"torch\.int32, as route gives them, got torch\.int64"):
        group(ids(2, 2, 3).long(), 3)
    with pytest.raises(ValueError, match=r"experts must be \[T, k\], at most 1073741824 in all, got \[4\]"):
        group(ids(2, 2, 3).flatten(), 3)
    with pytest.raises(ValueError, match="num_experts must be 1 or more, got 0"):
        group(ids(2, 2, 3), 0)
    if not torch.cuda.is_available():
        return
    with pytest.raises(RuntimeError, match="a Triton kernel cannot run here"):
        group(ids(2, 2, 3).cpu(), 3)


def test_registered() -> None:
    logits = draw(3, 6, dtype=torch.float32)
    torch.library.opcheck(torch.ops.tritium.route, (logits, 2, True))
    torch.library.opcheck(torch.ops.tritium.group, (ids(3, 2, 6), 6))

    def both(x: Tensor) -> tuple[Tensor, ...]:
        experts, weights = torch.ops.tritium.route(x, 2, True)
        return experts, weights, *torch.ops.tritium.group(experts, 6)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(logits)
    experts, weights = route(logits, 2, True)
    assert all(same_bits(a, b) for a, b in zip(compiled, (experts, weights, *group(experts, 6)), strict=True))
