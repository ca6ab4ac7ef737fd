"""The grouped kernels: the rule over many routings, batch invariance, what they read and write, views, refusals."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.grouped_linear import (
    grouped_linear,
    grouped_linear_reference,
    grouped_swiglu,
    grouped_swiglu_reference,
)
from tritium.kernels.swiglu import swiglu

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]
FORMS = {
    "plain": (grouped_linear, grouped_linear_reference),
    "swiglu": (grouped_swiglu, grouped_swiglu_reference),
}

# Tokens, experts, k, width, depth: one off every block, experts that are no power of two, depths with a tail of each
# kind (8 elements, odd), more tokens on an expert than a tile has.
SHAPES = [
    (1, 1, 1, 1, 16),
    (1, 5, 2, 72, 56),
    (3, 60, 4, 56, 72),
    (2, 128, 8, 16, 64),
    (7, 5, 5, 65, 129),
    (34, 3, 1, 20, 136),
    (40, 4, 3, 16, 72),
]
FULL = [  # a layer's two products in Qwen3-30B-A3B, small widths, odd ones
    (tokens, 128, 8, width, depth) for tokens in (1, 16, 300, 4096) for width, depth in ((768, 2048), (2048, 768))
]
FULL += [(300, 60, 4, 704, 1024), (300, 60, 4, 703, 1025), (4096, 5, 2, 72, 568), (1000, 1, 1, 1024, 512)]


def route(tokens: int, num_experts: int, k: int, skew: float = 0.0, seed: int = 9) -> Tensor:
    """experts [T, k]: k different ones a token, of which the first are likelier by `skew` each."""
    likelier = torch.arange(num_experts, device=DEVICE) * -skew
    noise = draw(tokens, num_experts, dtype=torch.float32, seed=seed)
    return (noise + likelier).argsort(dim=1, descending=True)[:, :k]


def grouped(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, int]:
    """order, starts and k of experts [T, k]."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    starts = torch.searchsorted(flat[order], torch.arange(num_experts + 1, device=DEVICE))
    return order.to(torch.int32), starts.to(torch.int32), experts.shape[1]


