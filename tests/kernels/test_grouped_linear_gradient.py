"""The gradients of a mixture of experts through the registered operations: of each product, of the whole, traced."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from tritium.kernels.grouped_linear import grouped_linear_reference, grouped_swiglu_reference
from tritium.kernels.grouped_linear_backward import grouped_linear_dweight, grouped_linear_dx

from ..rule import DTYPES, assert_rule, draw, same_bits, truth_of
from .test_grouped_linear_backward_kernel import autograds, drawn
from .test_grouped_linear_kernel import grouped, route

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("k", [1, 2])
def test_registered(k: int) -> None:
    dy, x, weight = drawn(3, 5, k, 10, 16, torch.float32)
    routing = grouped(route(3, 5, k), 5)
    torch.library.opcheck(torch.ops.tritium.grouped_linear_dx, (dy, weight, *routing))
    torch.library.opcheck(torch.ops.tritium.grouped_linear_dweight, (dy, x, *routing))
    assert same_bits(torch.ops.tritium.grouped_linear_dx(dy, weight, *routing), grouped_linear_dx(dy, weight, *routing))
    assert same_bits(torch.ops.tritium.grouped_linear_dweight(dy, x, *routing), grouped_linear_dweight(dy, x, *routing))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "swiglu"])
def test_gradients_of_the_registered_products(form: str, dtype: torch.dtype) -> None:
    """The rule, through autograd; each alone is what both together are; inputs survive."""
    gated = form == "swiglu"
    op = torch.ops.tritium.grouped_swiglu if gated else torch.ops.tritium.grouped_linear
    reference = grouped_swiglu_reference if gated else grouped_linear_reference
    _, x, weight = drawn(9, 4, 2, 2 * 12 if gated else 12, 40, dtype)
    dy, routing = draw(18, 12, dtype=dtype, seed=8), grouped(route(9, 4, 2), 4)
    before = [tensor.clone() for tensor in (x, weight)]
    found = autograds(op, dy, x, weight, *routing)
    expected = autograds(reference, dy, x, weight, *routing)
    truth = truth_of(lambda *args: autograds(reference, *args), dy, x, weight, *routing)
    for name, three in zip(("dx", "dweight"), zip(found, expected, truth, strict=True), strict=True):
        assert_rule(*three, name)
    leaf = x.clone().requires_grad_()
    assert same_bits(torch.autograd.grad(op(leaf, weight, *routing), leaf, dy)[0], found[0])
    leaf = weight.clone().requires_grad_()
    assert same_bits(torch.autograd.grad(op(x, leaf, *routing), leaf, dy)[0], found[1])
    torch.library.opcheck(op, (x.float().requires_grad_(), weight.float().requires_grad_(), *routing))
    assert all(same_bits(a, b) for a, b in zip((x, weight), before, strict=True))


def mixture(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, renormalise: bool = True) -> Tensor:
    """A whole feed-forward with experts, added to x."""
    ops = torch.ops.tritium
    experts, weights = ops.route(ops.linear(x, router), 2, renormalise)
    order, starts = ops.group(experts, router.shape[0])
    hidden = ops.grouped_swiglu(x, gate_up, order, starts, 2)
    return ops.combine(ops.grouped_linear(hidden, down, order, starts, 1), weights, x)


def by_token(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, renormalise: bool = True) -> Tensor:
    """The same, a token and an expert at a time, in plain PyTorch."""
    probabilities = (x @ router.t()).softmax(-1)
    values, experts = probabilities.topk(2)
    values = values / values.sum(-1, keepdim=True) if renormalise else values
    rows = []
    for token, value, chosen in zip(x, values, experts.tolist(), strict=True):
        row = token
        for share, expert in zip(value, chosen, strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            row = row + share * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_whole_mixture(renormalise: bool) -> None:
    """Its gradients are plain autograd's in float64; traced forward and backward without a break, the same bits."""
    shapes = (7, 16), (5, 16), (5, 24, 16), (5, 16, 12)
    tensors = [draw(*shape, dtype=torch.float32, seed=seed, scale=0.5) for seed, shape in enumerate(shapes)]
    dy = draw(7, 16, dtype=torch.float32, seed=9)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        return torch.autograd.grad(function(*leaves, renormalise), leaves, dy.to(dtype))

    found, truth = gradients(mixture), gradients(by_token, torch.float64)
    for got, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 0.1
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(gradients(compiled), found, strict=True))
