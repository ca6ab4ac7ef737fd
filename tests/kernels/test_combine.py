"""The definition of combining: against a sum in Python, its one rounding, which row is whose; its gradient's."""

import pytest
import torch
from tritium.kernels.combine import combine_backward_reference, combine_reference


def drawn(tokens: int, k: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens + k + width)
    shapes = (tokens * k, width), (tokens, k), (tokens, width)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize(("tokens", "k", "width"), [(0, 2, 3), (1, 1, 1), (3, 2, 5), (4, 8, 16)])
def test_is_the_formula(tokens: int, k: int, width: int) -> None:
    """Row t * k + j of the outputs is token t's j-th: any other arrangement would show."""
    outputs, weights, residual = drawn(tokens, k, width)
    before = residual.clone()
    rows = [
        [
            residual[t, n].item() + sum(weights[t, j].item() * outputs[t * k + j, n].item() for j in range(k))
            for n in range(width)
        ]
        for t in range(tokens)
    ]
    out = combine_reference(outputs, weights, residual)
    torch.testing.assert_close(
        out, torch.tensor(rows, dtype=torch.float64).reshape(tokens, width), rtol=1e-13, atol=0.0
    )
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit where float32's own error cannot decide; to round products, or the sum alone, would differ."""
    outputs, weights, residual = drawn(32, 4, 64, dtype)
    exact = combine_reference(outputs.double(), weights.double(), residual.double())
    certain = (exact - 1e-5).to(dtype) == (exact + 1e-5).to(dtype)
    assert certain.float().mean() > 0.9
    out = combine_reference(outputs, weights, residual)
    assert out.dtype == dtype
    assert torch.equal(out[certain], exact.to(dtype)[certain])
    twice = residual + (exact - residual.double()).to(dtype)
    assert (twice != exact.to(dtype)).float().mean() > 0.05


def test_experts_that_cancel_leave_the_residual() -> None:
    """In float32: the residual is added to their sum, not lost in it."""
    outputs = torch.tensor([[1e8], [1e8]])
    out = combine_reference(outputs, torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5]]))
    assert out.item() == 0.5


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in drawn(2, 3, 4)]
    assert torch.autograd.gradcheck(combine_reference, inputs)


@pytest.mark.parametrize(("tokens", "k", "width"), [(0, 2, 3), (1, 1, 1), (3, 2, 5), (4, 8, 16)])
def test_the_gradients_definition_is_autograds_in_float64(tokens: int, k: int, width: int) -> None:
    outputs, weights, residual = (x.requires_grad_() for x in drawn(tokens, k, width))
    dr = drawn(tokens, k, width)[2].neg() + 1
    expected = torch.autograd.grad(combine_reference(outputs, weights, residual), (outputs, weights), dr)
    found = combine_backward_reference(dr, outputs.detach(), weights.detach())
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_gradient_rounds_once(dtype: torch.dtype) -> None:
    outputs, weights, dr = drawn(32, 4, 64, dtype)
    exact = combine_backward_reference(dr.double(), outputs.double(), weights.double())
    for got, truth in zip(combine_backward_reference(dr, outputs, weights), exact, strict=True):
        certain = (truth - 1e-5).to(dtype) == (truth + 1e-5).to(dtype)
        assert got.dtype == dtype
        assert certain.float().mean() > 0.6
        assert torch.equal(got[certain], truth.to(dtype)[certain])
