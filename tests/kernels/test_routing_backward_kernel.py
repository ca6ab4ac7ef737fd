"""The kernel of routing's gradient: the rule, NaN, batch invariance to the bit, views, what it refuses."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.routing import route_reference
from tritium.kernels.routing_backward import route_backward, route_backward_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of
from .test_routing_kernel import WIDTHS

pytestmark = pytest.mark.usefixtures("poisoned")
INF, NAN = math.inf, math.nan
Inputs = tuple[Tensor, Tensor, Tensor]


def drawn(tokens: int, count: int, k: int, dtype: torch.dtype, scale: float = 2.0) -> Inputs:
    """dweights, logits and the experts that these choose."""
    logits = draw(tokens, count, dtype=dtype, seed=count, scale=scale)
    return draw(tokens, k, dtype=dtype, seed=1), logits, route_reference(logits, k, True)[0]


def autograds(dweights: Tensor, logits: Tensor, experts: Tensor, renormalise: bool) -> Tensor:
    """Autograd's of the definition."""
    leaf = logits.clone().requires_grad_()
    chosen, weights = route_reference(leaf, experts.shape[1], renormalise)
    assert torch.equal(chosen, experts)
    return torch.autograd.grad(weights, leaf, dweights)[0]


def check(inputs: Inputs, renormalise: bool) -> Tensor:
    out = route_backward(*inputs, renormalise)
    truth, what = truth_of(autograds, *inputs, renormalise), f"{list(inputs[1].shape)} {renormalise}"
    assert_rule(out, route_backward_reference(*inputs, renormalise), truth, what)
    assert_rule(out, autograds(*inputs, renormalise), truth, f"autograd {what}")
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("count", "k"), [*WIDTHS, (5, 5), (300, 2)])
def test_rule(count: int, k: int, renormalise: bool, dtype: torch.dtype) -> None:
    """Nine tokens: two whole programs and one more."""
    out = check(drawn(9, count, k, dtype), renormalise)
    assert not renormalise or out.ne(0).sum(1).le(k).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 0.3, 30.0])
def test_flat_and_steep_rows(scale: float, dtype: torch.dtype) -> None:
    for renormalise in (True, False):
        check(drawn(8, 128, 8, dtype, scale), renormalise)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "k"), [(128, 8), (60, 4), (256, 8), (257, 8), (512, 10), (1024, 8), (1000, 1000)])
def test_rule_in_full(count: int, k: int, dtype: torch.dtype) -> None:
    for tokens in (1, 16, 511, 2048):
        for renormalise in (True, False):
            check(drawn(tokens, count, k, dtype), renormalise)


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(dtype: torch.dtype) -> None:
    """As in the definition's test: three experts beside the padding to four, in either order."""
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0]] * 2, device=DEVICE).to(dtype)
    experts = torch.tensor([[0, 2], [2, 0]], dtype=torch.int32, device=DEVICE)
    dweights = torch.tensor([[8.0, 16.0], [16.0, 8.0]], device=DEVICE).to(dtype)
    for renormalise, expected in ((False, [0.0, -2.0, 2.0]), (True, [-16 / 9, 0.0, 16 / 9])):
        for row in route_backward(dweights, logits, experts, renormalise).tolist():
            assert row == pytest.approx(expected, rel=0.02, abs=0.02)


