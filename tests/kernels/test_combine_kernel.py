"""The combining kernel and its gradient's: the rule, roundings, batch invariance, views, refusals."""

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.combine import combine, combine_backward, combine_backward_reference, combine_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 1), (1, 8, 80), (3, 2, 255), (2, 3, 257), (2, 8, 513), (2, 17, 40)]  # the last is not unrolled
Inputs = tuple[Tensor, Tensor, Tensor]


def drawn(tokens: int, k: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Inputs:
    return (
        draw(tokens * k, width, dtype=dtype, seed=1, scale=scale),
        draw(tokens, k, dtype=dtype, seed=2).abs(),
        draw(tokens, width, dtype=dtype, seed=3, scale=3 * scale),
    )


def check(*inputs: Tensor) -> Tensor:
    out = combine(*inputs)
    assert_rule(out, combine_reference(*inputs), truth_of(combine_reference, *inputs), str(list(inputs[0].shape)))
    return out


def narrowed(inputs: Inputs, tokens: slice | Tensor) -> Inputs:
    """What belongs to some of the tokens."""
    outputs, weights, residual = inputs
    chosen = outputs.unflatten(0, weights.shape)[tokens]
    return chosen.flatten(0, 1), weights[tokens], residual[tokens]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "width"), SHAPES)
