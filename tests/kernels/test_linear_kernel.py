"""The linear kernel and its fused forms: the rule, roundings, batch invariance, edges, views, what it refuses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.linear import (
    linear,
    linear_reference,
    linear_residual,
    linear_residual_reference,
    linear_swiglu,
    linear_swiglu_reference,
)
from tritium.kernels.swiglu import swiglu

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
HALVES = [torch.bfloat16, torch.float16]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]

# Tokens, width, depth: one off every block, depths with a tail of each kind (8 elements, odd), by pointer and by TMA.
SHAPES = [
    (1, 1, 16),
    (2, 16, 56),
    (15, 63, 72),
    (16, 64, 128),
    (17, 65, 129),
    (33, 130, 72),
    (65, 65, 136),
    (1, 130, 260),
]
FULL = [
    (tokens, width, depth)
    for tokens in (1, 17, 64, 300, 4096)
    for width, depth in ((1024, 3072), (576, 1536), (6144, 4096), (4097, 4096), (4096, 4100), (50257, 768))
]
FORMS = {"plain": (linear, linear_reference), "residual": (linear_residual, linear_residual_reference)}
FORMS["swiglu"] = (linear_swiglu, linear_swiglu_reference)


def inputs(
    form: str, tokens: int, width: int, depth: int, dtype: torch.dtype, biased: bool = True, scale: float = 1.0
) -> tuple[Tensor | None, ...]:
    """x, weight, bias and, where the form has one, the residual; outputs of about `scale`."""
    rows = 2 * width if form == "swiglu" else width
    x = draw(tokens, depth, dtype=dtype, scale=scale)
    weight = draw(rows, depth, dtype=dtype, seed=1, scale=depth**-0.5)
    bias = draw(rows, dtype=dtype, seed=2, scale=scale) if biased else None
    residual = (draw(tokens, width, dtype=dtype, seed=3, scale=scale),) if form == "residual" else ()
    return x, weight, bias, *residual


def check(form: str, *shape: int, dtype: torch.dtype, biased: bool = True, scale: float = 1.0) -> None:
    args = inputs(form, *shape, dtype=dtype, biased=biased, scale=scale)
    run, reference = FORMS[form]
    assert_rule(run(*args), reference(*args), truth_of(reference, *args), f"{form} {shape}")


def by_row(form: str, args: tuple[Tensor | None, ...], chosen: Any) -> Tensor:
    """The form on the chosen tokens only."""
    x, weight, bias, *residual = args
    return FORMS[form][0](x[chosen], weight, bias, *(tensor[chosen] for tensor in residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    check(form, *shape, dtype=dtype, biased=shape[0] != 17)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_rule_in_full(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    check(form, *shape, dtype=dtype, biased=shape[0] == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 3e2])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Gates whose exponential overflows to infinity or vanishes, outputs near float16's largest."""
    check("swiglu", 3, 20, 40, dtype=dtype, scale=min(scale, 100))
    check("plain", 3, 20, 40, dtype=dtype, scale=scale * 40)
    check("residual", 3, 20, 40, dtype=dtype, scale=scale * 40)