@pytest.mark.parametrize("renormalise", [True, False])
def test_what_is_not_a_number_stays_in_its_row(renormalise: bool) -> None:
    rows = [[1, 2, 3], [NAN, 2, 3], [INF, 2, 3], [-INF] * 3, [-INF, 2, 3], [3, 2, NAN], [INF, INF, 1], [1, 2, 3]]
    logits = torch.tensor(rows, device=DEVICE)
    experts, weights = route_reference(logits, 2, renormalise)
    dweights = draw(8, 2, dtype=torch.float32)
    dweights[7, 1] = NAN
    out, expected = (f(dweights, logits, experts, renormalise) for f in (route_backward, route_backward_reference))
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().all(1).tolist()[:7] == weights.isnan().all(1).tolist()[:7]
    assert out[7].isnan().any()
    assert out[[0, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [True, False])
def test_batch_invariance(renormalise: bool, dtype: torch.dtype) -> None:
    """A token's bits: alone, among 1 to 17, at another place, beside NaN."""
    inputs = drawn(17, 60, 4, dtype)
    whole = route_backward(*inputs, renormalise)
    for tokens in (1, 2, 5, 16):
        assert same_bits(route_backward(*(x[:tokens] for x in inputs), renormalise), whole[:tokens])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(route_backward(*(x[order] for x in inputs), renormalise), whole[order])
    beside = torch.full_like(inputs[0], NAN), torch.full_like(inputs[1], NAN), inputs[2]
    for nan, x in zip(beside, inputs, strict=True):
        nan[9] = x[9]
    assert same_bits(route_backward(*beside, renormalise)[9], whole[9])


def test_views_inputs_and_empty_input(monkeypatch: pytest.MonkeyPatch) -> None:
    dweights, logits, experts = drawn(6, 20, 3, torch.float32)
    expected = route_backward(dweights, logits, experts, False)
    before = [x.clone() for x in (dweights, logits, experts)]
    for turn in (
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    ):
        assert same_bits(route_backward(turn(dweights), turn(logits), turn(experts), False), expected)
    one = dweights[:1].expand(6, 3)
    assert same_bits(route_backward(one, logits, experts, True), route_backward(one.clone(), logits, experts, True))
    assert all(same_bits(a, b) for a, b in zip((dweights, logits, experts), before, strict=True))
    assert route_backward(dweights[:0], logits[:0], experts[:0], True).shape == (0, 20)
    rooms = room_around_outputs(monkeypatch)
    assert route_backward(dweights, logits, experts, False).ne(7).all()
    (room,) = rooms
    assert room[:64].eq(7).all()
    assert room[-64:].eq(7).all()


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    dweights, logits, experts = drawn(3, 16, 2, torch.float16)
    expected = route_backward(dweights, logits, experts, False)
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    far, near = storage.as_strided((3, 16), (apart, 1)), storage[32:].as_strided((3, 2), (apart, 1))
    assert same_bits(route_backward(near.copy_(dweights), far.copy_(logits), experts, False), expected)


@needs_gpu
def test_no_race() -> None:
    inputs = drawn(2048, 128, 8, torch.bfloat16)
    first = route_backward(*inputs, True)
    assert all(same_bits(route_backward(*inputs, True), first) for _ in range(100))


def test_refuses_what_does_not_fit() -> None:
    dweights, logits, experts = drawn(2, 8, 3, torch.float32)
    for bad in (logits[0], draw(2, 1025, dtype=torch.float32), logits[:, :0]):
        with pytest.raises(ValueError, match="1 to 1024 experts"):
            route_backward(dweights, bad, experts, True)
    for wrong in (experts[:1], experts[0], experts[:, :0], experts.repeat(1, 3)):
        with pytest.raises(ValueError, match=r"experts must be \[2, k\], k from 1 to 8, for logits \[2, 8\], got "):
            route_backward(dweights, logits, wrong, True)
    with pytest.raises(ValueError, match=r"dweights must be \[2, 3\] as experts are, got \[2, 2\]"):
        route_backward(dweights[:, :2], logits, experts, True)
    with pytest.raises(TypeError, match=r"dweights must be torch\.float32 .* experts torch\.int32, got torch\.float16"):
        route_backward(dweights.half(), logits, experts, True)
    with pytest.raises(TypeError, match=r"got torch\.float32 and torch\.int64"):
        route_backward(dweights, logits, experts.long(), True)
    with pytest.raises(TypeError, match="float64"):
        route_backward(dweights.double(), logits.double(), experts, True)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        route_backward(dweights, logits.clone().requires_grad_(), experts, True)


@pytest.mark.parametrize("renormalise", [True, False])
def test_registered(renormalise: bool) -> None:
    """route's gradient is this kernel, of its own choice; traced, it is the same."""
    op, ops = torch.ops.tritium.route_backward, torch.ops.tritium
    inputs = drawn(3, 6, 2, torch.float32)
    torch.library.opcheck(op, (*inputs, renormalise))
    checks = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
    )  # the rest adds up all outputs
    torch.library.opcheck(ops.route, (inputs[1].clone().requires_grad_(), 2, renormalise), test_utils=checks)
    expected = route_backward(*inputs, renormalise)
    assert same_bits(op(*inputs, renormalise), expected)
    compiled = torch.compile(lambda x: ops.route(x, 2, renormalise)[1], fullgraph=True, backend="aot_eager")
    for weights_of in (lambda x: ops.route(x, 2, renormalise)[1], compiled):
        leaf = inputs[1].clone().requires_grad_()
        assert same_bits(torch.autograd.grad(weights_of(leaf), leaf, inputs[0])[0], expected)
    assert not ops.route(leaf, 2, renormalise)[0].requires_grad
