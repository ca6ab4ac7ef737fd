"""The kernel of a decode step's linear layers: the rule, roundings, bits, edges, outputs in place, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.decode_linear import (
    decode_linear_residual,
    decode_linear_residual_reference,
    norm_head,
    norm_head_reference,
    norm_linear,
    norm_linear_reference,
    norm_linear_swiglu,
    norm_linear_swiglu_reference,
)
from tritium.kernels.quantised_linear import quantise
from tritium.kernels.rms_norm import rms_norm
from tritium.kernels.sampling import sample, sample_scratch
from tritium.kernels.swiglu import swiglu

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
EPS = 1e-5
KINDS = [None, 8, 4]  # bits of a quantised weight
FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plain": (norm_linear, norm_linear_reference),
    "swiglu": (norm_linear_swiglu, norm_linear_swiglu_reference),
    "residual": (decode_linear_residual, decode_linear_residual_reference),
    "head": (norm_head, norm_head_reference),
}
# Rows, width, depth: one off every block, depths of less and more than a step, with tails of each kind.
SHAPES = [(1, 16, 64), (3, 17, 600), (9, 15, 1100), (17, 17, 72), (2, 5, 1024)]
FULL = [(rows, width, depth) for rows in (1, 8, 16, 40) for width, depth in ((1024, 3072), (6144, 4096), (4097, 4100))]


def inputs(
    form: str, rows: int, width: int, depth: int, dtype: torch.dtype, bits: int | None = None, biased: bool = True
) -> tuple[Any, ...]:
    """The arguments of a form; outputs are of about 1."""
    x, gain = draw(rows, depth, dtype=dtype, scale=3.0), draw(depth, dtype=dtype, seed=1, scale=0.3) + 1
    height = 2 * width if form == "swiglu" else width
    weight, scale = draw(height, depth, dtype=dtype, seed=2, scale=depth**-0.5), None
    if bits is not None:
        weight, scale = quantise(weight, bits)
    bias = draw(height, dtype=dtype, seed=3) if biased else None
    if form == "residual":
        return x, weight, bias, draw(rows, width, dtype=dtype, seed=4), scale
    return (x, gain, EPS, weight, scale, width - 2) if form == "head" else (x, gain, EPS, weight, bias, scale)


def by_row(form: str, args: tuple[Any, ...], chosen: Any) -> Tensor:
    """The form on the chosen rows only."""
    x, *rest = args
    if form == "residual":
        rest[2] = rest[2][chosen]
    out = FORMS[form][0](x[chosen], *rest)
    return out[0] if form == "head" else out


def check(form: str, *shape: int, dtype: torch.dtype, bits: int | None = None, biased: bool = True) -> None:
    args = inputs(form, *shape, dtype=dtype, bits=bits, biased=biased)
    run, reference = FORMS[form]
    got, expected, truth = run(*args), reference(*args), truth_of(reference, *args)
    if form == "head":
        limit = args[-1]
        assert (got[0][:, limit:] == float("-inf")).all()
        got, expected, truth = (logits[:, :limit] for logits, _ in (got, expected, truth))
    assert_rule(got, expected, truth, f"{form} {shape} {bits}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    check(form, *shape, dtype=dtype, biased=shape[0] != 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", FORMS)
def test_rule_of_quantised_weights(form: str, bits: int, dtype: torch.dtype) -> None:
    check(form, 3, 15, 600, dtype=dtype, bits=bits)
    if form == "swiglu":
        check(form, 1, 17, 1088, dtype=dtype, bits=bits, biased=False)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_rule_in_full(shape: tuple[int, ...], form: str, bits: int | None, dtype: torch.dtype) -> None:
    check(form, *shape, dtype=dtype, bits=bits, biased=shape[0] == 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_it_rounds(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: what is normalised rounds, times the weight rounds; bias and
    residual before the only rounding of the sum; gate, silu and up as swiglu's kernel."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, scale: float) -> Tensor:
        return (torch.randint(-100, 101, shape, generator=generator) * scale).to(dtype).to(DEVICE)

    x, weight, bias = whole(5, 48, scale=1.0), whole(20, 48, scale=2.0**-7), whole(20, scale=0.09375)
    residual = whole(5, 20, scale=3.25)
    exact = x.double() @ weight.double().t() + bias.double()
    assert same_bits(norm_linear(x, None, EPS, weight, bias), exact.to(dtype))
    once = (residual.double() + exact).to(dtype)
    assert same_bits(decode_linear_residual(x, weight, bias, residual), once)
    assert not torch.equal(once, residual + exact.to(dtype))  # else this would prove nothing
    packed = norm_linear(x, None, EPS, weight, bias)
    assert same_bits(norm_linear_swiglu(x, None, EPS, weight, bias), swiglu(packed))
    gain = whole(48, scale=2.0**-5)
    one_hot = torch.eye(48, dtype=dtype, device=DEVICE)
    normed = rms_norm(x, gain, EPS)
    got = norm_linear(x, gain, EPS, one_hot)
    assert (got == normed).float().mean() > 0.98  # the mean's last bit may differ: another order of its sum
    torch.testing.assert_close(got, normed, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(("form", "bits"), [*((form, None) for form in FORMS), ("plain", 8), ("plain", 4)])
def test_batch_invariance(form: str, bits: int | None) -> None:
    """A row's bits: alone, among 2, 16, 17 and 40 (other tiles), at another place, beside NaN."""
    args = inputs(form, 40, 9, 600, torch.bfloat16, bits)
    whole = by_row(form, args, slice(None))
    assert not whole.isnan().any()
    for rows in (1, 2, 16, 17):
        assert same_bits(by_row(form, args, slice(rows)), whole[:rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert same_bits(by_row(form, args, order), whole[order])
    beside = [value.clone() if isinstance(value, Tensor) else value for value in args]
    beside[0].fill_(NAN)
    beside[0][8] = args[0][8]
    for rows in (9, 17):
        assert same_bits(by_row(form, tuple(beside), slice(rows))[8], whole[8])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "depth"), [(1024, 3072), (6144, 4096), (40000, 1024), (4097, 4100)])