@pytest.mark.parametrize("dtype", HALVES)
def test_where_it_rounds(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: bias before the only rounding, and so the residual."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int, scale: float) -> Tensor:
        return (torch.randint(-127, 128, shape, generator=generator) * scale).to(dtype).to(DEVICE)

    x, weight, bias = whole(9, 48, scale=1.0), whole(20, 48, scale=2.0**-7), whole(20, scale=0.09375)
    residual = whole(9, 20, scale=3.25)
    exact = x.double() @ weight.double().t()
    assert same_bits(linear(x, weight), exact.to(dtype))
    assert same_bits(linear(x, weight, bias), (exact + bias.double()).to(dtype))
    assert not torch.equal((exact + bias.double()).to(dtype), exact.to(dtype) + bias)  # else this would prove nothing
    once = (residual.double() + exact + bias.double()).to(dtype)
    assert same_bits(linear_residual(x, weight, bias, residual), once)
    gate, up = (exact + bias.double()).to(dtype).double().chunk(2, dim=-1)
    silu = gate * torch.sigmoid(gate)
    certain = ((silu * (1 - 1e-5)).to(dtype) == (silu * (1 + 1e-5)).to(dtype)) & (gate > -80)  # below, exp overflows
    expected = (silu.to(dtype).double() * up).to(dtype)
    assert certain.float().mean() > 0.5
    assert torch.equal(linear_swiglu(x, weight, bias)[certain], expected[certain])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_is_the_projection_and_then_the_activation(dtype: torch.dtype) -> None:
    """Bit for bit the two kernels one after the other: fusing is only faster."""
    x, weight, bias = inputs("swiglu", 3, 20, 72, dtype)
    assert same_bits(linear_swiglu(x, weight, bias), swiglu(linear(x, weight, bias)))


def test_accumulates_in_float32_and_not_in_tensorfloat() -> None:
    """4096 products of one, where bfloat16 stops at 256; 2^-12 beside one, which a 10-bit mantissa loses."""
    ones = torch.ones(2, 4096, dtype=torch.bfloat16, device=DEVICE)
    assert linear(ones[:1], ones).tolist() == [[4096.0, 4096.0]]
    x, weight = torch.tensor([[1.0 + 2.0**-12, 1.0]], device=DEVICE), torch.tensor([[1.0, -1.0]], device=DEVICE)
    assert linear(x, weight).item() == 2.0**-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_batch_invariance(form: str, dtype: torch.dtype) -> None:
    """A token's bits: alone, among 1 to 17 and 70 (other tiles, the copy engine), at another place, beside NaN."""
    args = inputs(form, 70, 24, 72, dtype)
    whole = by_row(form, args, slice(None))
    assert not whole.isnan().any()
    for tokens in range(1, 18):
        assert same_bits(by_row(form, args, slice(tokens)), whole[:tokens])
    assert same_bits(by_row(form, args, slice(3, 36)), whole[3:36])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert same_bits(by_row(form, args, order), whole[order])
    for tokens in (17, 70):
        beside = tuple(None if tensor is None else tensor.clone() for tensor in args)
        for tensor in (beside[0], *beside[3:]):
            kept = tensor[8].clone()
            tensor.fill_(NAN)
            tensor[8] = kept
        assert same_bits(by_row(form, beside, slice(tokens))[8], whole[8])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "depth"), [(1024, 3072), (6144, 4096), (4097, 4096), (4096, 4100)])
def test_batch_invariance_in_full(width: int, depth: int, form: str, dtype: torch.dtype) -> None:
    """Every bucket of the tables at its real size."""
    args = inputs(form, 4096, width, depth, dtype)
    whole = by_row(form, args, slice(None))
    for tokens in (1, 2, 16, 17, 32, 33, 64, 65, 128, 200, 512, 1024, 2048):
        assert same_bits(by_row(form, args, slice(tokens)), whole[:tokens])


@needs_gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 33, 512, 2048])
def test_no_race(tokens: int, form: str) -> None:
    args = inputs(form, tokens, 4096, 4096, torch.bfloat16)
    first = by_row(form, args, slice(None))
    for _ in range(200):
        assert same_bits(by_row(form, args, slice(None)), first)


