"""The gradients of the linear layer's registered forms: the rule, what is computed, one rounding, tracing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ..rule import DEVICE, DTYPES, assert_rule, draw, same_bits, truth_of
from .test_linear_kernel import FORMS, inputs

pytestmark = pytest.mark.usefixtures("poisoned")
OPS = {
    "plain": torch.ops.tritium.linear,
    "residual": torch.ops.tritium.linear_residual,
    "swiglu": torch.ops.tritium.linear_swiglu,
}
SHAPES = [(1, 1, 16), (2, 16, 56), (17, 65, 129), (33, 70, 72), (65, 24, 136)]


def gradients(function: Any, dy: Tensor, *args: Tensor | None) -> list[Tensor]:
    """Of all tensors among `args`."""
    given = [None if arg is None else arg.detach().requires_grad_() for arg in args]
    return list(torch.autograd.grad(function(*given), [arg for arg in given if arg is not None], dy))


def check(form: str, *shape: int, dtype: torch.dtype, biased: bool = True) -> None:
    args, dy = inputs(form, *shape, dtype=dtype, biased=biased), draw(*shape[:2], dtype=dtype, seed=7)
    reference = FORMS[form][1]
    found, expected = gradients(OPS[form], dy, *args), gradients(reference, dy, *args)
    truth = truth_of(lambda *given: gradients(reference, *given), dy, *args)
    for index, three in enumerate(zip(found, expected, truth, strict=True)):
        assert_rule(*three, f"{form} {shape} gradient {index}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule(shape: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    check(form, *shape, dtype=dtype, biased=shape[0] != 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32, and that no 16-bit accumulator holds."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (
        torch.randint(-15, 16, shape, generator=generator).to(dtype).to(DEVICE)
        for shape in ((300, 40), (24, 40), (300, 24))
    )
    bias = torch.zeros(24, dtype=dtype, device=DEVICE)
    found = gradients(OPS["plain"], dy, x, weight, bias)
    exact = dy.double() @ weight.double(), dy.double().t() @ x.double(), dy.double().sum(0)
    assert all(same_bits(a, b.to(dtype)) for a, b in zip(found, exact, strict=True))
    assert not torch.equal(exact[1].to(dtype).double(), exact[1])  # else this would prove nothing
    ones = torch.ones(4096, 24, dtype=dtype, device=DEVICE)
    assert gradients(OPS["plain"], ones, ones[:, :8], weight[:, :8], bias)[2].eq(4096).all()


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_wanted_is_computed(form: str) -> None:
    """No product for a frozen weight, nor for an input that nothing wants: each is a third of a training step."""
    args = inputs(form, 5, 6, 8, torch.float32)
    dy = draw(5, 6, dtype=torch.float32, seed=7)
    everything = gradients(OPS[form], dy, *args)
    for index, arg in enumerate(args):
        assert arg is not None
        given = [*args]
        given[index] = leaf = arg.detach().requires_grad_()
        out = OPS[form](*given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (gradient,) = torch.autograd.grad(out, leaf, dy)
        assert same_bits(gradient, everything[index])
        products = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
        assert products == (index < 2)


def test_views_no_tokens_and_a_bias_left_out() -> None:
    x, weight, bias = inputs("plain", 4, 6, 8, torch.float32)
    assert x is not None
    assert weight is not None
    assert bias is not None
    dy = draw(1, 6, dtype=torch.float32, seed=7)
    dx, dweight = gradients(OPS["plain"], dy.expand(4, 6), x, weight)
    assert same_bits(dx, gradients(OPS["plain"], dy.repeat(4, 1), x, weight)[0])
    turned = gradients(OPS["plain"], dy.expand(4, 6), x.t().contiguous().t(), weight.t().contiguous().t(), bias)
    for got, expected in zip(turned, (dx, dweight, 4 * dy[0]), strict=True):
        torch.testing.assert_close(got, expected)
    for form, op in OPS.items():
        args = inputs(form, 0, 6, 8, torch.float32)
        first, *rest = gradients(op, dy[:0], *args)
        assert first.shape == (0, 8)
        assert all(gradient.eq(0).all() and gradient.numel() for gradient in rest[:2])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_registered(form: str, biased: bool) -> None:
    """Traced whole, the backward pass too; the inputs survive it."""
    args = [None if arg is None else arg.requires_grad_() for arg in inputs(form, 3, 10, 16, torch.float32, biased)]
    before = [None if arg is None else arg.detach().clone() for arg in args]
    torch.library.opcheck(OPS[form], tuple(args))
    dy = draw(3, 10, dtype=torch.float32, seed=7)
    compiled = torch.compile(lambda *given: OPS[form](*given), fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradients(compiled, dy, *args), gradients(OPS[form], dy, *args), strict=True):
        assert same_bits(got, expected)
    assert all(a is b or same_bits(a.detach(), b) for a, b in zip(args, before, strict=True))