def test_batch_invariance_in_full(width: int, depth: int, form: str, bits: int | None, dtype: torch.dtype) -> None:
    args = inputs(form, 40, width, depth, dtype, bits)
    whole = by_row(form, args, slice(None))
    for rows in (1, 2, 8, 9, 16, 17):
        for _ in range(20):
            assert same_bits(by_row(form, args, slice(rows)), whole[:rows])


def test_every_row_of_the_tables_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that own a part of their rows, wide blocks of rows, fewer programs than tiles."""
    args = inputs("swiglu", 9, 17, 72, torch.bfloat16)
    expected = by_row("swiglu", args, slice(None))
    tables = tuning.load(tuning.architecture(torch.device(DEVICE)))["decode_linear"]
    order = next(row["use"] for row in tables["order"] if tuning.holds(row.get("when", {}).get("itemsize", 2), 2))
    seen = set()
    for row in [*tables["schedule"], {"use": {**tables["schedule"][-1]["use"], "ROWS": 24, "BLOCK_N": 32}}]:
        variant = {**order, **row["use"]}
        for programs in (65536, 3):  # not a multiple of the blocks of rows: a program meets both
            key = (variant["ROWS"], variant["BLOCK_N"], variant["BLOCK_M"], programs)
            if key in seen:
                continue
            seen.add(key)
            changed = variant | {"PROGRAMS": programs}
            monkeypatch.setattr(tuning, "config", lambda *_, changed=changed, **__: changed)
            assert same_bits(by_row("swiglu", args, slice(None)), expected), changed
    assert len(seen) >= 8


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_tables_keep_the_order_of_summation(arch: str) -> None:
    """The shape of a step, of a sum of squares and the warps of both for every number of rows; a slice of 4 bits is a
    block of the scales."""
    fixed = {"BLOCK_K", "SLICES", "BLOCK_S", "num_warps", "matrix_instr_nonkdim"}
    tables = tuning.load(arch)["decode_linear"]
    for row in tables["order"]:
        assert fixed - set(row["use"]) <= {"matrix_instr_nonkdim"}
    for row in tables["schedule"]:
        assert not set(row["use"]) & fixed
        assert row["use"]["ROWS"] <= row["use"]["BLOCK_N"]
    for itemsize in (2, 4):
        key = tuple({"itemsize": itemsize, "bits": 4, "aligned": True, "width": 64, "gated": False}.items())
        use = tables["order"][tuning.find(arch, "decode_linear", "order", key)]["use"]
        assert use["BLOCK_K"] == 64 * use["SLICES"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_best_is_what_sampling_begins_with(dtype: torch.dtype) -> None:
    """As a column of sampling's scratch: ties, a limit, NaN, and rows of nothing but -inf."""
    x = torch.eye(4, 64, dtype=dtype, device=DEVICE)
    weight = draw(40, 64, dtype=dtype, seed=5)
    weight[7, 0] = weight[29, 0] = 9.0
    weight[38, 1] = 50.0  # from the limit on
    weight[12, 2] = NAN
    weight[:, 3] = float("-inf")
    weight[:, 3:4].masked_fill_(weight[:, 3:4].isnan(), 0)
    scratch = sample_scratch(torch.empty(4, 40, dtype=dtype, device=DEVICE), 0.0, 0, 1.0)
    room = torch.zeros(4, 3, dtype=torch.int64, device=DEVICE)
    for row in range(4):  # one at a time: -inf of a column times 0 of another row is no number
        clean = weight if row == 3 else weight.masked_fill(weight.isinf(), 0)
        clean = clean if row == 2 else clean.nan_to_num(0.0, neginf=float("-inf"))
        only = clean.clone()
        only[:, torch.arange(64, device=DEVICE) != row] = 0
        logits, best = norm_head(x[row : row + 1], None, 0.0, only, None, 38, best=room[row : row + 1, 1])
        expected = norm_head_reference(x[row : row + 1], None, 0.0, only, None, 38)
        assert same_bits(logits.nan_to_num(3.0), expected[0].nan_to_num(3.0))
        assert torch.equal(best, expected[1])
        scratch.work[:1, 0] = best
        taken = sample(logits, 0.0, 0, 1.0, None, scratch=type(scratch)(scratch.work[:1], scratch.parts), begun=True)
        assert taken.tolist() == [{0: 7, 1: int(only[:38, 1].argmax()), 2: -1, 3: 0}[row]]
    assert (room[:, 1] > 0).all()
    assert (room[:, [0, 2]] == 0).all()
    many = draw(9, 64, dtype=dtype, seed=6)
    logits, best = norm_head(many, None, 0.0, weight[:, 4:5] + draw(40, 64, dtype=dtype, seed=7))
    assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits.argmax(1))