def configurations(arch: str, itemsize: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(the condition of a schedule row, the launch arguments that it makes) of the rows that an item size can take."""
    tables = tuning.load(arch)["linear"]
    order = next(row["use"] for row in tables["order"] if row.get("when", {}).get("itemsize", itemsize) == itemsize)
    for row in tables["schedule"]:
        if row.get("when", {}).get("itemsize", 2) == itemsize:
            yield row.get("when", {}), {**order, **row["use"]}


@pytest.mark.parametrize(("form", "dtype"), [*((form, torch.bfloat16) for form in FORMS), ("swiglu", torch.float32)])
def test_every_row_of_the_tables_gives_the_same_bits(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that own a part of their rows, groups of blocks, both halves of a wide block, TMA and pointers."""
    args = inputs(form, 40, 72, 136, dtype)
    expected = by_row(form, args, slice(None))
    seen = []
    arch = tuning.architecture(torch.device(DEVICE))
    for condition, options in configurations(arch, dtype.itemsize):
        if condition.get("gated", form == "swiglu") != (form == "swiglu"):
            continue
        for group in (1, 2) if options["ROWS"] < 64 else (8,):
            variants = [options | {"GROUP": group}] + [options | {"TMA": False}] * options["TMA"]
            for variant in variants:
                if variant["BLOCK_M"] * variant["BLOCK_N"] > 128 * 128 and not variant["TMA"]:
                    continue  # more registers than there are: only ever launched with TMA
                monkeypatch.setattr(tuning, "config", lambda *_, variant=variant, **__: variant)
                assert same_bits(by_row(form, args, slice(None)), expected), variant
                seen.append((variant["TMA"], variant["BLOCK_M"]))
    if dtype == torch.bfloat16 and arch == "sm_90":
        assert (True, 256 if form != "swiglu" else 128) in seen
        assert {tma for tma, _ in seen} == {True, False}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_keep_the_order_of_summation(arch: str) -> None:
    """One class of matrix instruction and one BLOCK_K for every number of tokens."""
    for row in tuning.load(arch)["linear"]["order"]:
        assert set(row.get("when", {})) <= {"itemsize", "width"}
        assert "BLOCK_K" in row["use"]
    for row in tuning.load(arch)["linear"]["schedule"]:
        assert not set(row["use"]) & {"BLOCK_K", "matrix_instr_nonkdim"}
    for itemsize in (2, 4):
        found = [options for _, options in configurations(arch, itemsize)]
        assert len(found) >= 2
        assert len({(options["BLOCK_K"], options.get("matrix_instr_nonkdim")) for options in found}) == 1
        for options in found:
            assert options["ROWS"] <= options["BLOCK_N"]
            assert not options["TMA"] or (arch in ("sm_90", "sm_100") and options["ROWS"] == options["BLOCK_N"])
            if itemsize == 2 and arch in ("sm_90", "sm_100"):  # below, Triton would take mma.sync
                assert options["BLOCK_N"] >= 64
                assert options["num_warps"] in (4, 8)
            if arch == "gfx942":
                assert options["matrix_instr_nonkdim"] == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "depth"), [(5, 72), (5, 73), (65, 72), (33, 8)])
