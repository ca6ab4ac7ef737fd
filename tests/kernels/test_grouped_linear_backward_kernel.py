"""The gradients' grouped kernels: the rule over many routings, what they read and write, views, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.grouped_linear import grouped_linear_reference
from tritium.kernels.grouped_linear_backward import (
    grouped_linear_dweight,
    grouped_linear_dweight_reference,
    grouped_linear_dx,
    grouped_linear_dx_reference,
)
from tritium.kernels.routing import group

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of
from .test_grouped_linear_kernel import ARCHITECTURES, COUNTS, FULL, NAN, SHAPES, framed, grouped, route

pytestmark = pytest.mark.usefixtures("poisoned")
Routing = tuple[Tensor, Tensor, int]


def drawn(
    tokens: int, num_experts: int, k: int, width: int, depth: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x and weight."""
    weight = draw(num_experts, width, depth, dtype=dtype, seed=2, scale=max(width, 1) ** -0.5)
    return draw(tokens * k, width, dtype=dtype, scale=scale), draw(tokens, depth, dtype=dtype, seed=1), weight


def autograds(reference: Callable[..., Tensor], dy: Tensor, x: Tensor, weight: Tensor, *routing: Any) -> list[Tensor]:
    """Of x and weight, by autograd through a definition."""
    leaves = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    return list(torch.autograd.grad(reference(*leaves, *routing), leaves, dy))


def check(dy: Tensor, x: Tensor, weight: Tensor, routing: Routing, what: object = "") -> tuple[Tensor, Tensor]:
    """Holds both to the rule, truth being autograd's in float64; their results."""
    dx, dweight = grouped_linear_dx(dy, weight, *routing), grouped_linear_dweight(dy, x, *routing)
    truth = truth_of(lambda *args: autograds(grouped_linear_reference, *args), dy, x, weight, *routing)
    assert_rule(dx, grouped_linear_dx_reference(dy, weight, *routing), truth[0], f"dx {what}")
    assert_rule(dweight, grouped_linear_dweight_reference(dy, x, *routing), truth[1], f"dweight {what}")
    return dx, dweight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, num_experts, k = shape[:3]
    check(*drawn(*shape, dtype=dtype), grouped(route(tokens, num_experts, k, skew=0.3), num_experts), shape)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_rule_in_full(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, num_experts, k = shape[:3]
    for skew in (0.0, 0.1):
        routing = grouped(route(tokens, num_experts, k, skew), num_experts)
        check(*drawn(*shape, dtype=dtype), routing, (shape, skew))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e2])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(*drawn(3, 4, 2, 20, 40, dtype, scale), grouped(route(3, 4, 2), 4), scale)


