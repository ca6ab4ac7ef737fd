"""Quantisation and the definition: where the bits are, errors within half a step, the formula, what is refused."""

from importlib import import_module

import pytest
import torch
from torch import Tensor
from tritium.kernels.quantised_linear import dequantise_reference, quantise, quantised_linear_reference

from ..rule import draw, same_bits

module = import_module("tritium.kernels.quantised_linear")  # the package has the function of this name

HALVES = [torch.bfloat16, torch.float16]


def unpacked(values: Tensor, scale: Tensor) -> Tensor:
    """The weight, an element at a time, as the format is written down."""
    rows = []
    for n, row in enumerate(values.tolist()):
        if values.dtype == torch.int8:
            rows.append([q * scale[n].item() for q in row])
            continue
        weight = [0.0] * (2 * len(row))
        for at, byte in enumerate(row):
            block, j = divmod(at, 32)
            weight[64 * block + j] = (byte % 16 - 8) * scale[n, block].item()
            weight[64 * block + 32 + j] = (byte // 16 - 8) * scale[n, block].item()
        rows.append(weight)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("depth", [1, 64, 130])
def test_is_the_formula(bits: int, depth: int) -> None:
    """Halves swapped, a block's scale taken for its neighbour's, padding that counts: each would show."""
    weight, x, bias = draw(5, depth, dtype=torch.float32), draw(3, depth, dtype=torch.float64, seed=1), torch.randn(5)
    values, scale = quantise(weight, bits)
    expected = unpacked(values, scale)
    assert expected.shape == (5, depth if bits == 8 else -(-depth // 64) * 64)
    torch.testing.assert_close(dequantise_reference(values, scale).double(), expected, rtol=1e-6, atol=0.0)
    y = quantised_linear_reference(x, values, scale.double(), bias.double())
    torch.testing.assert_close(y, x @ expected[:, :depth].t() + bias.double(), rtol=1e-12, atol=1e-12)
    assert (expected[:, depth:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_eight_bits_err_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    weight = draw(9, 70, dtype=dtype) * torch.logspace(-3, 3, 9)[:, None].to(dtype)
    values, scale = quantise(weight, 8)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert (values.abs().amax(1) == 127).all()
    error = (dequantise_reference(values, scale) - weight.float()).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert error.square().mean(1).sqrt().div(scale) == pytest.approx([12**-0.5] * 9, rel=0.35)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_four_bits_err_least_of_the_scales_tried(dtype: torch.dtype) -> None:
    """Never more than with either plain scale, often less; of normal numbers about 9%."""
    weight = draw(40, 640, dtype=dtype)
    values, scale = quantise(weight, 4)
    assert (values.dtype, scale.dtype) == (torch.uint8, dtype)
    blocks = weight.float().unflatten(1, (-1, 64))
    error = (dequantise_reference(values, scale).unflatten(1, (-1, 64)) - blocks).square().sum(2)
    assert error.sum().div(weight.float().square().sum()).sqrt().item() < 0.0915
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    for level in (-8, 7):
        step = (largest / level).to(dtype).float()
        plain = ((blocks / step).round().clamp(-8, 7) * step - blocks).square().sum(2)
        assert (error <= plain * (1 + 1e-5)).all()
        assert (error < 0.9 * plain).any()  # else nothing was tried


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_on_the_grid_comes_back(bits: int) -> None:
    """Bit for bit, zero rows and a row of one sign included: also of 4 bits that reach -8, whichever sign that has."""
    levels = torch.randint(-7, 8, (6, 128), generator=torch.Generator().manual_seed(0)).float()
    levels[:, ::64] = -8 if bits == 4 else -127
    levels[2] = 0
    levels[3] = levels[3].abs()
    levels[4] *= -1
    weight = levels * torch.tensor([0.5, 2.0, 1.0, 1.0, 0.25, 3.0])[:, None]
    assert same_bits(dequantise_reference(*quantise(weight, bits)).abs(), weight.abs())
    assert torch.equal(dequantise_reference(*quantise(weight, bits)), weight)
    assert (quantise(weight, bits).values[2] == (0 if bits == 8 else 0x88)).all()  # not what NaN is cast to


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_quantised_alone_however_many_at_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(7, 100, dtype=torch.float32)
    whole = quantise(weight, bits)
    monkeypatch.setattr(module, "AT_ONCE", 250)
    for again, one in zip(quantise(weight, bits), whole, strict=True):
        assert same_bits(again, one)
    for part, one in zip(quantise(weight[5:6], bits), whole, strict=True):
        assert same_bits(part, one[5:6])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rounds_once(bits: int, dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32; neither w nor the projection rounds before the bias is added."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (9, 64), generator=generator).to(dtype)
    values, scale = quantise(draw(20, 64, dtype=dtype), bits)
    scale = (torch.randint(1025, 2048, scale.shape, generator=generator) * 2.0**-10).to(scale.dtype)
    bias = torch.randint(-99, 100, (20,), generator=generator).to(dtype)
    weight = unpacked(values, scale)
    exact = x.double() @ weight.t()
    assert same_bits(quantised_linear_reference(x, values, scale), exact.to(dtype))
    expected = (exact + bias.double()).to(dtype)
    assert same_bits(quantised_linear_reference(x, values, scale, bias), expected)
    assert not torch.equal(x.double() @ weight.to(dtype).double().t(), exact)  # else this would prove nothing
    assert not torch.equal(exact.to(dtype) + bias, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_has_no_scale(bits: int, bad: float) -> None:
    weight = draw(3, 100, dtype=torch.bfloat16)
    weight[1, 70] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise(weight, bits)


def test_refuses_what_is_not_a_weight() -> None:
    for weight, bits in ((torch.zeros(3), 8), (torch.zeros(3, 0), 4), (torch.zeros(3, 4), 5)):
        with pytest.raises(ValueError, match=r"takes a weight \[N, K\] and 8 or 4 bits, got"):
            quantise(weight, bits)
    assert quantise(torch.zeros(0, 70), 4).values.shape == (0, 64)
