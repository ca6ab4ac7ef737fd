"""The definitions of the grouped products' gradients: against autograd in float64, what has none, where they round."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.grouped_linear import grouped_linear_reference
from tritium.kernels.grouped_linear_backward import grouped_linear_dweight_reference, grouped_linear_dx_reference
from tritium.kernels.routing import group_reference

from .test_grouped_linear import HALVES, NAN, ROUTINGS


def drawn(experts: Tensor, count: int, width: int = 6, depth: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x and weight in float64."""
    generator = torch.Generator().manual_seed(experts.numel())
    tokens, k = experts.shape
    shapes = (tokens * k, width), (tokens, depth), (count, width, depth)
    dy, x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return dy, x, weight


@pytest.mark.parametrize("routing", ROUTINGS)
def test_is_autograds_in_float64(routing: str) -> None:
    chosen, count = ROUTINGS[routing]
    experts = torch.tensor(chosen, dtype=torch.int32)
    (order, starts), k = group_reference(experts, count), experts.shape[1]
    dy, x, weight = drawn(experts, count)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = torch.autograd.grad(grouped_linear_reference(*leaves, order, starts, k), leaves, dy)
    dx = grouped_linear_dx_reference(dy, weight, order, starts, k)
    dweight = grouped_linear_dweight_reference(dy, x, order, starts, k)
    torch.testing.assert_close(dx, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dweight, expected[1], rtol=1e-12, atol=1e-12)


def test_what_is_placed_nowhere_has_no_part() -> None:
    """Its row of dy may hold anything; a token and an expert that have nothing else get zeros."""
    experts = torch.tensor([[2, -1], [-1, 9], [0, 2]], dtype=torch.int32)
    order, starts = group_reference(experts, 4)
    dy, x, weight = drawn(experts, 4)
    lost = torch.tensor([1, 2, 3])
    dy[lost], x[1], weight[[1, 3]] = NAN, NAN, NAN
    dx = grouped_linear_dx_reference(dy, weight, order, starts, 2)
    torch.testing.assert_close(dx[0], dy[0] @ weight[2])
    torch.testing.assert_close(dx[2], dy[4] @ weight[0] + dy[5] @ weight[2])
    dweight = grouped_linear_dweight_reference(dy, x, order, starts, 2)
    torch.testing.assert_close(dweight[2], torch.outer(dy[0], x[0]) + torch.outer(dy[5], x[2]))
    torch.testing.assert_close(dweight[0], torch.outer(dy[4], x[2]))
    assert not dx[1].any()
    assert not dweight[[1, 3]].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32: each assignment's row once, their sum once; dweight once."""
    generator = torch.Generator().manual_seed(0)
    dy, x, weight = (
        torch.randint(-31, 32, shape, generator=generator).to(dtype) for shape in ((16, 20), (8, 24), (3, 20, 24))
    )
    experts = torch.randint(3, (8, 2), generator=generator, dtype=torch.int32)
    order, starts = group_reference(experts, 3)
    rows = torch.einsum("an,ank->ak", dy.double(), weight.double()[experts.flatten()])
    expected = rows.to(dtype).double().unflatten(0, (8, 2)).sum(1).to(dtype)
    assert torch.equal(grouped_linear_dx_reference(dy, weight, order, starts, 2), expected)
    assert not torch.equal(rows.unflatten(0, (8, 2)).sum(1).to(dtype), expected)  # else this would prove nothing
    one = torch.zeros(16, 1, dtype=torch.int32)
    apart = group_reference(one, 1)
    exact = dy.double().t() @ x.double().repeat_interleave(2, 0)
    assert torch.equal(grouped_linear_dweight_reference(dy, x, *apart, 2)[0], exact.to(dtype))


def test_empty() -> None:
    none, starts = torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    assert grouped_linear_dx_reference(torch.empty(0, 6), torch.ones(3, 6, 5), none, starts, 2).shape == (0, 5)
    dweight = grouped_linear_dweight_reference(torch.empty(0, 6), torch.empty(0, 5), none, starts, 2)
    assert dweight.tolist() == torch.zeros(3, 6, 5).tolist()
