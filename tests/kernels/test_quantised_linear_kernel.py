"""The kernel of quantised linear layers: the rule, its rounding, batch invariance, edges, views, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.quantised_linear import quantise, quantised_linear, quantised_linear_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
HALVES = [torch.bfloat16, torch.float16]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "gfx942"]

# Tokens, width, depth: one off every block; depths within a block of scales, and that end in its low or high half.
SHAPES = [(1, 1, 16), (2, 65, 64), (16, 64, 144), (17, 63, 208), (65, 66, 97)]
FULL = [
    (tokens, width, depth)
    for tokens in (1, 17, 64, 4096)
    for width, depth in ((1024, 3072), (576, 1536), (6144, 4096), (4097, 4100), (50257, 768))
]


def inputs(
    bits: int, tokens: int, width: int, depth: int, dtype: torch.dtype, biased: bool = True, scale: float = 1.0
) -> tuple[Any, ...]:
    """x, values, scale and bias; outputs of about `scale`. Rows of the weight differ in size, and one is zero."""
    weight = draw(width, depth, dtype=torch.float32, seed=1, scale=depth**-0.5)
    weight *= torch.linspace(0, 2, width, device=DEVICE)[:, None]
    bias = draw(width, dtype=dtype, seed=2, scale=scale) if biased else None
    return draw(tokens, depth, dtype=dtype, scale=scale), *quantise(weight.to(dtype), bits), bias


def check(bits: int, *shape: int, dtype: torch.dtype, biased: bool = True, scale: float = 1.0) -> None:
    args = inputs(bits, *shape, dtype=dtype, biased=biased, scale=scale)
    truth = truth_of(quantised_linear_reference, *args)
    assert_rule(quantised_linear(*args), quantised_linear_reference(*args), truth, f"{bits} bits {shape}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    check(bits, *shape, dtype=dtype, biased=shape[0] != 17)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_rule_in_full(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    check(bits, *shape, dtype=dtype, biased=shape[0] == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_magnitudes(bits: int, dtype: torch.dtype) -> None:
    """Sums of q times x far beyond float16's largest, whose products with the scale are not."""
    check(bits, 3, 20, 80, dtype=dtype, scale=1e-2)
    check(bits, 3, 20, 80, dtype=dtype, scale=1e4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 4])
def test_where_it_rounds(bits: int, dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: the scale and the bias come before the only rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-15, 16, (9, 64), generator=generator).to(dtype).to(DEVICE)
    _, values, scale, _ = inputs(bits, 9, 20, 64, dtype)
    scale = (torch.randint(129, 256, scale.shape, generator=generator) * 2.0**-7).to(scale)
    bias = torch.randint(-99, 100, (20,), generator=generator).to(dtype).to(DEVICE)
    exact = truth_of(quantised_linear_reference, x, values, scale)
    assert same_bits(quantised_linear(x, values, scale), exact.to(dtype))
    assert same_bits(quantised_linear(x, values, scale, bias), (exact + bias.double()).to(dtype))
    assert not torch.equal((exact + bias.double()).to(dtype), exact.to(dtype) + bias)  # else this would prove nothing


def test_accumulates_in_float32_and_not_in_tensorfloat() -> None:
    """4096 products of one, where bfloat16 stops at 256; 2^-12 beside one, which a 10-bit mantissa loses."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16, device=DEVICE)
    x, weight = torch.tensor([[1.0 + 2.0**-12, 1.0]], device=DEVICE), torch.tensor([[1.0, -1.0]], device=DEVICE)
    for bits, most in ((8, 127), (4, 7)):
        assert quantised_linear(ones, *quantise(ones, bits)).item() == 4096.0
        values, scale = quantise(weight, bits)
        assert abs(quantised_linear(x, values, torch.ones_like(scale)).item()) == most * 2.0**-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_batch_invariance(bits: int, dtype: torch.dtype) -> None:
    """A token's bits: alone, among others up to 70 (other tiles), at another place, beside NaN."""
    x, *weight = inputs(bits, 70, 24, 80, dtype)
    whole = quantised_linear(x, *weight)
    assert not whole.isnan().any()
    for tokens in (1, 2, 15, 16, 17, 33):
        assert same_bits(quantised_linear(x[:tokens], *weight), whole[:tokens])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    assert same_bits(quantised_linear(x[order], *weight), whole[order])
    for tokens in (17, 70):
        beside = torch.full_like(x, NAN)
        beside[8] = x[8]
        assert same_bits(quantised_linear(beside[:tokens], *weight)[8], whole[8])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "depth"), [(6144, 4096), (4097, 4100)])