def test_rule(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    check(*drawn(tokens, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_for_many_tokens(dtype: torch.dtype) -> None:
    """Above 64 tokens another configuration runs."""
    check(*drawn(65, 2, 24, dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "width"), [(8, 2048), (8, 4096), (8, 7168), (1, 2047), (4, 1365), (16, 8192)])
def test_rule_in_full(k: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 16, 65, 2048):
        check(*drawn(tokens, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(*drawn(2, 4, 96, dtype, scale))


def test_row_by_row() -> None:
    """By hand: token t's j-th expert is row t * k + j, and has weight [t, j]."""
    outputs = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], device=DEVICE)
    weights = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], device=DEVICE)
    residual = torch.tensor([[100.0, 200.0], [300.0, 400.0]], device=DEVICE)
    assert combine(outputs, weights, residual).tolist() == [[102.0, 220.0], [305.0, 450.0]]


@pytest.mark.parametrize("k", [8, 16, 17, 64])
def test_sums_in_order_by_fused_multiply_adds_and_adds_the_residual_last(k: int) -> None:
    """To the bit, in float32: another order, a product that rounds, a residual that comes first would each differ."""
    outputs, weights, residual = drawn(2, k, 256, torch.float32)
    total = torch.zeros(2, 256, dtype=torch.float64, device=DEVICE)
    for j in range(k):
        # A product of two float32 is exact in float64, and so, nearly always, is that and one more rounded once.
        exact = weights[:, j, None].double() * outputs.unflatten(0, (2, k))[:, j].double() + total
        total = exact.float().double()
    expected = (total + residual.double()).float()
    assert (combine(outputs, weights, residual) == expected).float().mean() == 1
    first = residual.clone()
    for j in range(k):
        first = torch.addcmul(first, outputs.unflatten(0, (2, k))[:, j], weights[:, j, None])
    assert (first != expected).float().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    inputs = drawn(4, 4, 128, dtype)
    exact = truth_of(combine_reference, *inputs)
    certain = (exact - 1e-5).to(dtype) == (exact + 1e-5).to(dtype)
    assert certain.float().mean() > 0.9
    assert torch.equal(combine(*inputs)[certain], exact.to(dtype)[certain])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's bits: alone, among 1 to 17, under any launch, at another place, beside NaN."""
    inputs = drawn(17, 3, 96, dtype)
    whole = combine(*inputs)
    for tokens in range(1, 18, 1 if DEVICE == "cuda" else 4):
        assert same_bits(combine(*narrowed(inputs, slice(tokens))), whole[:tokens])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(combine(*narrowed(inputs, order)), whole[order])
    poisoned: Inputs = tuple(torch.full_like(x, float("nan")) for x in inputs)  # type: ignore[assignment]
    for alone, x in zip(narrowed(poisoned, slice(8, 9)), narrowed(inputs, slice(8, 9)), strict=True):
        alone.copy_(x)
    assert same_bits(combine(*poisoned)[8], whole[8])
    for use in ({"BLOCK_N": 32, "num_warps": 2}, {"BLOCK_N": 1024, "num_warps": 8}):
        monkeypatch.setattr(tuning, "config", lambda *args, use=use, **key: use)
        assert same_bits(combine(*narrowed(inputs, slice(2))), whole[:2])


def test_views_and_empty_input() -> None:
    storage = draw(6, 3, 96, dtype=torch.float32)
    outputs, weights, residual = storage[:, 0, :40], storage[0, :, :2], storage[:3, 2, 50:90]
    expected = combine(outputs.contiguous(), weights.contiguous(), residual.contiguous())
    assert same_bits(check(outputs, weights, residual), expected)
    turned = outputs.t().contiguous().t(), weights.t().contiguous().t(), residual.t().contiguous().t()
    assert same_bits(combine(*turned), expected)
    assert combine(outputs[:0], weights[:0], residual[:0]).shape == (0, 40)
    assert combine(outputs[:, :0], weights, residual[:, :0]).shape == (3, 0)


def test_the_inputs_are_not_overwritten() -> None:
    inputs = drawn(3, 2, 40, torch.bfloat16)
    before = [x.clone() for x in inputs]
    combine(*inputs)
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks; neighbouring rows would hide a column too many, but for the last."""
    rooms = room_around_outputs(monkeypatch)
    for width in (57, 256, 257):
        assert combine(*drawn(2, 2, width, torch.float32)).ne(7).all()
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    far, near = storage.as_strided((3, 32), (apart, 1)), storage[32:].as_strided((3, 32), (apart, 1))
    outputs, weights, residual = drawn(3, 1, 32, torch.float16)
    assert same_bits(combine(far.copy_(outputs), weights, near.copy_(residual)), combine(outputs, weights, residual))


@needs_gpu
def test_no_race() -> None:
    inputs = drawn(300, 8, 2048, torch.bfloat16)
    first = combine(*inputs)
    assert all(same_bits(combine(*inputs), first) for _ in range(200))


def test_refuses_what_does_not_fit() -> None:
    outputs, weights, residual = drawn(3, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"outputs must be \[6, 16\] for weights \[3, 2\], got \[5, 16\]"):
        combine(outputs[:5], weights, residual)
    with pytest.raises(ValueError, match=r"residual must be \[3, 16\] for weights \[3, 2\], got \[2, 16\]"):
        combine(outputs, weights, residual[:2])
    for bad in (weights[0], weights[:, :0]):
        with pytest.raises(ValueError, match=r"weights must be \[T, k\]"):
            combine(outputs, bad, residual)
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32, torch\.float16 and torch\.float32"):
        combine(outputs, weights.half(), residual)
    with pytest.raises(TypeError, match="float64"):
        combine(outputs.double(), weights.double(), residual.double())
    with pytest.raises(RuntimeError, match="computes no gradients"):
        combine(outputs, weights.clone().requires_grad_(), residual)


def test_registered() -> None:
    op, inputs = torch.ops.tritium.combine, drawn(3, 2, 16, torch.float32)
    torch.library.opcheck(op, inputs)
    torch.library.opcheck(op, tuple(x.clone().requires_grad_() for x in inputs))
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*inputs)
    assert same_bits(compiled, op(*inputs))
    assert same_bits(op(*inputs), combine(*inputs))


# The gradient


def autograds(dr: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Autograd's of the definition."""
    leaves = outputs.clone().requires_grad_(), weights.clone().requires_grad_()
    return torch.autograd.grad(combine_reference(*leaves, torch.zeros_like(dr)), leaves, dr)


def check_backward(outputs: Tensor, weights: Tensor, dr: Tensor) -> tuple[Tensor, Tensor]:
    args = dr, outputs, weights
    found, expected, truth = combine_backward(*args), combine_backward_reference(*args), truth_of(autograds, *args)
    for name, three in zip(("doutputs", "dweights"), zip(found, expected, truth, strict=True), strict=True):
        assert_rule(*three, f"{name} {list(outputs.shape)}")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "width"), [*SHAPES, (2, 2, 1030), (1, 3, 2049)])