def drawn(
    form: str, tokens: int, num_experts: int, width: int, depth: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x, and weights with which outputs are of about `scale`."""
    rows = 2 * width if form == "swiglu" else width
    x = draw(tokens, depth, dtype=dtype, scale=scale)
    return x, draw(num_experts, rows, depth, dtype=dtype, seed=1, scale=max(depth, 1) ** -0.5)


def check(form: str, x: Tensor, weight: Tensor, experts: Tensor, what: object = "") -> Tensor:
    """Holds a form to the rule; its result."""
    run, reference = FORMS[form]
    args = x, weight, *grouped(experts, weight.shape[0])
    out = run(*args)
    assert_rule(out, reference(*args), truth_of(reference, *args), f"{form} {what}")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    tokens, num_experts, k, width, depth = shape
    experts = route(tokens, num_experts, k, skew=0.3)
    check(form, *drawn(form, tokens, num_experts, width, depth, dtype), experts, shape)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_rule_in_full(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    tokens, num_experts, k, width, depth = shape
    for skew in (0.0, 0.1):
        experts = route(tokens, num_experts, k, skew)
        check(form, *drawn(form, tokens, num_experts, width, depth, dtype), experts, (shape, skew))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Gates whose exponential overflows to infinity or vanishes."""
    for form in FORMS:
        check(form, *drawn(form, 3, 4, 20, 40, dtype, scale), route(3, 4, 2), scale)


def exact(tokens: int, num_experts: int, width: int, depth: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """Small whole numbers, whose sums are exact: any tile, and any definition, gives the same bits."""
    generator = torch.Generator().manual_seed(5)
    shapes = (tokens, depth), (num_experts, width, depth)
    return [torch.randint(-3, 4, shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]


# How many assignments each expert has: none, one, a block and those beside it, the most tiles that a count can make.
COUNTS = [
    [0, 0, 5],
    [5, 0, 0],
    [0, 3, 0, 0, 1, 0],
    [1] * 17,
    [17, 17, 17, 1],
    [16, 32, 15, 0, 31],
    [0] * 40 + [33],
    [33, *[0] * 63],
    [3] * 5 + [1] * 60,
    [2, 66],
    [65, 1, 129],
]


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} of {max(counts)}")
def test_any_routing(counts: list[int]) -> None:
    """Every assignment is computed once and by its own expert, in the order in which tokens came."""
    flat = torch.arange(len(counts), device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    experts = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1)).to(DEVICE)].unsqueeze(1)
    x, weight = exact(len(flat), len(counts), 6, 8)
    expected = torch.einsum("th,tnh->tn", x.double(), weight.double()[experts[:, 0]]).half()
    assert same_bits(grouped_linear(x, weight, *grouped(experts, len(counts))), expected)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_rows_shared_by_assignments(k: int) -> None:
    """Assignment a reads row a // k, also where a token has all experts or the same one again."""
    x, weight = exact(6, 7, 5, 8)
    for experts in (route(6, 7, k), torch.full((6, k), 3, device=DEVICE)):
        rows = x.double().repeat_interleave(k, dim=0)
        expected = torch.einsum("ah,anh->an", rows, weight.double()[experts.flatten()]).half()
        assert same_bits(grouped_linear(x, weight, *grouped(experts, 7)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_it_rounds(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: a product rounds once."""
    x, weight = exact(9, 3, 20, 48, dtype)
    x, weight = x * 43, weight * 41
    experts = route(9, 3, 1)
    sums = torch.einsum("th,tnh->tn", x.double(), weight.double()[experts[:, 0]])
    assert not torch.equal(sums.to(dtype).double(), sums)  # else this would prove nothing
    assert same_bits(grouped_linear(x, weight, *grouped(experts, 3)), sums.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_is_the_projection_and_then_the_activation(dtype: torch.dtype) -> None:
    """Bit for bit the two kernels one after the other: fusing is only faster."""
    x, weight = drawn("swiglu", 9, 4, 20, 72, dtype)
    routing = grouped(route(9, 4, 2), 4)
    assert same_bits(grouped_swiglu(x, weight, *routing), swiglu(grouped_linear(x, weight, *routing)))


def test_accumulates_in_float32_and_not_in_tensorfloat() -> None:
    """4096 products of one, where bfloat16 stops at 256; 2^-12 beside one, which a 10-bit mantissa loses."""
    routing = grouped(torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 1)
    ones = torch.ones(1, 2, 4096, dtype=torch.bfloat16, device=DEVICE)
    assert grouped_linear(ones[0, :1], ones, *routing).tolist() == [[4096.0, 4096.0]]
    x, weight = torch.tensor([[1.0 + 2.0**-12, 1.0]], device=DEVICE), torch.tensor([[[1.0, -1.0]]], device=DEVICE)
    assert grouped_linear(x, weight, *routing).item() == 2.0**-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_batch_invariance(form: str, dtype: torch.dtype) -> None:
    """A token's bits: alone, among few and many, at another place, whatever the others are and wherever they go."""
    run = FORMS[form][0]
    tokens, k = 70, 2
    x, weight = drawn(form, tokens, 5, 24, 72, dtype)
    experts = route(tokens, 5, k, skew=0.4)

    def by_token(chosen: Any) -> Tensor:
        return run(x[chosen], weight, *grouped(experts[chosen], 5)).unflatten(0, (-1, k))

    whole = by_token(slice(None))
    assert not whole.isnan().any()
    for token in range(0, tokens, 23):
        assert same_bits(by_token([token])[0], whole[token])
    for few in (2, 17):
        assert same_bits(by_token(slice(few)), whole[:few])
    assert same_bits(by_token(slice(3, 36)), whole[3:36])
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert same_bits(by_token(order), whole[order])
    beside, elsewhere = torch.full_like(x, NAN), route(tokens, 5, k, seed=11)
    for token in (0, 8, 69):
        beside[token], elsewhere[token] = x[token], experts[token]
    for routing in (elsewhere, experts[token].expand_as(experts)):
        found = run(beside, weight, *grouped(routing, 5)).unflatten(0, (-1, k))
        assert same_bits(found[token], whole[token])
        assert found[1].isnan().all()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "depth"), [(768, 2048), (2048, 768), (703, 1025)])
def test_batch_invariance_in_full(width: int, depth: int, form: str, dtype: torch.dtype) -> None:
    """Every bucket of the tables at its real size."""
    run = FORMS[form][0]
    x, weight = drawn(form, 8192, 64, width, depth, dtype)
    experts = route(8192, 64, 8, skew=0.02)
    whole = run(x, weight, *grouped(experts, 64))
    for tokens in (1, 2, 16, 17, 64, 200, 256, 512, 1024, 2048, 4096):
        assert same_bits(run(x[:tokens], weight, *grouped(experts[:tokens], 64)), whole[: 8 * tokens])


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 33, 512, 4096])
def test_no_race_and_no_wait_for_the_device(tokens: int, form: str) -> None:
    run = FORMS[form][0]
    x, weight = drawn(form, tokens, 64, 768, 1024, torch.bfloat16)
    routing = grouped(route(tokens, 64, 8), 64)
    first = run(x, weight, *routing)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [run(x, weight, *routing) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(out, first) for out in found)


