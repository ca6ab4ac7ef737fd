"""The linear layer and its residual form against loops in float64, and where they round."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.linear import linear_reference, linear_residual_reference

HALVES = [torch.bfloat16, torch.float16]


def naive(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, K], [N, K] -> [T, N], a number at a time, in Python's own float64."""
    rows, columns = x.double().tolist(), weight.double().tolist()
    biases = [0.0] * len(columns) if bias is None else bias.double().tolist()
    out = [
        [
            sum(a * b for a, b in zip(row, column, strict=True)) + add
            for column, add in zip(columns, biases, strict=True)
        ]
        for row in rows
    ]
    return torch.tensor(out, dtype=torch.float64).reshape(x.shape[0], weight.shape[0])


def exact_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, residual whose every partial sum is exact in float32, so that only the roundings remain."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randint(-127, 128, shape, generator=generator) * scale).to(dtype)

    return draw(9, 48, scale=1.0), draw(20, 48, scale=2.0**-7), draw(20, scale=0.09375), draw(9, 20, scale=3.25)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("width", [1, 56, 65])
@pytest.mark.parametrize("biased", [True, False])
def test_is_the_formula_in_float64(rows: int, width: int, biased: bool) -> None:
    """A transposed weight, or a bias or residual left out, would show."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width, dtype=torch.float64), torch.randn(5, width, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if biased else None
    residual = torch.randn(rows, 5, dtype=torch.float64)
    expected = naive(x, weight, bias)
    torch.testing.assert_close(linear_reference(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    out = linear_residual_reference(x, weight, bias, residual)
    torch.testing.assert_close(out, residual + expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit: the product and the bias are added before the only rounding."""
    x, weight, bias, _ = exact_inputs(dtype)
    exact = naive(x, weight)
    assert torch.equal(linear_reference(x, weight), exact.to(dtype))
    expected = (exact + bias.double()).to(dtype)
    assert torch.equal(linear_reference(x, weight, bias), expected)
    assert not torch.equal(exact.to(dtype) + bias, expected)  # else this test would prove nothing


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [True, False])
def test_residual_rounds_once_or_twice(dtype: torch.dtype, biased: bool) -> None:
    """Bit for bit: each element is the sum rounded once, or the projection rounded and then the sum; never worse."""
    x, weight, bias, residual = exact_inputs(dtype)
    exact = naive(x, weight, bias if biased else None)
    once = (residual.double() + exact).to(dtype)
    twice = residual + exact.to(dtype)
    out = linear_residual_reference(x, weight, bias if biased else None, residual)
    assert not torch.equal(once, twice)
    assert torch.equal(out, once) or torch.equal(out, twice)


def test_accumulates_in_at_least_float32() -> None:
    """4096 products of one: a bfloat16 accumulator stops at 256."""
    x, weight = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(2, 4096, dtype=torch.bfloat16)
    assert linear_reference(x, weight).tolist() == [[4096.0, 4096.0]]


def test_float32_is_not_tensorfloat() -> None:
    """A 10-bit mantissa would lose 2^-12 beside one."""
    x = torch.tensor([[1.0 + 2.0**-12, 1.0]])
    assert linear_reference(x, torch.tensor([[1.0, -1.0]])).item() == 2.0**-12


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_magnitudes_in_float32(scale: float) -> None:
    """1e15 squared is 1e30 and still fits; 1e-20 must not be flushed when the other side is ordinary."""
    torch.manual_seed(1)
    x, weight = torch.randn(3, 40) * scale, torch.randn(6, 40) * min(scale, 1.0) ** 0.5
    expected = naive(x, weight)
    bound = x.double().abs() @ weight.double().abs().t() * 40 * 2.0**-24
    assert ((linear_reference(x, weight).double() - expected).abs() <= bound).all()


def test_the_residual_is_not_overwritten() -> None:
    """The backward pass, and the caller, still need it."""
    torch.manual_seed(2)
    x, weight, residual = torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4)
    before = residual.clone()
    for bias in (None, torch.randn(4)):
        out = linear_residual_reference(x, weight, bias, residual)
        assert torch.equal(residual, before)
        assert out.data_ptr() != residual.data_ptr()


def test_non_contiguous_inputs() -> None:
    """Transposed weights and strided rows give what their copies give."""
    torch.manual_seed(3)
    x = torch.randn(10, 24, dtype=torch.float64)[::2, ::3]
    weight = torch.randn(8, 6, dtype=torch.float64).t()
    residual = torch.randn(6, 5, dtype=torch.float64).t()
    assert not any(tensor.is_contiguous() for tensor in (x, weight, residual))
    torch.testing.assert_close(linear_reference(x, weight), naive(x, weight), rtol=1e-12, atol=1e-12)
    out = linear_residual_reference(x, weight, None, residual)
    torch.testing.assert_close(out, residual + naive(x, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [True, False])
def test_gradients(biased: bool) -> None:
    """Against finite differences, and the same when taken twice."""
    torch.manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, weight, residual = draw(3, 4), draw(5, 4), draw(3, 5)
    bias = draw(5) if biased else None
    inputs = tuple(tensor for tensor in (x, weight, bias, residual) if tensor is not None)
    assert torch.autograd.gradcheck(linear_residual_reference, (x, weight, bias, residual))
    assert torch.autograd.gradcheck(linear_reference, (x, weight, bias))
    out = linear_residual_reference(x, weight, bias, residual)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
