"""SwiGLU's definition against a naive one in float64, and its two roundings; its gradient's against autograd."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.swiglu import swiglu_backward_reference, swiglu_reference

HALVES = [torch.bfloat16, torch.float16]


def silu(value: float) -> float:
    """value * sigmoid(value) without overflow on either side."""
    if value >= 0:
        return value / (1 + math.exp(-value))
    return value * math.exp(value) / (1 + math.exp(value))


def naive_silu(gate: Tensor) -> Tensor:
    flat = [silu(value) for value in gate.double().flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(gate.shape)


@pytest.mark.parametrize("shape", [(0, 6), (1, 2), (5, 56), (2, 3, 10)])
def test_is_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    """Gate and up swapped, or interleaved instead of packed, would show."""
    torch.manual_seed(0)
    gate_up = torch.randn(*shape, dtype=torch.float64) * 3
    half = shape[-1] // 2
    expected = naive_silu(gate_up[..., :half]) * gate_up[..., half:]
    out = swiglu_reference(gate_up)
    assert out.shape == (*shape[:-1], half)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-15)


def test_the_gate_comes_first() -> None:
    """silu(1) * 2, not silu(2) * 1."""
    out = swiglu_reference(torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert out.tolist() == pytest.approx([2 / (1 + math.exp(-1))], rel=1e-15)


@pytest.mark.parametrize("dtype", HALVES)
def test_silu_rounds_and_the_product_rounds_again(dtype: torch.dtype) -> None:
    """Bit for bit, away from ties that float32's own error could tip."""
    torch.manual_seed(1)
    gate_up = (torch.randn(64, 128) * 4).to(dtype)
    gate, up = gate_up.chunk(2, -1)
    exact = naive_silu(gate)
    certain = (exact * (1 - 2e-6)).to(dtype) == (exact * (1 + 2e-6)).to(dtype)
    assert certain.float().mean() > 0.98
    expected = exact.to(dtype) * up
    assert torch.equal(swiglu_reference(gate_up)[certain], expected[certain])
    rounded_once = (exact * up.double()).to(dtype)
    assert (rounded_once != expected).float().mean() > 0.1  # else this test would prove nothing


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_large_gates_saturate_without_overflow(dtype: torch.dtype) -> None:
    """exp(10000) is infinite: silu must still be 0 far below zero and the identity far above."""
    gate = torch.tensor([-10000.0, -200.0, 0.0, 200.0, 10000.0]).to(dtype)
    out = swiglu_reference(torch.cat((gate, torch.ones_like(gate))))
    assert out.isfinite().all()
    assert out.tolist() == [0.0, 0.0, 0.0, 200.0, gate[-1].item()]


def test_extreme_magnitudes_in_float32() -> None:
    """At 1e-20 silu is x / 2; at 1e15 it is x."""
    gate_up = torch.tensor([1e-20, 1e15, -1e-20, 3.0, 1.0, 2.0])
    expected = naive_silu(gate_up[:3]) * gate_up[3:].double()
    torch.testing.assert_close(swiglu_reference(gate_up).double(), expected, rtol=1e-6, atol=0.0)


def test_non_contiguous_input() -> None:
    """A transposed projection gives what its copy gives."""
    torch.manual_seed(2)
    gate_up = torch.randn(12, 5, dtype=torch.float64).t()
    expected = naive_silu(gate_up[:, :6]) * gate_up[:, 6:]
    torch.testing.assert_close(swiglu_reference(gate_up), expected, rtol=1e-13, atol=1e-15)


def test_gradients() -> None:
    """Against finite differences, and the same when taken twice."""
    torch.manual_seed(3)
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu_reference, (gate_up,))
    out = swiglu_reference(gate_up)
    upstream = torch.randn_like(out)
    (first,) = torch.autograd.grad(out, gate_up, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(out, gate_up, upstream)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (1, 2), (5, 56), (2, 3, 10), (8,)])
def test_the_gradients_definition_is_autograds_in_float64(shape: tuple[int, ...]) -> None:
    """dgate and dup exchanged, or the slope of the sigmoid left out, would show."""
    torch.manual_seed(4)
    gate_up = (torch.randn(*shape, dtype=torch.float64) * 3).requires_grad_()
    out = swiglu_reference(gate_up)
    dy = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, gate_up, dy)
    got = swiglu_backward_reference(dy, gate_up.detach())
    assert got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", HALVES)
def test_each_gradient_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit the float64 gradient's rounding, away from ties: no rounded silu, no rounded product between."""
    torch.manual_seed(5)
    gate_up, dy = (torch.randn(32, 64) * 2).to(dtype), torch.randn(32, 32).to(dtype)
    exact = swiglu_backward_reference(dy.double(), gate_up.double())
    certain = (exact - 1e-6).to(dtype) == (exact + 1e-6).to(dtype)
    assert certain.float().mean() > 0.9
    assert torch.equal(swiglu_backward_reference(dy, gate_up)[certain], exact.to(dtype)[certain])
    twice = dy * torch.nn.functional.silu(gate_up[:, :32])
    assert (twice != exact[:, 32:].to(dtype)).float().mean() > 0.1  # else this test would prove nothing