def test_backward_rule(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    check_backward(*drawn(tokens, k, width, dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "width"), [(8, 2048), (8, 4096), (8, 7168), (1, 2047), (4, 1365), (16, 8192)])
def test_backward_rule_in_full(k: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 16, 65, 2048):
        check_backward(*drawn(tokens, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 50.0])
def test_backward_of_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check_backward(*drawn(2, 4, 96, dtype, scale))


def test_backward_row_by_row() -> None:
    """By hand: assignment t * k + j has token t's row of dr, and weight [t, j]."""
    outputs = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], device=DEVICE)
    weights = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], device=DEVICE)
    dr = torch.tensor([[2.0, 4.0], [6.0, 8.0]], device=DEVICE)
    doutputs, dweights = combine_backward(dr, outputs, weights)
    assert doutputs.tolist() == [[2.0, 4.0], [1.0, 2.0], [-6.0, -8.0], [12.0, 16.0]]
    assert dweights.tolist() == [[42.0, 84.0], [258.0, 344.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_batch_invariance(dtype: torch.dtype) -> None:
    """A token's bits: alone, among some, at another place, beside NaN, whatever its other experts gave."""
    outputs, weights, dr = drawn(9, 3, 520, dtype)

    def of(chosen: slice | Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, w, upstream = narrowed(tensors or (outputs, weights, dr), chosen)  # type: ignore[arg-type]
        doutputs, dweights = combine_backward(upstream, x, w)
        return doutputs.unflatten(0, w.shape), dweights

    whole = of(slice(None))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    for chosen in (slice(1), slice(2, 4), order):
        assert all(same_bits(got, expected[chosen]) for got, expected in zip(of(chosen), whole, strict=True))
    beside = tuple(torch.full_like(x, float("nan")) for x in (outputs, weights, dr))
    beside[0][13], beside[1][4, 1], beside[2][4] = outputs[13], weights[4, 1], dr[4]
    found = of(slice(None), *beside)
    assert all(same_bits(got[4, 1], expected[4, 1]) for got, expected in zip(found, whole, strict=True))


def test_backward_views_inputs_and_empty_input(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, weights, dr = drawn(3, 2, 57, torch.float32)
    expected = check_backward(outputs, weights, dr)
    before = [x.clone() for x in (outputs, weights, dr)]
    storage = draw(6, 3, 96, dtype=torch.float32)
    strided = storage[:, 0, :57].copy_(outputs), storage[:3, 1, :2].copy_(weights), storage[:3, 2, 30:87].copy_(dr)
    turned = tuple(x.t().contiguous().t() for x in (outputs, weights, dr))
    for x, w, upstream in (strided, turned):
        assert all(same_bits(a, b) for a, b in zip(combine_backward(upstream, x, w), expected, strict=True))
    one = dr[:1].expand(3, 57)
    ones = combine_backward(one, outputs, weights), combine_backward(one.clone(), outputs, weights)
    assert all(same_bits(a, b) for a, b in zip(*ones, strict=True))
    assert all(same_bits(a, b) for a, b in zip((outputs, weights, dr), before, strict=True))
    shapes = [x.shape for x in combine_backward(dr[:0], outputs[:0], weights[:0])]
    assert shapes == [(0, 57), (0, 2)]
    nothing = combine_backward(dr[:, :0], outputs[:, :0], weights)
    assert (nothing[0].shape, nothing[1].tolist()) == ((6, 0), [[0.0, 0.0]] * 3)
    rooms = room_around_outputs(monkeypatch)
    assert all(x.ne(7).all() for x in combine_backward(dr, outputs, weights))
    assert len(rooms) == 2
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_backward_of_rows_beyond_int32_offsets() -> None:
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    far, near = storage.as_strided((3, 32), (apart, 1)), storage[32:].as_strided((3, 32), (apart, 1))
    outputs, weights, dr = drawn(3, 1, 32, torch.float16)
    expected = combine_backward(dr, outputs, weights)
    found = combine_backward(near.copy_(dr), far.copy_(outputs), weights)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@needs_gpu
def test_backward_has_no_race() -> None:
    outputs, weights, dr = drawn(300, 8, 2048, torch.bfloat16)
    first = combine_backward(dr, outputs, weights)
    for _ in range(100):
        assert all(same_bits(a, b) for a, b in zip(combine_backward(dr, outputs, weights), first, strict=True))


def test_backward_refuses_what_does_not_fit() -> None:
    outputs, weights, dr = drawn(3, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"dr must be \[3, 16\] for weights \[3, 2\], got \[2, 16\]"):
        combine_backward(dr[:2], outputs, weights)
    with pytest.raises(ValueError, match=r"weights must be \[T, k\] and dr \[T, N\], got \[2\] and \[3, 16\]"):
        combine_backward(dr, outputs, weights[0])
    with pytest.raises(TypeError, match="one dtype"):
        combine_backward(dr, outputs, weights.half())
    with pytest.raises(RuntimeError, match="computes no gradients"):
        combine_backward(dr, outputs.clone().requires_grad_(), weights)


def test_registered_gradient() -> None:
    """combine's gradient is this kernel, and the residual's is what it is given; traced, they are the same."""
    inputs, dr = drawn(3, 2, 16, torch.float32), draw(3, 16, dtype=torch.float32, seed=5)
    torch.library.opcheck(torch.ops.tritium.combine_backward, (dr, *inputs[:2]))
    expected = *combine_backward(dr, *inputs[:2]), dr
    compiled = torch.compile(lambda *args: torch.ops.tritium.combine(*args), fullgraph=True, backend="aot_eager")
    for function in (torch.ops.tritium.combine, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(function(*leaves), leaves, dr)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    for index, want in enumerate(expected):
        given = [x.clone() for x in inputs]
        given[index].requires_grad_()
        out = torch.ops.tritium.combine(*given)
        assert same_bits(torch.autograd.grad(out, given[index], dr)[0], want)
