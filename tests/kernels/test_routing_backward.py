"""The definition of routing's gradient: against autograd in float64, the chosen being constants; NaN, rounding."""

import math

import pytest
import torch
from tritium.kernels.routing import route_reference
from tritium.kernels.routing_backward import route_backward_reference

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("tokens", "count", "k"), [(0, 4, 2), (1, 1, 1), (3, 7, 1), (5, 8, 3), (4, 6, 6)])
def test_is_autograds_in_float64(tokens: int, count: int, k: int, renormalise: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(tokens, count, generator=generator, dtype=torch.float64, requires_grad=True)
    dweights = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    experts, weights = route_reference(logits, k, renormalise)
    (expected,) = torch.autograd.grad(weights, logits, dweights)
    found = route_backward_reference(dweights, logits.detach(), experts, renormalise)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_by_hand() -> None:
    """p = 1/2, 1/4, 1/4 and the first and last chosen, in this order or the other; renormalised 2/3 and 1/3."""
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]] * 2, dtype=torch.float64)
    experts = torch.tensor([[0, 2], [2, 0]], dtype=torch.int32)
    dweights = torch.tensor([[8.0, 16.0], [16.0, 8.0]], dtype=torch.float64)
    found = route_backward_reference(dweights, logits, experts, False)
    torch.testing.assert_close(found, torch.tensor([[0.0, -2.0, 2.0]] * 2, dtype=torch.float64))
    found = route_backward_reference(dweights, logits, experts, True)
    torch.testing.assert_close(found, torch.tensor([[-16 / 9, 0.0, 16 / 9]] * 2, dtype=torch.float64))


@pytest.mark.parametrize("renormalise", [True, False])
def test_what_is_not_a_number_stays_in_its_row(renormalise: bool) -> None:
    rows = [[1.0, 2.0, 3.0], [NAN, 2.0, 3.0], [INF, 2.0, 3.0], [-INF] * 3, [-INF, 2.0, 3.0]]
    logits = torch.tensor(rows, dtype=torch.float64)
    experts, _ = route_reference(logits, 2, renormalise)
    found = route_backward_reference(torch.ones(5, 2, dtype=torch.float64), logits, experts, renormalise)
    assert found.isnan().all(1).tolist() == [False, True, True, True, False]
    assert found[[0, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, dweights = (torch.randn(64, n, generator=generator).to(dtype) for n in (32, 4))
    experts, _ = route_reference(logits, 4, True)
    for renormalise in (True, False):
        exact = route_backward_reference(dweights.double(), logits.double(), experts, renormalise)
        found = route_backward_reference(dweights, logits, experts, renormalise)
        certain = (exact * (1 - 1e-5)).to(dtype) == (exact * (1 + 1e-5)).to(dtype)
        assert found.dtype == dtype
        assert certain.float().mean() > 0.8
        assert torch.equal(found[certain], exact.to(dtype)[certain])
