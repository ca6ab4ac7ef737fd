"""Layer norm's definition against a naive one in float64, and its single rounding."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.layer_norm import layer_norm_backward_reference, layer_norm_reference

HALVES = [torch.bfloat16, torch.float16]


def naive(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The formula, a number at a time, in Python's own float64."""
    width = x.shape[-1]
    rows = x.double().reshape(-1, width)
    weights = [1.0] * width if weight is None else weight.double().tolist()
    biases = [0.0] * width if bias is None else bias.double().tolist()
    out = torch.empty_like(rows)
    for r, row in enumerate(rows.tolist()):
        mean = math.fsum(row) / width
        root = math.sqrt(math.fsum((value - mean) ** 2 for value in row) / width + eps)
        for i, value in enumerate(row):
            out[r, i] = (value - mean) / root * weights[i] + biases[i]
    return out.reshape(x.shape)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 2, 80, 257])
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_is_the_formula_in_float64(rows: int, width: int, affine: str) -> None:
    """The unbiased variance, or a bias applied before the weight, would show."""
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64) + 3
    weight = None if affine == "none" else torch.randn(width, dtype=torch.float64)
    bias = torch.randn(width, dtype=torch.float64) if affine == "both" else None
    out = layer_norm_reference(x, weight, bias, 0.3)
    torch.testing.assert_close(out, naive(x, weight, bias, 0.3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_once_at_the_end(dtype: torch.dtype) -> None:
    """Rows of +-3 with eps 7 normalise to exactly +-0.75: what is left is one rounding of 0.75 w + b, bit for bit."""
    torch.manual_seed(1)
    sign = torch.ones(64)
    sign[torch.randperm(64)[:32]] = -1.0
    x = (3 * sign).to(dtype).repeat(4, 1)
    weight, bias = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    product = 0.75 * sign.double() * weight.double()
    expected = (product + bias.double()).to(dtype)
    assert torch.equal(layer_norm_reference(x, weight, bias, 7.0), expected.repeat(4, 1))
    rounded_early = product.to(dtype) + bias
    assert (rounded_early != expected).float().mean() > 0.1  # else this test would prove nothing


@pytest.mark.parametrize("dtype", HALVES)
def test_normalised_values_do_not_round_before_the_affine_map(dtype: torch.dtype) -> None:
    """Unlike RMSNorm, nothing rounds between the statistics and the weight."""
    torch.manual_seed(2)
    x, weight, bias = torch.randn(32, 96).to(dtype), torch.randn(96).to(dtype), torch.randn(96).to(dtype)
    exact = naive(x, weight, bias, 1e-5)
    certain = (exact * (1 - 2e-6) - 2e-6).to(dtype) == (exact * (1 + 2e-6) + 2e-6).to(dtype)
    assert certain.float().mean() > 0.9
    assert torch.equal(layer_norm_reference(x, weight, bias, 1e-5)[certain], exact.to(dtype)[certain])
    early = naive(x, None, None, 1e-5).to(dtype) * weight + bias
    assert (early != exact.to(dtype)).float().mean() > 0.1


def test_extreme_magnitudes_in_float32() -> None:
    """Below the eps nothing may vanish; at 1e15 the squares, 1e30, still fit float32."""
    torch.manual_seed(3)
    for scale in (1e-20, 1e15):
        x = torch.randn(3, 64) * scale
        out = layer_norm_reference(x, None, None, 1e-5).double()
        exact = naive(x, None, None, 1e-5)
        torch.testing.assert_close(out, exact, rtol=0.0, atol=float(exact.abs().max()) * 1e-6)


def test_an_offset_much_larger_than_the_spread() -> None:
    """E[x^2] - E[x]^2 in float32 would lose the variance, 1, beside the mean's square, 1e8."""
    torch.manual_seed(4)
    x = torch.randn(4, 256) + 10000.0
    torch.testing.assert_close(
        layer_norm_reference(x, None, None, 1e-5).double(), naive(x, None, None, 1e-5), rtol=0.0, atol=2e-3
    )


def test_a_constant_row_gives_the_bias() -> None:
    """No variance must not mean a division by zero."""
    bias = torch.randn(8)
    out = layer_norm_reference(torch.full((2, 8), 5.0), torch.randn(8), bias, 1e-5)
    assert torch.equal(out, bias.repeat(2, 1))


def test_non_contiguous_input() -> None:
    """Transposed and strided views give what their copies give."""
    torch.manual_seed(5)
    x = torch.randn(16, 6, 4, dtype=torch.float64).permute(2, 1, 0)[:, ::2]
    assert not x.is_contiguous()
    weight, bias = torch.randn(2, 16, dtype=torch.float64)
    out = layer_norm_reference(x, weight, bias, 1e-5)
    torch.testing.assert_close(out, naive(x, weight, bias, 1e-5), rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    """Against finite differences, and the same when taken twice."""
    torch.manual_seed(6)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: layer_norm_reference(*a, 0.1), (x, weight, bias))
    out = layer_norm_reference(x, weight, bias, 0.1)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, (x, weight, bias), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (x, weight, bias), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_backward_is_what_autograd_finds(rows: int, affine: str) -> None:
    """In float64, eps of the size of the variance: a mean or a factor lost, or the eps outside the root, would show."""
    torch.manual_seed(7)
    x, dy = torch.randn(2, rows, 7, dtype=torch.float64) + 1
    x.requires_grad_()
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True) if affine in ("both", "weight") else None
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if affine in ("both", "bias") else None
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    expected = torch.autograd.grad(layer_norm_reference(x, weight, bias, 0.3), wanted, dy)
    with torch.no_grad():
        found = layer_norm_backward_reference(dy, x, weight, 0.3, weight is not None, bias is not None)
    assert [gradient.numel() for gradient in found[1:]] == [7 * (weight is not None), 7 * (bias is not None)]
    mine = [found[index] for index, tensor in enumerate((x, weight, bias)) if tensor is not None]
    for gradient, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(gradient, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit the float64 gradient, rounded, where float32 noise cannot decide."""
    torch.manual_seed(8)
    x, dy = torch.randn(2, 64, 96).to(dtype)
    weight = torch.randn(96).to(dtype)
    found = layer_norm_backward_reference(dy, x, weight, 1e-5)
    exact = layer_norm_backward_reference(dy.double(), x.double(), weight.double(), 1e-5)
    for mine, truth in zip(found, exact, strict=True):
        certain = (truth * (1 - 2e-6) - 2e-6).to(dtype) == (truth * (1 + 2e-6) + 2e-6).to(dtype)
        assert certain.float().mean() > 0.9
        assert torch.equal(mine[certain], truth.to(dtype)[certain])
