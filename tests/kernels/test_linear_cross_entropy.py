"""The definition of the projected loss and of its gradients, against PyTorch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from tritium.kernels.linear_cross_entropy import (
    linear_cross_entropy_backward_reference,
    linear_cross_entropy_reference,
)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_is_pytorchs(smoothing: float, reduction: str) -> None:
    """Loss, dx and dweight; what is not wanted is empty."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.tensor([0, -100, 8, 3, 3])
    share = torch.tensor([1, 2, 3, 4, 5] if reduction == "none" else 0.7, dtype=torch.float64)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = F.cross_entropy(leaves[0] @ leaves[1].t(), labels, label_smoothing=smoothing, reduction=reduction)
    options = (-100, smoothing, 0.0, reduction)
    torch.testing.assert_close(linear_cross_entropy_reference(x, weight, labels, *options), expected.detach())
    gradients = torch.autograd.grad(expected, leaves, share)
    found = linear_cross_entropy_backward_reference(x, weight, labels, share, *options)
    for got, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-14)
    for wanted in ((True, False), (False, True), (False, False)):
        pair = linear_cross_entropy_backward_reference(x, weight, labels, share, *options, False, wanted)
        for got, right, want in zip(pair, gradients, wanted, strict=True):
            assert got.shape == (right.shape if want else (0,))