def configurations(arch: str, itemsize: int) -> Iterator[dict[str, Any]]:
    """The launch arguments of the rows that an item size can take."""
    tables = tuning.load(arch)["grouped_linear"]
    order = next(row["use"] for row in tables["order"] if row.get("when", {}).get("itemsize", itemsize) == itemsize)
    for row in tables["schedule"]:
        if row.get("when", {}).get("itemsize", 2) == itemsize:
            yield {**order, **row["use"]}


@pytest.mark.parametrize(("form", "dtype"), [*((form, torch.bfloat16) for form in FORMS), ("swiglu", torch.float32)])
def test_every_row_of_the_tables_gives_the_same_bits(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that own a part of their rows, tiles of all sizes, groups of one block, of two of three, of all."""
    run = FORMS[form][0]
    x, weight = drawn(form, 25, 3, 40, 136, dtype)
    routing = grouped(route(25, 3, 2, skew=0.4), 3)
    expected = run(x, weight, *routing)
    seen = set()
    for options in configurations(tuning.architecture(torch.device(DEVICE)), dtype.itemsize):
        for group in (1, 2) if options["ROWS"] < 64 else (8,):
            variant = options | {"GROUP": group}
            monkeypatch.setattr(tuning, "config", lambda *_, variant=variant, **__: variant)
            assert same_bits(run(x, weight, *routing), expected), variant
            seen.add(variant["BLOCK_M"])
    assert seen >= ({16, 64, 128} if dtype == torch.bfloat16 else {16, 32})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_keep_the_order_of_summation(arch: str) -> None:
    """One class of matrix instruction and one BLOCK_K for every number of tokens."""
    tables = tuning.load(arch)["grouped_linear"]
    for row in tables["order"]:
        assert set(row.get("when", {})) <= {"itemsize", "width"}
        assert "BLOCK_K" in row["use"]
        assert arch != "gfx942" or row["use"]["matrix_instr_nonkdim"] == 16
    for row in tables["schedule"]:
        assert not set(row["use"]) & {"BLOCK_K", "matrix_instr_nonkdim"}
    for itemsize in (2, 4):
        found = list(configurations(arch, itemsize))
        assert len(found) >= 2
        for options in found:
            assert options["ROWS"] <= options["BLOCK_N"]
            if itemsize == 2 and arch in ("sm_90", "sm_100"):  # below, Triton would take mma.sync
                assert options["BLOCK_N"] >= 64
                assert options["num_warps"] in (4, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_reads_only_experts_with_tokens(form: str, dtype: torch.dtype) -> None:
    """The floor of a decoding step counts nothing else. NaN in all other experts, not a product with zero."""
    run = FORMS[form][0]
    x, weight = drawn(form, 2, 20, 24, 72, dtype)
    experts = torch.tensor([[3, 19, 0], [19, 7, 3]], device=DEVICE)
    expected = run(x, weight, *grouped(experts, 20))
    touched = experts.unique()
    others = torch.full_like(weight, NAN)
    others[touched] = weight[touched]
    assert same_bits(run(x, others, *grouped(experts, 20)), expected)
    assert not expected.isnan().any()


def framed(tensor: Tensor, rows: int = 7) -> Tensor:
    """The tensor amid NaN: beyond its columns, `rows` rows beyond each matrix of it, as much beyond the last."""
    *count, height, width = tensor.shape
    shape = (*(size + 1 for size in count), height + rows, (width + 87) // 8 * 8)
    frame = torch.full(shape, NAN, dtype=tensor.dtype, device=DEVICE)
    view = frame[(*(slice(size) for size in count), slice(height), slice(width))]
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "depth"), [(5, 72), (5, 73), (40, 8)])
def test_nothing_leaks_from_beyond_the_edges(tokens: int, depth: int, form: str, dtype: torch.dtype) -> None:
    """Columns beyond K, rows beyond T, rows between experts and experts beyond the last are NaN."""
    run = FORMS[form][0]
    x, weight = drawn(form, tokens, 3, 20, depth, dtype)
    routing = grouped(route(tokens, 3, 2), 3)
    expected = run(x, weight, *routing)
    assert not expected.isnan().any()
    assert same_bits(run(framed(x), framed(weight), *routing), expected)


@pytest.mark.parametrize("form", FORMS)
def test_writes_only_its_outputs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(form, 7, 5, 9, 24, torch.float32)
    args = x, weight, *grouped(route(7, 5, 3), 5)
    before = [tensor.clone() for tensor in args[:4]]
    rooms = room_around_outputs(monkeypatch)
    out = FORMS[form][0](*args)
    assert [room.numel() for room in rooms] == [out.numel() + 128]
    assert rooms[0][:64].eq(7).all()
    assert rooms[0][-64:].eq(7).all()
    assert all(torch.equal(a, b) for a, b in zip(args[:4], before, strict=True))
    # A tile ends with its expert. If it did not, whoever came last would win: on a GPU another one every time.
    x, weight, order, starts, k = args
    alone = FORMS[form][0](x, weight, order, starts.clamp(max=int(starts[2])), k)
    mine = torch.zeros(21, dtype=torch.bool, device=DEVICE)
    mine[order[: int(starts[2])].long()] = True
    assert same_bits(alone[mine], out[mine])
    assert alone[~mine].eq(7).all()
    assert 0 < mine.sum() < 21


def test_views_and_empty_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided rows and experts, turned tensors, bases off 16 bytes; which of them may be read 16 bytes at a time."""
    asked: list[bool] = []
    config = tuning.config

    def recording(*args: Any, **key: Any) -> Any:
        asked.append(key["aligned"])
        return config(*args, **key)

    monkeypatch.setattr(tuning, "config", recording)
    experts = torch.tensor([[3, 0], [1, 3], [3, 1]], device=DEVICE)
    order, starts, k = grouped(experts, 4)
    plain, weight = draw(3, 64, dtype=torch.bfloat16), draw(4, 24, 64, dtype=torch.bfloat16, seed=1)

    def within(tensor: Tensor, *shape: int, at: tuple[Any, ...]) -> Tensor:
        return draw(*shape, dtype=torch.bfloat16, seed=2)[at].copy_(tensor)

    few = slice(64)
    views = [
        (plain, weight, True),
        (within(plain, 6, 160, at=(slice(0, 6, 2), few)), weight, True),
        (within(plain, 3, 160, at=(slice(3), slice(8, 72))), weight, True),
        (within(plain, 3, 160, at=(slice(3), slice(3, 67))), weight, False),
        (within(plain, 3, 68, at=(slice(3), few)), weight, False),
        (plain.t().contiguous().t(), weight, True),
        (plain, within(weight, 8, 60, 136, at=(slice(0, 8, 2), slice(3, 27), few)), True),
        (plain, within(weight, 4, 24, 136, at=(slice(4), slice(24), slice(1, 65))), False),
        (plain, within(weight, 4, 24, 68, at=(slice(4), slice(24), few)), False),
        (plain, weight.permute(1, 0, 2).contiguous().permute(1, 0, 2), True),
        (plain, draw(4, 24 * 64 + 4, dtype=torch.bfloat16)[:, :-4].unflatten(1, (24, 64)).copy_(weight), False),
    ]
    expected = grouped_linear(plain, weight, order, starts, k)
    for x, other, _ in views:
        assert same_bits(grouped_linear(x, other, order, starts, k), expected)
    strided = torch.stack([order, order], 1)[:, 0], torch.stack([starts, starts], 1)[:, 0]
    assert same_bits(grouped_linear(plain, weight, *strided, k), expected)
    assert asked == [True, *(aligned for _, _, aligned in views), True]

    none, zeros = order[:0], torch.zeros_like(starts)
    assert grouped_linear(plain[:0], weight, none, zeros, k).shape == (0, 24)
    assert grouped_swiglu(plain[:0], weight, none, zeros, k).shape == (0, 12)
    assert grouped_swiglu(plain[:0], weight[:0], none, zeros[:1], k).shape == (0, 12)
    assert grouped_linear(plain, weight[:, :0], order, starts, k).shape == (6, 0)
    assert not grouped_swiglu(plain[:, :0], weight[:, :, :0], order, starts, k).any()


def _untouched(count: int) -> Tensor:
    """Memory of which, on the host, only the pages that are written are ever there: not poisoned."""
    torch.use_deterministic_algorithms(False)
    return torch.empty(count, dtype=torch.float16, device=DEVICE)


def test_weights_and_rows_beyond_int32_offsets() -> None:
    """Experts, rows of one (its up rows too) and rows of x, the last more than 2^31 elements from the first though one
    stride is not: with a larger one, even an int32 index would give a 64-bit product."""
    apart = 2**30 + 2**20
    x, weight = draw(3, 32, dtype=torch.float16), draw(4, 6, 32, dtype=torch.float16, seed=1)
    routing = grouped(torch.tensor([[3, 1], [0, 3], [2, 3]], device=DEVICE), 4)
    storage = _untouched(5 * apart + 1024)
    for run in (grouped_linear, grouped_swiglu):
        expected = run(x, weight, *routing)
        far = storage.as_strided((4, 6, 32), (apart, 32, 1)).copy_(weight)
        assert same_bits(run(x, far, *routing), expected)
        far = storage.as_strided((4, 6, 32), (32, apart, 1)).copy_(weight)
        assert same_bits(run(x, far, *routing), expected)
        far = storage.as_strided((3, 32), (apart, 1)).copy_(x)
        assert same_bits(run(far, weight, *routing), expected)


@needs_gpu
def test_outputs_beyond_int32_offsets() -> None:
    x, weight = draw(66000, 16, dtype=torch.bfloat16), draw(1, 33000, 16, dtype=torch.bfloat16, seed=1)
    experts = torch.zeros(66000, 1, dtype=torch.int64, device=DEVICE)
    y = grouped_linear(x, weight, *grouped(experts, 1))
    assert same_bits(y[-70:], grouped_linear(x[-70:], weight, *grouped(experts[-70:], 1)))


def test_refuses_what_does_not_fit() -> None:
    x, weight = drawn("plain", 2, 5, 6, 16, torch.float32)
    order, starts, k = grouped(route(2, 5, 3), 5)
    shapes = r"x must be \[T, K\] and weight \[E, N, K\], got "
    cases: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
        (lambda: grouped_linear(x.double(), weight.double(), order, starts, k), TypeError, "float64"),
        (
            lambda: grouped_linear(x, weight[..., :8], order, starts, k),
            ValueError,
            shapes + r"\[2, 16\] and \[5, 6, 8\]",
        ),
        (lambda: grouped_linear(x, weight[0], order, starts, k), ValueError, shapes + r"\[2, 16\] and \[6, 16\]"),
        (lambda: grouped_linear(x[0], weight, order, starts, k), ValueError, shapes + r"\[16\]"),
        (lambda: grouped_linear(x, weight.half(), order, starts, k), ValueError, "weight must be torch.float32"),
        (lambda: grouped_swiglu(x, weight[:, :5], order, starts, k), ValueError, "as many up rows as gate rows, got 5"),
        (lambda: grouped_linear(x, weight, order, starts, 0), ValueError, "k must be at least 1.*got 0"),
        (
            lambda: grouped_linear(x, weight, order, starts, 1),
            ValueError,
            r"order must be \[2\] torch.int32 for 2 rows of x, k = 1 and 5 experts, got \[6\] torch.int32",
        ),
        (
            lambda: grouped_linear(x, weight, order.long(), starts, k),
            ValueError,
            r"order must be.*got \[6\] torch.int64",
        ),
        (lambda: grouped_linear(x, weight, order, starts[:-1], k), ValueError, r"starts must be \[6\].*got \[5\]"),
        (lambda: grouped_linear(x, weight, order, starts.float(), k), ValueError, r"starts must be.*torch.float32"),
        (lambda: grouped_linear(x, weight[:0], order, starts[:1], k), ValueError, "6 assignments need an expert"),
        (
            lambda: grouped_linear(x, weight.mT.contiguous().mT, order, starts, k),
            ValueError,
            r"weight \[5, 6, 16\] must have the last dimension contiguous, got strides \[96, 1, 6\]",
        ),
        (
            lambda: grouped_linear(x, weight[:1].expand(1025, 6, 16), order, order.new_zeros(1026), k),
            ValueError,
            "has 1025 experts, and a kernel takes 1024",
        ),
        (lambda: grouped_linear(x.requires_grad_(), weight, order, starts, k), RuntimeError, "computes no gradients"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("form", FORMS)
def test_registered(form: str) -> None:
    op = torch.ops.tritium.grouped_linear if form == "plain" else torch.ops.tritium.grouped_swiglu
    args = *drawn(form, 3, 5, 10, 16, torch.float32), *grouped(route(3, 5, 2), 5)
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*args), op(*args))
    assert same_bits(op(*args), FORMS[form][0](*args))