def exact(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float16, most: int = 3) -> list[Tensor]:
    """Small whole numbers, whose sums are exact: any tile, and any definition, gives the same bits."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(-most, most + 1, shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


def expected_of(dy: Tensor, x: Tensor, weight: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """dx and dweight of placed assignments, in float64, without `order` and `starts`."""
    dy, x, weight, flat = dy.double(), x.double(), weight.double(), experts.flatten()
    dx = torch.einsum("an,ank->ak", dy, weight[flat]).unflatten(0, experts.shape).sum(1)
    outer = torch.einsum("an,ak->ank", dy, x.repeat_interleave(experts.shape[1], 0))
    return dx, torch.zeros_like(weight).index_add_(0, flat, outer)


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} of {max(counts)}")
def test_any_routing(counts: list[int]) -> None:
    """Every assignment has its part once, in its own expert and its own token; experts that have none are written."""
    flat = torch.arange(len(counts), device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    experts = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).to(DEVICE)].unsqueeze(1)
    dy, x, weight = exact([(len(flat), 6), (len(flat), 8), (len(counts), 6, 8)])
    routing, expected = grouped(experts, len(counts)), expected_of(dy, x, weight, experts)
    assert same_bits(grouped_linear_dx(dy, weight, *routing), expected[0].half())
    assert torch.equal(grouped_linear_dweight(dy, x, *routing), expected[1].half())


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
def test_rows_shared_by_assignments(k: int) -> None:
    """Assignment a is of token a // k, also where a token has all experts or the same one again."""
    dy, x, weight = exact([(6 * k, 5), (6, 8), (8, 5, 8)])
    for experts in (route(6, 8, k), torch.full((6, k), 3, device=DEVICE)):
        routing, expected = grouped(experts, 8), expected_of(dy, x, weight, experts)
        assert torch.equal(grouped_linear_dx(dy, weight, *routing), expected[0].half())
        assert torch.equal(grouped_linear_dweight(dy, x, *routing), expected[1].half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_it_rounds(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: a token's rows once and their sum once, dweight once."""
    dy, x, weight = exact([(80, 48), (40, 20), (3, 48, 20)], dtype, most=40)
    experts = route(40, 3, 2)
    routing, (_, dweight) = grouped(experts, 3), expected_of(dy, x, weight, experts)
    rows = torch.einsum("an,ank->ak", dy.double(), weight.double()[experts.flatten()]).to(dtype)
    dx = rows.double().unflatten(0, (40, 2)).sum(1).to(dtype)
    assert not torch.equal(dweight.to(dtype).double(), dweight)  # else this would prove nothing
    assert same_bits(grouped_linear_dx(dy, weight, *routing), dx)
    assert same_bits(grouped_linear_dweight(dy, x, *routing), dweight.to(dtype))


def test_accumulates_in_float32_and_not_in_tensorfloat() -> None:
    """4096 products of one, where bfloat16 stops at 256; 2^-12 beside one, which a 10-bit mantissa loses."""
    one = torch.zeros(4096, 1, dtype=torch.int64, device=DEVICE)
    ones = torch.ones(4096, 4, dtype=torch.bfloat16, device=DEVICE)
    assert grouped_linear_dweight(ones, ones, *grouped(one, 1)).eq(4096).all()
    assert grouped_linear_dx(ones.t()[:1], ones[None], *grouped(one[:1], 1)).eq(4096).all()
    near = torch.tensor([[1.0 + 2.0**-12], [1.0]], device=DEVICE)
    sign = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    assert grouped_linear_dweight(near, sign, *grouped(one[:2], 1)).item() == 2.0**-12
    assert grouped_linear_dx(near.t(), sign[None], *grouped(one[:1], 1)).item() == 2.0**-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance_of_dx(dtype: torch.dtype) -> None:
    """A token's bits: alone, among few and many, at another place, whatever the others are and wherever they go."""
    tokens, k = 70, 3
    dy, _, weight = drawn(tokens, 5, k, 72, 24, dtype)
    by_token, experts = dy.unflatten(0, (tokens, k)), route(tokens, 5, k, skew=0.4)

    def dx(chosen: Any, dys: Tensor = by_token, to: Tensor = experts) -> Tensor:
        return grouped_linear_dx(dys[chosen].flatten(0, 1), weight, *grouped(to[chosen], 5))

    whole = dx(slice(None))
    assert not whole.isnan().any()
    for token in range(0, tokens, 23):
        assert same_bits(dx([token])[0], whole[token])
    for few in (2, 17):
        assert same_bits(dx(slice(few)), whole[:few])
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert same_bits(dx(order), whole[order])
    beside, elsewhere = torch.full_like(by_token, NAN), route(tokens, 5, k, seed=11)
    for token in (0, 8, 69):
        beside[token], elsewhere[token] = by_token[token], experts[token]
    found = dx(slice(None), beside, elsewhere)
    assert all(same_bits(found[token], whole[token]) for token in (0, 8, 69))
    assert found[1].isnan().all()


def test_dweight_depends_on_its_experts_assignments_alone() -> None:
    """On neither how many others there are, nor what they hold."""
    dy, x, _ = drawn(40, 4, 1, 24, 40, torch.float32)
    experts = route(40, 4, 1)
    mine = (experts == 2).flatten()
    whole = grouped_linear_dweight(dy, x, *grouped(experts, 4))
    dy[~mine], x[~mine] = NAN, NAN
    found = grouped_linear_dweight(dy, x, *grouped(experts, 4))
    assert same_bits(found[2], whole[2])
    assert found[[0, 1, 3]].isnan().all()
    assert same_bits(grouped_linear_dweight(dy[mine], x[mine], *grouped(experts[mine], 4))[2], whole[2])


@pytest.mark.parametrize("none", [-1, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_placed_nowhere_has_no_part(none: int, dtype: torch.dtype) -> None:
    """Whatever its row of dy holds; a token that has nothing else gets zeros, and an expert too."""
    experts = (4 - route(12, 5, 2)).int()
    experts[1], experts[2, 0], experts[5, 1], experts[experts == 3] = none, none, none, none
    placed = (experts >= 0) & (experts < 5)
    dy, x, weight = exact([(24, 24), (12, 16), (5, 24, 16)], dtype)
    blank = dy.masked_fill(~placed.flatten()[:, None], 0)
    expected = expected_of(blank, x, weight, experts.where(placed, 0).long())
    dy[~placed.flatten()], x[~placed.any(1)], weight[3] = NAN, NAN, NAN
    routing = *group(experts, 5), 2
    dx, dweight = grouped_linear_dx(dy, weight, *routing), grouped_linear_dweight(dy, x, *routing)
    assert torch.equal(dx, expected[0].to(dtype))
    assert torch.equal(dweight, expected[1].to(dtype))
    assert not dx[1].any()
    assert not dweight[3].any()
    assert not grouped_linear_dx(dy[2:4], weight, *group(experts[1:2], 5), 2).any()
    apart = grouped_linear_dx(dy, weight, *group(experts.reshape(-1, 1), 5), 1)
    assert not apart[~placed.flatten()].any()


def configurations(arch: str, operation: str, itemsize: int) -> list[dict[str, Any]]:
    """The launch arguments of the rows that an operation and an item size can take."""

    def rows(table: str) -> list[dict[str, Any]]:
        found = tuning.load(arch)["grouped_linear_backward"][table]
        key = {"operation": operation, "itemsize": itemsize}
        fits = [
            row for row in found if all(key.get(name, value) == value for name, value in row.get("when", {}).items())
        ]
        last = next(index for index, row in enumerate(fits) if not set(row.get("when", {})) - set(key))
        return [row["use"] for row in fits[: last + 1]]

    (order,) = rows("order")
    return [{**order, **use} for use in rows("schedule")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_of_the_tables_gives_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of all sizes, groups of one block and of all: dx's order is one, and so is dweight's."""
    dy, x, weight = drawn(25, 3, 1, 136, 72, dtype)
    routing = grouped(route(25, 3, 1, skew=0.4), 3)
    expected = check(dy, x, weight, routing)
    arch, config = tuning.architecture(torch.device(DEVICE)), tuning.config
    for operation in ("dx", "dweight"):
        found = configurations(arch, operation, dtype.itemsize)
        assert len(found) >= (1 if dtype == torch.float32 else 2)
        for options in found:
            for variant in [options, options | {"GROUP": 1}] if operation == "dx" else [options]:
                monkeypatch.setattr(tuning, "config", lambda *_, variant=variant, **__: variant)
                if operation == "dx":
                    assert same_bits(grouped_linear_dx(dy, weight, *routing), expected[0]), variant
                else:
                    assert same_bits(grouped_linear_dweight(dy, x, *routing), expected[1]), variant
    monkeypatch.setattr(tuning, "config", config)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_keep_the_order_of_summation(arch: str) -> None:
    """One class of matrix instruction and one step for every number of tokens."""
    tables = tuning.load(arch)["grouped_linear_backward"]
    for row in tables["order"]:
        assert set(row.get("when", {})) <= {"operation", "itemsize"}
        assert arch != "gfx942" or row["use"]["matrix_instr_nonkdim"] == 16
    for operation, step in (("dx", "BLOCK_N"), ("dweight", "BLOCK_M")):
        for itemsize in (2, 4):
            found = configurations(arch, operation, itemsize)
            assert len({options[step] for options in found}) == 1
            if itemsize == 2 and arch in ("sm_90", "sm_100"):  # below, Triton would take mma.sync
                left = "BLOCK_K" if operation == "dx" else "BLOCK_N"
                assert all(options[left] >= 64 and options["num_warps"] in (4, 8) for options in found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "depth"), [(5, 72, 24), (5, 73, 21), (20, 8, 40)])
def test_nothing_leaks_from_beyond_the_edges(tokens: int, width: int, depth: int, dtype: torch.dtype) -> None:
    """Columns beyond N and K, rows beyond T, between experts and beyond the last are NaN; unread experts too."""
    dy, x, weight = drawn(tokens, 4, 2, width, depth, dtype)
    routing = grouped(route(tokens, 3, 2), 4)
    dx, dweight = check(dy, x, weight, routing)
    weight[3] = NAN
    assert same_bits(grouped_linear_dx(framed(dy), framed(weight), *routing), dx)
    assert same_bits(grouped_linear_dweight(framed(dy), framed(x), *routing), dweight)
    assert not dx.isnan().any()
    assert dweight[3].eq(0).all()


def test_writes_only_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    dy, x, weight = drawn(7, 5, 3, 24, 9, torch.float32)
    args = dy, x, weight, *grouped(route(7, 5, 3), 5)
    before = [tensor.clone() for tensor in args[:5]]
    rooms, zeroed = room_around_outputs(monkeypatch), []
    monkeypatch.setattr(
        Tensor, "new_zeros", lambda like, *shape: zeroed.append(like.new_empty(*shape).zero_()) or zeroed[-1]
    )
    dx, dweight = grouped_linear_dx(args[0], *args[2:]), grouped_linear_dweight(*args[:2], *args[3:])
    assert sum(room.numel() == dx.numel() + 128 for room in rooms) == 1
    assert sum(room.numel() == dweight.numel() + 128 for room in rooms) == 1
    assert sum(room.numel() == dx.numel() * 3 + 128 for room in rooms) == 1
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)
    assert all(torch.equal(a, b) for a, b in zip(args[:5], before, strict=True))
    # A tile ends with its expert. If it did not, whoever came last would win: on a GPU another one every time.
    dy, _, weight, order, starts, _ = args
    routing = order[: int(starts[2])].long()
    whole, alone = (grouped_linear_dx(dy, weight, order, ends, 1) for ends in (starts, starts.clamp(max=len(routing))))
    mine = torch.zeros(21, dtype=torch.bool, device=DEVICE)
    mine[routing] = True
    assert same_bits(alone[mine], whole[mine])
    assert not alone[~mine].any()
    assert 0 < mine.sum() < 21


def test_views_and_empty_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided rows and experts, turned rows, bases off 16 bytes; which of them may be read 16 bytes at a time."""
    asked: list[bool] = []
    config = tuning.config

    def recording(*args: Any, **key: Any) -> Any:
        asked.extend([key["aligned"]] if "aligned" in key else [])
        return config(*args, **key)

    monkeypatch.setattr(tuning, "config", recording)
    dy, x, weight = drawn(6, 4, 1, 24, 64, torch.bfloat16)
    order, starts, k = grouped(route(6, 4, 1), 4)
    dx, dweight = grouped_linear_dx(dy, weight, order, starts, k), grouped_linear_dweight(dy, x, order, starts, k)

    def within(tensor: Tensor, *shape: int, at: tuple[Any, ...]) -> Tensor:
        return draw(*shape, dtype=torch.bfloat16, seed=3)[at].copy_(tensor)

    few, columns = slice(24), slice(64)
    for other, aligned in (
        (within(dy, 12, 80, at=(slice(0, 12, 2), few)), True),
        (within(dy, 6, 80, at=(slice(6), slice(3, 27))), False),
        (within(dy, 6, 26, at=(slice(6), few)), False),
        (dy.t().contiguous().t(), True),
    ):
        assert same_bits(grouped_linear_dx(other, weight, order, starts, k), dx)
        assert same_bits(grouped_linear_dweight(other, x, order, starts, k), dweight)
        assert asked[-2:] == [aligned, aligned]
    for other, aligned in (
        (within(weight, 8, 60, 136, at=(slice(0, 8, 2), slice(3, 27), columns)), True),
        (within(weight, 4, 24, 136, at=(slice(4), few, slice(1, 65))), False),
        (within(weight, 4, 24, 68, at=(slice(4), few, columns)), False),
    ):
        assert same_bits(grouped_linear_dx(dy, other, order, starts, k), dx)
        assert asked[-1] == aligned
    for other, aligned in (
        (within(x, 6, 160, at=(slice(6), slice(8, 72))), True),
        (within(x, 6, 160, at=(slice(6), slice(1, 65))), False),
        (x.t().contiguous().t(), True),
    ):
        assert same_bits(grouped_linear_dweight(dy, other, order, starts, k), dweight)
        assert asked[-1] == aligned
    expanded = dy[:1].expand(6, 24)
    assert same_bits(
        grouped_linear_dx(expanded, weight, order, starts, k),
        grouped_linear_dx(expanded.contiguous(), weight, order, starts, k),
    )
    strided = torch.stack([order, order], 1)[:, 0], torch.stack([starts, starts], 1)[:, 0]
    assert same_bits(grouped_linear_dx(dy, weight, *strided, k), dx)
    assert same_bits(grouped_linear_dweight(dy, x, *strided, k), dweight)

    none, zeros = order[:0], torch.zeros_like(starts)
    for shared in (1, 2):
        assert grouped_linear_dx(dy[:0], weight, none, zeros, shared).shape == (0, 64)
        nothing = grouped_linear_dweight(dy[:0], x[:0], none, zeros, shared)
        assert nothing.shape == weight.shape
        assert not nothing.any()
    assert grouped_linear_dx(dy, weight[..., :0], order, starts, k).shape == (6, 0)
    assert not grouped_linear_dx(dy[:, :0], weight[:, :0], order, starts, k).any()
    assert grouped_linear_dweight(dy[:, :0], x, order, starts, k).shape == (4, 0, 64)
    assert grouped_linear_dweight(dy[:0], x[:0], none, zeros[:1], 1).shape == (0, 24, 64)


def test_beyond_int32_offsets() -> None:
    """Experts and rows of one, rows of dy and of x: the last more than 2^31 elements from the first, by strides that
    are less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    dy, x, weight = drawn(3, 4, 1, 6, 32, torch.float16)
    routing = grouped(torch.tensor([[3], [0], [2]], device=DEVICE), 4)
    dx, dweight = grouped_linear_dx(dy, weight, *routing), grouped_linear_dweight(dy, x, *routing)
    storage = torch.empty(5 * apart + 256, dtype=torch.float16, device=DEVICE)
    for strides in ((apart, 32, 1), (32, apart, 1)):
        far = storage.as_strided((4, 6, 32), strides).copy_(weight)
        assert same_bits(grouped_linear_dx(dy, far, *routing), dx)
    far = storage.as_strided((3, 6), (apart, 1)).copy_(dy)
    assert same_bits(grouped_linear_dx(far, weight, *routing), dx)
    assert same_bits(grouped_linear_dweight(far, x, *routing), dweight)
    far = storage.as_strided((3, 32), (apart, 1)).copy_(x)
    assert same_bits(grouped_linear_dweight(dy, far, *routing), dweight)


@needs_gpu
def test_outputs_beyond_int32_offsets() -> None:
    """More than 2^31 elements of dweight, and of the rows that are summed to dx."""
    experts = torch.full((3, 1), 2, device=DEVICE)
    dy, x, _ = drawn(3, 0, 1, 33000, 22000, torch.bfloat16)
    whole = grouped_linear_dweight(dy, x, *grouped(experts, 3))
    assert same_bits(whole[2], grouped_linear_dweight(dy, x, *grouped(experts - 2, 1))[0])
    del whole
    dy, _, weight = drawn(66000, 1, 1, 16, 33000, torch.bfloat16)
    one = torch.zeros(66000, 1, dtype=torch.int64, device=DEVICE)
    dx = grouped_linear_dx(dy, weight, *grouped(one, 1))
    assert same_bits(dx[-70:], grouped_linear_dx(dy[-70:], weight, *grouped(one[-70:], 1)))


@needs_gpu
@pytest.mark.parametrize("tokens", [4, 300, 4096])
def test_no_race_and_no_wait(tokens: int) -> None:
    """The same bits a hundred times, and nothing is read on the host."""
    dy, x, weight = drawn(tokens, 64, 8, 768, 1024, torch.bfloat16)
    routing = grouped(route(tokens, 64, 8), 64)

    def both() -> tuple[Tensor, Tensor]:
        return grouped_linear_dx(dy, weight, *routing), grouped_linear_dweight(dy, x, *routing)

    first = both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [both() for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(a, b) for pair in found for a, b in zip(pair, first, strict=True))


def test_refuses_what_does_not_fit() -> None:
    dy, x, weight = drawn(2, 5, 3, 6, 16, torch.float32)
    order, starts, k = grouped(route(2, 5, 3), 5)
    cases: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
        (lambda: grouped_linear_dx(dy.double(), weight.double(), order, starts, k), TypeError, "float64"),
        (
            lambda: grouped_linear_dx(dy[:, :5], weight, order, starts, k),
            ValueError,
            r"dy must be \[A, N\] and weight \[E, N, K\], got \[6, 5\] and \[5, 6, 16\]",
        ),
        (lambda: grouped_linear_dx(dy, weight[0], order, starts, k), ValueError, r"got \[6, 6\] and \[6, 16\]"),
        (lambda: grouped_linear_dx(dy, weight.half(), order, starts, k), ValueError, "weight must be torch.float32"),
        (lambda: grouped_linear_dx(dy, weight, order, starts, 4), ValueError, "k must divide.*got 4 and 6 rows"),
        (lambda: grouped_linear_dx(dy, weight, order, starts, 0), ValueError, "k must divide.*got 0"),
        (lambda: grouped_linear_dx(dy, weight, order[:5], starts, k), ValueError, r"order must be \[6\].*got \[5\]"),
        (lambda: grouped_linear_dx(dy, weight, order, starts[1:], k), ValueError, r"starts must be \[6\].*got \[5\]"),
        (lambda: grouped_linear_dx(dy, weight.mT.contiguous().mT, order, starts, k), ValueError, "contiguous"),
        (lambda: grouped_linear_dx(dy, weight[:0], order, starts[:1], k), ValueError, "6 assignments need an expert"),
        (lambda: grouped_linear_dweight(dy, x.double(), order, starts, k), ValueError, "x must be torch.float32"),
        (
            lambda: grouped_linear_dweight(dy, x, order, starts, 2),
            ValueError,
            r"dy must be \[T \* k, N\] and x \[T, K\], k at least 1, got \[6, 6\], \[2, 16\] and 2",
        ),
        (lambda: grouped_linear_dweight(dy, x[0], order, starts, k), ValueError, r"got \[6, 6\], \[16\] and 3"),
        (lambda: grouped_linear_dweight(dy, x, order.long(), starts, k), ValueError, "order must be.*int64"),
        (lambda: grouped_linear_dweight(dy, x, order, starts[None], k), ValueError, r"starts must be.*\[1, 6\]"),
        (lambda: grouped_linear_dweight(dy, x, order, starts[:0], k), ValueError, r"starts must be.*got \[0\]"),
        (lambda: grouped_linear_dweight(dy, x, order, starts[:1], k), ValueError, "6 assignments need an expert"),
        (lambda: grouped_linear_dweight(dy, x.requires_grad_(), order, starts, k), RuntimeError, "no gradients"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