def test_outputs_that_are_given() -> None:
    """Whole, and nothing beside them; the stream in place."""
    dtype = torch.bfloat16
    for form in FORMS:
        args = inputs(form, 9, 20, 72, dtype)
        before = [value.clone() if isinstance(value, Tensor) else value for value in args]
        expected = by_row(form, args, slice(None))
        room = torch.full((11, 20), 7.0, dtype=dtype, device=DEVICE)
        out = FORMS[form][0](*args, out=room[1:10])
        assert (out[0] if form == "head" else out).data_ptr() == room[1:10].data_ptr()
        assert same_bits(room[1:10], expected)
        assert (room[[0, 10]] == 7.0).all()
        kept = zip(args, before, strict=True)
        assert all(same_bits(a, b) for a, b in kept if isinstance(a, Tensor))
    args = inputs("residual", 3, 20, 80, dtype)  # blocks that own a part of their rows: none is added to twice
    expected = by_row("residual", args, slice(None))
    stream = args[3]
    assert decode_linear_residual(*args, out=stream).data_ptr() == stream.data_ptr()
    assert same_bits(stream, expected)


@pytest.mark.parametrize("bits", KINDS)
@pytest.mark.parametrize(("rows", "depth"), [(3, 73), (2, 576)])
def test_nothing_leaks_from_beyond_the_edges(rows: int, depth: int, bits: int | None) -> None:
    """Views into storage that is NaN, or the largest number, all around them."""
    dtype = torch.bfloat16

    def framed(tensor: Tensor) -> Tensor:
        height, width = tensor.shape
        fill = NAN if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        frame = torch.full((height + 40, (width + 1100) // 16 * 16), fill, dtype=tensor.dtype, device=DEVICE)
        view = frame[:height, :width]
        view.copy_(tensor)
        return view

    x, gain, _, weight, bias, scale = inputs("swiglu", rows, 9, depth, dtype, bits)
    long = torch.cat((gain, torch.full((1024,), NAN, dtype=dtype, device=DEVICE)))[:depth]
    got = norm_linear_swiglu(framed(x), long, EPS, framed(weight), bias, scale)
    expected = norm_linear_swiglu(x, gain, EPS, weight, bias, scale)
    assert not expected.isnan().any()
    assert torch.equal(got, expected)
    args = inputs("residual", rows, 9, depth, dtype, bits)
    got = decode_linear_residual(framed(args[0]), framed(args[1]), args[2], framed(args[3]), args[4])
    assert torch.equal(got, decode_linear_residual(*args))


def test_views_and_empty_input() -> None:
    """Strided rows, turned tensors, a base that is not aligned, no rows, no outputs, no columns."""
    dtype = torch.bfloat16
    storage, weight, gain = draw(8, 160, dtype=dtype), draw(24, 64, dtype=dtype, seed=1), draw(128, dtype=dtype, seed=2)
    for x in (storage[::2, :64], storage[:4, 16:80], storage[:4, 3:67], storage[:1].expand(4, -1)[:, :64]):
        expected = norm_linear(x.contiguous(), gain[::2].contiguous(), EPS, weight)
        for turned in (weight, weight.t().contiguous().t(), draw(24, 99, dtype=dtype)[:, :64].copy_(weight)):
            torch.testing.assert_close(norm_linear(x, gain[::2], EPS, turned), expected, rtol=0.02, atol=0.02)
    empty = storage[:0, :64]
    assert norm_linear(empty, gain[:64], EPS, weight).shape == (0, 24)
    assert norm_linear_swiglu(empty, gain[:64], EPS, weight).shape == (0, 12)
    assert [part.shape for part in norm_head(empty, gain[:64], EPS, weight)] == [(0, 24), (0,)]
    assert norm_linear(storage[:4, :64], None, EPS, weight[:0]).shape == (4, 0)
    residual = draw(4, 24, dtype=dtype)
    assert same_bits(decode_linear_residual(storage[:4, :0], weight[:, :0], None, residual), residual)


def test_rows_beyond_int32_offsets() -> None:
    """Rows of x, a weight and a residual, the last more than 2^31 elements from the first."""
    torch.use_deterministic_algorithms(False)
    apart = 2**30 + 2**20
    far = torch.empty(3 * apart, dtype=torch.float16, device=DEVICE).as_strided((3, 32), (apart, 1))
    x, weight, residual = (draw(3, 32, dtype=torch.float16, seed=seed) for seed in range(3))
    square = draw(32, 32, dtype=torch.float16, seed=4)
    expected = norm_linear(x, x[0], EPS, weight), decode_linear_residual(x, square, None, residual)
    far.copy_(x)
    assert same_bits(norm_linear(far, x[0], EPS, weight), expected[0])
    far.copy_(weight)
    assert same_bits(norm_linear(x, x[0], EPS, far), expected[0])
    far.copy_(residual)
    assert same_bits(decode_linear_residual(x, square, None, far), expected[1])


def test_refuses_what_does_not_fit() -> None:
    x, gain, _, weight, bias, _ = inputs("plain", 2, 6, 64, torch.float32)
    values, scale = quantise(weight, 4)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: norm_linear(x.double(), gain, EPS, weight), TypeError, "float64"),
        (lambda: norm_linear(x[0], gain, EPS, weight), ValueError, r"x must be \[R, K\]"),
        (lambda: norm_linear(x, gain[:5], EPS, weight), ValueError, r"norm_weight must be \[64\] torch.float32"),
        (lambda: norm_linear(x, gain, EPS, weight[:, :5]), ValueError, r"weight must be \[6, 64\] torch.float32"),
        (lambda: norm_linear(x, gain, EPS, weight.half()), ValueError, r"weight must be \[6, 64\] torch.float32"),
        (lambda: norm_linear(x, gain, EPS, weight, bias[:5]), ValueError, r"bias must be \[6\] torch.float32"),
        (lambda: norm_linear(x, gain, EPS, weight, None, scale), TypeError, "int8 .8 bits. or uint8 .4 bits."),
        (lambda: norm_linear(x, gain, EPS, values, None, scale[:5]), ValueError, r"scale must be \[6, 1\]"),
        (lambda: norm_linear(x, gain, EPS, values[:, :5], None, scale), ValueError, r"weight must be \[6, 32\]"),
        (lambda: norm_linear_swiglu(x, gain, EPS, weight[:5]), ValueError, "as many up rows as gate rows, got 5"),
        (lambda: decode_linear_residual(x, weight, bias, x), ValueError, r"residual must be \[2, 6\]"),
        (lambda: norm_linear(x, gain, EPS, weight, out=x), ValueError, r"out must be \[2, 6\] torch.float32"),
        (
            lambda: norm_linear(x, gain, EPS, weight, out=x.t()[:2, :].repeat(3, 4).t()[:2, :6]),
            ValueError,
            "contiguous",
        ),
        (lambda: norm_head(x, gain, EPS, weight, limit=-1), ValueError, "limit must be"),
        (lambda: norm_head(x, gain, EPS, weight, best=x[:, 0]), ValueError, r"best must be \[2\] torch.int64"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(("form", "bits"), [*((form, None) for form in FORMS), ("plain", 4)])
def test_registered(form: str, bits: int | None) -> None:
    op = getattr(torch.ops.tritium, FORMS[form][0].__name__)
    args = inputs(form, 3, 10, 64, torch.float32, bits)
    torch.library.opcheck(op, args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: op(*given), fullgraph=True, backend="aot_eager")
    out, again = compiled(*args), op(*args)
    assert all(same_bits(a, b) for a, b in zip(out, again, strict=True))
    assert same_bits(again[0] if form == "head" else again, by_row(form, args, slice(None)))