def test_batch_invariance_in_full(width: int, depth: int, bits: int, dtype: torch.dtype) -> None:
    """Every bucket of the tables at its real size."""
    x, *weight = inputs(bits, 4096, width, depth, dtype)
    whole = quantised_linear(x, *weight)
    for tokens in (1, 2, 16, 17, 64, 65, 128, 512, 2048):
        assert same_bits(quantised_linear(x[:tokens], *weight), whole[:tokens])


@needs_gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 33, 2048])
def test_no_race(tokens: int, bits: int) -> None:
    args = inputs(bits, tokens, 4096, 4096, torch.bfloat16)
    first = quantised_linear(*args)
    for _ in range(200):
        assert same_bits(quantised_linear(*args), first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("bits", [8, 4])
def test_tables_keep_the_order_of_summation(arch: str, bits: int) -> None:
    """One class of matrix instruction and one BLOCK_K for every number of tokens; of 4 bits a block's 64."""
    for row in tuning.load(arch)["quantised_linear"]["order"]:
        assert set(row.get("when", {})) <= {"itemsize", "bits"}
    for row in tuning.load(arch)["quantised_linear"]["schedule"]:
        assert not set(row["use"]) & {"BLOCK_K", "matrix_instr_nonkdim"}
        if row.get("when", {}).get("itemsize", 2) == 2 and arch in ("sm_90", "sm_100"):  # below: mma.sync
            assert row["use"]["BLOCK_N"] >= 64
            assert row["use"]["num_warps"] in (4, 8)
    for itemsize in (2, 4):
        key = {"bits": bits, "itemsize": itemsize, "width": 8, "tokens": 16, "outputs": 128, "aligned": True}
        options = tuning._merged(arch, "quantised_linear", tuple(sorted(key.items())))
        assert bits == 8 or options["BLOCK_K"] == 64
        assert options.get("matrix_instr_nonkdim", 16) == 16
        assert ("matrix_instr_nonkdim" in options) == (arch == "gfx942")


@pytest.mark.parametrize("bits", [8, 4])
def test_every_row_of_the_tables_gives_the_same_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks of tokens and of weight rows, and groups that end within a block."""
    args = inputs(bits, 40, 72, 144, torch.bfloat16)
    expected = quantised_linear(*args)
    rows = tuning.load(tuning.architecture(torch.device(DEVICE)))["quantised_linear"]["schedule"]
    order = {"BLOCK_K": 64 if bits == 4 else 128}
    for row in rows:
        if row.get("when", {}).get("itemsize", 2) == 2:
            variant = order | row["use"] | {"GROUP": 1 if row["use"]["BLOCK_M"] == 16 else 8}
            monkeypatch.setattr(tuning, "config", lambda *_, variant=variant, **__: variant)
            assert same_bits(quantised_linear(*args), expected), variant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "depth"), [(8, 80), (8, 73), (4, 80), (4, 97)])
def test_nothing_leaks_from_beyond_the_edges(bits: int, depth: int, dtype: torch.dtype) -> None:
    """x in storage that is NaN all around it, and values whose neighbours in memory are as large as they can be."""
    x, values, scale, bias = inputs(bits, 5, 20, depth, dtype)

    def framed(tensor: Tensor, around: float) -> Tensor:
        rows, columns = tensor.shape
        frame = torch.full((rows + 70, (columns + 207) // 16 * 16), around, dtype=tensor.dtype, device=DEVICE)
        view = frame[:rows, :columns]
        view.copy_(tensor)
        return view

    found = quantised_linear(framed(x, NAN), framed(values, 127), scale, bias)
    assert same_bits(found, quantised_linear(x, values, scale, bias))
    assert not found.isnan().any()


def test_views_and_empty_input() -> None:
    """Strided rows, turned tensors, a base that is not aligned, no tokens, no outputs."""
    storage = draw(80, 160, dtype=torch.bfloat16)
    for bits in (8, 4):
        _, values, scale, bias = inputs(bits, 1, 24, 64, torch.bfloat16)
        doubled = scale.repeat_interleave(2, dim=-1)[..., ::2]
        apart = torch.stack((bias, torch.full_like(bias, NAN)), 1)[:, 0]
        for x in (storage[::2, :64], storage[:40, 3:67], storage.t()[:40, :64], storage[:1].expand(40, -1)[:, :64]):
            expected = quantised_linear(x.contiguous(), values, scale, bias)
            assert same_bits(quantised_linear(x, values.t().contiguous().t(), doubled, apart), expected)
        empty = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
        assert quantised_linear(empty, values, scale).shape == (0, 24)
        assert quantised_linear(storage[:3, :64], values[:0], scale[:0]).shape == (3, 0)


def test_only_aligned_rows_take_the_wide_path(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    config = tuning.config

    def recording(*args: Any, **key: Any) -> Any:
        asked.append(key["aligned"])
        return config(*args, **key)

    monkeypatch.setattr(tuning, "config", recording)
    storage = draw(3, 160, dtype=torch.bfloat16)
    for bits in (8, 4):
        _, values, scale, _ = inputs(bits, 1, 5, 64, torch.bfloat16)
        for x in (storage[:, :64], storage[:, 8:72], storage[:, 3:67]):
            quantised_linear(x, values, scale)
        _, values, scale, _ = inputs(bits, 1, 5, 60, torch.bfloat16)
        quantised_linear(storage[:, :60], values, scale)
    assert asked == [True, True, False, False] * 2


def test_rows_beyond_int32_offsets() -> None:
    """Rows of x and of values, the last more than 2^31 elements from the first though one stride is not."""
    apart = 2**30 + 2**20
    x, values, scale, _ = inputs(8, 3, 3, 32, torch.float16)
    expected = quantised_linear(x, values, scale)
    torch.use_deterministic_algorithms(False)  # of memory on the host, only the pages that are written are ever there
    far = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 32), (apart, 1))
    far.copy_(x)
    assert same_bits(quantised_linear(far, values, scale), expected)
    far = torch.empty(2 * apart + 64, dtype=torch.int8, device=DEVICE).as_strided((3, 32), (apart, 1))
    far.copy_(values)
    assert same_bits(quantised_linear(x, far, scale), expected)


def test_refuses_what_does_not_fit() -> None:
    x, values, scale, bias = inputs(8, 2, 6, 70, torch.float32)
    _, packed, scales, _ = inputs(4, 2, 6, 70, torch.float32)
    cases: list[tuple[Callable[[], Tensor], type[Exception], str]] = [
        (lambda: quantised_linear(x.double(), values, scale), TypeError, "float64"),
        (lambda: quantised_linear(x, values.int(), scale), TypeError, r"int8 \(8 bits\) or uint8 \(4 bits\).*int32"),
        (lambda: quantised_linear(x[0], values, scale), ValueError, r"x must be \[T, K\]"),
        (lambda: quantised_linear(x, values[:, :8], scale), ValueError, r"values must be \[6, 70\] torch.int8"),
        (lambda: quantised_linear(x, values, scale[:5]), ValueError, r"scale must be \[6\] torch.float32"),
        (lambda: quantised_linear(x, values, scale.half()), ValueError, r"scale must be \[6\] torch.float32"),
        (lambda: quantised_linear(x, packed[:, :32], scales), ValueError, r"values must be \[6, 64\] torch.uint8"),
        (lambda: quantised_linear(x, packed, scales[:, :1]), ValueError, r"scale must be \[6, 2\]"),
        (lambda: quantised_linear(x, values, scale, bias.half()), ValueError, r"bias must be \[6\] torch.float32"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("biased", [True, False])
def test_registered(biased: bool, bits: int) -> None:
    args = inputs(bits, 3, 10, 16, torch.float32, biased)
    op = torch.ops.tritium.quantised_linear
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *tensors: op(*tensors), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*args), op(*args))
    assert same_bits(op(*args), quantised_linear(*args))
    x = args[0].clone().requires_grad_()
    op(x, *args[1:]).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, quantised_linear_reference(torch.eye(16), *args[1:3]).sum(1).expand(3, -1))