def test_nothing_leaks_from_beyond_the_edges(tokens: int, depth: int, dtype: torch.dtype) -> None:
    """Views into storage that is NaN all around them: columns beyond K, rows beyond T and N."""
    x, weight, bias, residual = inputs("residual", tokens, 20, depth, dtype)

    def framed(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        frame = torch.full((rows + 70, (columns + 87) // 8 * 8), NAN, dtype=dtype, device=DEVICE)
        view = frame[:rows, :columns]
        view.copy_(tensor)
        return view

    assert same_bits(linear(framed(x), framed(weight), bias), linear(x, weight, bias))
    fused = linear_residual(framed(x), framed(weight), bias, framed(residual))
    assert same_bits(fused, linear_residual(x, weight, bias, residual))
    assert same_bits(linear_swiglu(framed(x), framed(weight), bias), linear_swiglu(x, weight, bias))
    assert not fused.isnan().any()


def test_views_and_empty_input() -> None:
    """Strided rows, turned tensors, a base that is not aligned, no tokens, no outputs, no columns."""
    storage = draw(80, 160, dtype=torch.bfloat16)
    weight, residual = draw(24, 64, dtype=torch.bfloat16, seed=1), draw(40, 24, dtype=torch.bfloat16, seed=2)
    bias = draw(48, dtype=torch.bfloat16, seed=3)[::2]
    for x in (
        storage[::2, :64],
        storage[:40, 8:72],
        storage[:40, 3:67],
        storage.t()[:40, :64],
        storage[:1].expand(40, -1)[:, :64],
    ):
        expected = linear_residual(x.contiguous(), weight, bias.contiguous(), residual)
        for turned in (weight, weight.t().contiguous().t(), draw(24, 99, dtype=torch.bfloat16)[:, :64].copy_(weight)):
            assert same_bits(linear_residual(x, turned, bias, residual.t().contiguous().t()), expected)
    empty = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    assert linear(empty, weight).shape == (0, 24)
    assert linear(storage[:3, :64], empty).shape == (3, 0)
    assert linear_swiglu(empty, weight).shape == (0, 12)
    nothing = linear_residual(storage[:40, :0], weight[:, :0], bias, residual)
    assert same_bits(nothing, (residual.float() + bias.float()).to(torch.bfloat16))


def test_only_aligned_rows_take_the_wide_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads a descriptor of anything; a GPU refuses bases and rows off multiples of 16 bytes."""
    asked: list[bool] = []
    config = tuning.config

    def recording(*args: Any, **key: Any) -> Any:
        asked.append(key["aligned"])
        return config(*args, **key)

    monkeypatch.setattr(tuning, "config", recording)
    storage, weight = draw(3, 160, dtype=torch.bfloat16), draw(5, 64, dtype=torch.bfloat16, seed=1)
    narrow = draw(3, 68, dtype=torch.bfloat16)
    for x in (storage[:, :64], storage[:, 8:72], storage[:, 3:67], narrow[:, :64], storage[:1].expand(3, -1)[:, :64]):
        linear(x, weight)
    linear(storage[:, :60], weight[:, :60])
    assert asked == [True, True, False, False, False, False]


@pytest.mark.parametrize("biased", [True, False])
def test_inputs_survive(biased: bool) -> None:
    """The caller, and a backward pass, still need the residual."""
    args = inputs("residual", 5, 20, 40, torch.float32, biased)
    before = [None if tensor is None else tensor.clone() for tensor in args]
    out = linear_residual(*args)
    assert out.data_ptr() != args[3].data_ptr()
    assert all(a is b or same_bits(a, b) for a, b in zip(args, before, strict=True))


def _untouched(count: int) -> Tensor:
    """Memory of which, on the host, only the pages that are written are ever there: not poisoned."""
    torch.use_deterministic_algorithms(False)
    return torch.empty(count, dtype=torch.float16, device=DEVICE)


def test_rows_beyond_int32_offsets() -> None:
    """Rows of x, of a weight (its up rows too) and of a residual, the last more than 2^31 elements from the first
    though one stride is not: with a larger one, even an int32 index would give a 64-bit product."""
    apart = 2**30 + 2**20
    x, weight, residual = (draw(3, 32, dtype=torch.float16, seed=seed) for seed in range(3))
    square, gated = draw(32, 32, dtype=torch.float16, seed=4), draw(6, 32, dtype=torch.float16, seed=5)
    storage = _untouched(5 * apart + 64)
    far, six = storage.as_strided((3, 32), (apart, 1)), storage.as_strided((6, 32), (apart, 1))
    expected = linear(x, weight), linear_swiglu(x, gated), linear_residual(x, square, None, residual)
    far.copy_(x)
    assert same_bits(linear(far, weight), expected[0])
    far.copy_(weight)
    assert same_bits(linear(x, far), expected[0])
    six.copy_(gated)
    assert same_bits(linear_swiglu(x, six), expected[1])
    far.copy_(residual)
    assert same_bits(linear_residual(x, square, None, far), expected[2])


@needs_gpu
def test_outputs_beyond_int32_offsets() -> None:
    """More than 2^31 outputs, as the logits of a long prompt have."""
    x, weight = draw(33000, 16, dtype=torch.bfloat16), draw(65600, 16, dtype=torch.bfloat16, seed=1)
    y = linear(x, weight)
    assert same_bits(y[-70:], linear(x[-70:], weight))


def test_refuses_what_does_not_fit() -> None:
    x, weight, bias, residual = inputs("residual", 2, 6, 16, torch.float32)
    cases: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
        (lambda: linear(x.double(), weight.double()), TypeError, "float64"),
        (
            lambda: linear(x, weight[:, :8]),
            ValueError,
            r"x must be \[T, K\] and weight \[N, K\], got \[2, 16\] and \[6, 8\]",
        ),
        (lambda: linear(x[0], weight), ValueError, r"x must be \[T, K\]"),
        (lambda: linear(x, weight.half()), ValueError, r"weight must be \[6, 16\] torch.float32"),
        (lambda: linear(x, weight, bias[:5]), ValueError, r"bias must be \[6\] torch.float32"),
        (
            lambda: linear_residual(x, weight, bias, residual[:1]),
            ValueError,
            r"residual must be \[2, 6\] torch.float32",
        ),
        (lambda: linear_swiglu(x, weight[:5]), ValueError, "as many up rows as gate rows, got 5"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_registered(form: str, biased: bool) -> None:
    op = {"plain": torch.ops.tritium.linear, "residual": torch.ops.tritium.linear_residual}.get(form)
    op = op or torch.ops.tritium.linear_swiglu
    args = inputs(form, 3, 10, 16, torch.float32, biased)
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *tensors: op(*tensors), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*args), op(*args))
    assert same_bits(op(*args), by_row(form, args, slice(None)))
