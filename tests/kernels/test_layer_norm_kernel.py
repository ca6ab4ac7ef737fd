"""The layer-norm kernel: the rule, its rounding, the two-pass variance, batch invariance, views, what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels.layer_norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_backward_reference,
    layer_norm_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-5
WIDTHS = [1, 16, 56, 80, 128, 257, 768, 1025]
FULL = [(rows, width) for rows in (1, 17, 4096) for width in (64, 96, 768, 1024, 1600, 4096, 4097, 12288, 20000, 32768)]


def affine(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return draw(width, dtype=dtype, seed=1), draw(width, dtype=dtype, seed=2)


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = EPS) -> None:
    args = (x, weight, bias, eps)
    what = f"{list(x.shape)} weight {weight is not None} bias {bias is not None}"
    assert_rule(layer_norm(*args), layer_norm_reference(*args), truth_of(layer_norm_reference, *args), what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rule(width: int, dtype: torch.dtype) -> None:
    weight, bias = affine(width, dtype)
    x = draw(5, width, dtype=dtype, scale=2.0) + 1
    check(x, weight, bias)
    check(x[:3], weight, None)
    check(x[:1], None, bias)
    check(x[:2], None, None)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), FULL)
def test_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    check(draw(rows, width, dtype=dtype), *affine(width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Squares beyond float16's range, and rows so small that eps decides."""
    check(draw(3, 96, dtype=dtype, scale=scale), *affine(96, dtype))


def test_eps_is_inside_the_root() -> None:
    """Rows of +-3 with eps 7 normalise to exactly +-0.75: the biased variance, and eps added to it."""
    x = torch.tensor([[3.0, -3.0, -3.0, 3.0]], device=DEVICE)
    assert layer_norm(x, None, None, 7.0).tolist() == [[0.75, -0.75, -0.75, 0.75]]


@pytest.mark.parametrize("width", [80, 256])
def test_an_offset_much_larger_than_the_spread(width: int) -> None:
    """E[x^2] - E[x]^2 in float32 would lose the variance, 1, beside the mean's square, 1e8."""
    x = draw(4, width, dtype=torch.float32) + 1e4
    truth = truth_of(layer_norm_reference, x, None, None, EPS)
    torch.testing.assert_close(layer_norm(x, None, None, EPS).double(), truth, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_gives_the_bias(dtype: torch.dtype) -> None:
    """No variance must not mean a division by zero, nor may the padding of 80 columns to 128 count as spread."""
    weight, bias = affine(80, dtype)
    x = torch.full((2, 80), 5.0, dtype=dtype, device=DEVICE)
    assert same_bits(layer_norm(x, weight, bias, EPS), bias.expand(2, 80))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once_at_the_end(dtype: torch.dtype) -> None:
    """Bit for bit the definition where float32 noise cannot decide; a rounding before the affine map would differ."""
    x, (weight, bias) = draw(32, 96, dtype=dtype), affine(96, dtype)
    exact = truth_of(layer_norm_reference, x, weight, bias, EPS)
    certain = (exact * (1 - 2e-6) - 2e-6).to(dtype) == (exact * (1 + 2e-6) + 2e-6).to(dtype)
    assert certain.float().mean() > 0.9
    assert torch.equal(layer_norm(x, weight, bias, EPS)[certain], exact.to(dtype)[certain])
    early = truth_of(layer_norm_reference, x, None, None, EPS).to(dtype) * weight + bias
    assert (early != exact.to(dtype)).float().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [56, 128, 768])
def test_batch_invariance(width: int, dtype: torch.dtype) -> None:
    """A row's bits: alone, among 1 to 17, at another place, beside NaN."""
    x, (weight, bias) = draw(17, width, dtype=dtype), affine(width, dtype)
    whole = layer_norm(x, weight, bias, EPS)
    for rows in range(1, 18):
        assert same_bits(layer_norm(x[:rows], weight, bias, EPS), whole[:rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(layer_norm(x[order], weight, bias, EPS), whole[order])
    poisoned = torch.full_like(x, float("nan"))
    poisoned[8] = x[8]
    assert same_bits(layer_norm(poisoned, weight, bias, EPS)[8], whole[8])


def test_views_and_empty_input() -> None:
    """Strided rows, a transposed last dimension, more dimensions, strided weights, no rows, no columns."""
    storage = draw(6, 4, 160, dtype=torch.float32)
    weight, bias = draw(160, dtype=torch.float32, seed=1)[::2], draw(160, dtype=torch.float32, seed=2)[1::2]
    for x in (storage[:, 1, :80], storage[::2, :, 40:120], storage[:, :, :80].transpose(0, 1), storage[0, 0, :80]):
        y = layer_norm(x, weight, bias, EPS)
        assert y.is_contiguous()
        assert same_bits(y, layer_norm(x.contiguous(), weight.clone(), bias.clone(), EPS))
        check(x, weight, bias)
    turned = draw(80, 6, dtype=torch.float32).t()
    assert same_bits(layer_norm(turned, weight, bias, EPS), layer_norm(turned.contiguous(), weight, bias, EPS))
    assert layer_norm(storage[:0], None, None, EPS).shape == (0, 4, 160)
    assert layer_norm(storage[..., :0], None, None, EPS).shape == (6, 4, 0)


def test_the_input_is_not_overwritten() -> None:
    x, (weight, bias) = draw(3, 80, dtype=torch.bfloat16), affine(80, torch.bfloat16)
    before = [tensor.clone() for tensor in (x, weight, bias)]
    layer_norm(x, weight, bias, EPS)
    assert all(same_bits(a, b) for a, b in zip((x, weight, bias), before, strict=True))


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks; neighbouring rows would hide a column too many, but for the last."""
    rooms = room_around_outputs(monkeypatch)
    for width in (57, 128, 257):
        assert layer_norm(draw(3, width, dtype=torch.float32), None, None, EPS).ne(7).all()
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    x = torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE).as_strided((3, 128), (apart, 1))
    x.copy_(draw(3, 128, dtype=torch.float16))
    assert same_bits(layer_norm(x, None, None, EPS), layer_norm(x.contiguous(), None, None, EPS))


@needs_gpu
@pytest.mark.parametrize("width", [768, 8192])
def test_no_race(width: int) -> None:
    x, (weight, bias) = draw(300, width, dtype=torch.bfloat16), affine(width, torch.bfloat16)
    first = layer_norm(x, weight, bias, EPS)
    assert all(same_bits(layer_norm(x, weight, bias, EPS), first) for _ in range(200))


def test_refuses_what_does_not_fit() -> None:
    x = draw(2, 64, dtype=torch.float32)
    with pytest.raises(TypeError, match="float64"):
        layer_norm(x.double(), None, None, EPS)
    with pytest.raises(ValueError, match=r"weight must be \[64\] torch.float32"):
        layer_norm(x, x[0, :32], None, EPS)
    with pytest.raises(ValueError, match=r"bias must be \[64\] torch.float32 like x, got \[64\] torch.float16"):
        layer_norm(x, None, x[0].half(), EPS)
    with pytest.raises(ValueError, match="wider than 32768"):
        layer_norm(torch.zeros(1, 32769, device=DEVICE), None, None, EPS)
    with pytest.raises(ValueError, match="without dimensions"):
        layer_norm(x[0, 0], None, None, EPS)


@pytest.mark.parametrize("with_affine", [True, False])
def test_registered(with_affine: bool) -> None:
    op, x = torch.ops.tritium.layer_norm, draw(3, 64, dtype=torch.float32)
    args = (x, *(affine(64, torch.float32) if with_affine else (None, None)), EPS)
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*args)
    assert same_bits(compiled, op(*args))
    assert same_bits(op(*args), layer_norm(*args))


def given(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0, offset: float = 1.0) -> Any:
    """dy, x and the weight."""
    x = draw(rows, width, dtype=dtype, scale=scale) + offset
    return draw(rows, width, dtype=dtype, seed=3) + 0.5, x, draw(width, dtype=dtype, seed=1)


def check_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float = EPS) -> None:
    """Against autograd of the definition in float64."""
    found = layer_norm_backward(dy, x, weight, eps)
    reference = layer_norm_backward_reference(dy, x, weight, eps)
    wide_x, wide_dy = x.double().requires_grad_(), dy.double()
    scale = torch.ones_like(wide_x.reshape(-1, x.shape[-1])[0]) if weight is None else weight.double()
    wide: Any = [wide_x, scale.detach().requires_grad_(), torch.zeros_like(scale).requires_grad_()]
    truth = torch.autograd.grad(layer_norm_reference(*wide, eps), wide, wide_dy)
    for name, mine, theirs, exact in zip(("dx", "dweight", "dbias"), found, reference, truth, strict=True):
        assert_rule(mine, theirs, exact, f"{name} of {list(x.shape)} weight {weight is not None}")


BACKWARD = [(5, 1), (3, 16), (513, 56), (5, 80), (257, 128), (3, 257), (66, 768), (33, 1025), (2, 2049), (9, 4100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), BACKWARD)
def test_backward_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    """One partial sum and two, rows whole and in pieces."""
    dy, x, weight = given(rows, width, dtype)
    check_backward(dy, x, weight)
    check_backward(dy[:2], x[:2], None)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), FULL)
def test_backward_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    check_backward(*given(rows, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_backward_of_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Squares beyond float16's range, and rows so small that eps decides."""
    check_backward(*given(3, 96, dtype, scale, offset=0.0))


@pytest.mark.parametrize("width", [80, 4100])
def test_backward_of_an_offset_much_larger_than_the_spread(width: int) -> None:
    """The mean comes first: E[x^2] - E[x]^2 would lose the variance."""
    dy, x, weight = given(2, width, torch.float32, offset=1e4)
    truth = truth_of(layer_norm_backward_reference, dy, x, weight, EPS)
    dx, dweight, _ = layer_norm_backward(dy, x, weight, EPS)
    torch.testing.assert_close(dx.double(), truth[0], rtol=0.0, atol=5e-3)
    torch.testing.assert_close(dweight.double(), truth[1], rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("width", [16, 4100])
def test_backward_counts_no_row_that_is_not_there(width: int) -> None:
    """Without an eps the scale of a row of zeros is infinite."""
    check_backward(*given(1, width, torch.float32), eps=0.0)


@pytest.mark.parametrize("width", [56, 768, 4100])
@pytest.mark.parametrize(("wants_weight", "wants_bias"), [(True, False), (False, True), (False, False)])
def test_backward_gives_what_is_wanted(width: int, wants_weight: bool, wants_bias: bool) -> None:
    """The bits are those of all three; what is not wanted is empty."""
    args = given(10, width, torch.float32)
    dx, dweight, dbias = layer_norm_backward(*args, EPS)
    found = layer_norm_backward(*args, EPS, wants_weight, wants_bias)
    assert same_bits(found[0], dx)
    assert same_bits(found[1], dweight if wants_weight else dweight[:0])
    assert same_bits(found[2], dbias if wants_bias else dbias[:0])


@pytest.mark.parametrize("width", [56, 768])
def test_backward_is_batch_invariant(width: int) -> None:
    """A row's dx, alone and among others; the sums' bits with rows behind that add nothing, and when taken twice."""
    dy, x, weight = given(70, width, torch.float32)
    dx, *sums = layer_norm_backward(dy, x, weight, EPS)
    for rows in (1, 2, 17, 65):
        assert same_bits(layer_norm_backward(dy[:rows], x[:rows], weight, EPS)[0], dx[:rows])
    longer = torch.cat((dy, torch.zeros_like(dy[:63]))), torch.cat((x, x[:63]))
    for args in ((dy, x), longer):
        assert all(same_bits(a, b) for a, b in zip(layer_norm_backward(*args, weight, EPS)[1:], sums, strict=True))


def test_backward_of_views_and_nothing() -> None:
    """Strided rows, a transposed last dimension, expanded gradients, more dimensions, no rows."""
    storage, more = draw(6, 4, 160, dtype=torch.float32), draw(6, 4, 160, dtype=torch.float32, seed=2)
    weight = draw(160, dtype=torch.float32, seed=1)[::2]
    views = [(more[:, 1, :80], storage[:, 2, 80:]), (more[::2, :, :80], storage[1::2, :, 40:120])]
    views += [
        (draw(80, 6, dtype=torch.float32).t(), storage[:, 0, :80]),
        (more[0, 0, 0].expand(6, 80), more[:, 3, :80]),
    ]
    for dy, x in views:
        before = dy.clone(), x.clone()
        check_backward(dy, x, weight)
        plain = layer_norm_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), EPS)
        assert all(same_bits(a, b) for a, b in zip(layer_norm_backward(dy, x, weight, EPS), plain, strict=True))
        assert same_bits(dy, before[0])
        assert same_bits(x, before[1])
    dx, *sums = layer_norm_backward(more[:0], storage[:0], None, EPS)
    assert dx.shape == (0, 4, 160)
    assert [out.tolist() for out in sums] == [[0.0] * 160] * 2


def test_backward_rows_beyond_int32_offsets() -> None:
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    far: Any = [
        torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE).as_strided((3, 128), (apart, 1)) for _ in "ab"
    ]
    near = draw(3, 128, dtype=torch.float16), draw(3, 128, dtype=torch.float16, seed=3)
    for view, values in zip(far, near, strict=True):
        view.copy_(values)
    expected = layer_norm_backward(*near, None, EPS)
    assert all(same_bits(a, b) for a, b in zip(layer_norm_backward(*far, None, EPS), expected, strict=True))


def test_backward_writes_nothing_beside_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = room_around_outputs(monkeypatch)
    for rows, width in ((3, 57), (2, 257), (2, 4100)):
        assert all(out.ne(7).all() for out in layer_norm_backward(*given(rows, width, torch.float32), EPS))
    assert len(rooms) >= 9
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_backward_refuses_what_does_not_fit() -> None:
    dy, x, weight = given(2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"dy must be like x, \[2, 64\] torch.float32, got \[1, 64\]"):
        layer_norm_backward(dy[:1], x, weight, EPS)
    with pytest.raises(ValueError, match=r"weight must be \[64\]"):
        layer_norm_backward(dy, x, x, EPS)


def test_gradients_of_the_operation() -> None:
    """Against autograd of the definition, twice over one graph, from an expanded gradient; none that is not needed."""
    results = []
    for operation in (torch.ops.tritium.layer_norm, layer_norm_reference):
        inputs: Any = [
            draw(*shape, dtype=torch.float32, seed=len(shape)).requires_grad_() for shape in ((5, 48), (48,), (48,))
        ]
        out = operation(*inputs, EPS)
        first = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        second = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
        results.append((*first, torch.autograd.grad(out.sum(), inputs[2])[0]))
        frozen = [inputs[0], inputs[1].detach(), inputs[2]]
        operation(*frozen, EPS).square().sum().backward()
        assert inputs[1].grad is None
        results[-1] += (inputs[0].grad, inputs[2].grad)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_affine", [True, False])
def test_backward_registered(with_affine: bool) -> None:
    """opcheck of the backward itself and, with gradients, of the forward; compiled, the same bits."""
    dy, x, weight = given(3, 64, torch.float32)
    args = (dy, x, weight if with_affine else None, EPS, with_affine, with_affine)
    torch.library.opcheck(torch.ops.tritium.layer_norm_backward, args)
    op = torch.ops.tritium.layer_norm
    inputs = [x, *(affine(64, torch.float32) if with_affine else ())]
    for tensor in inputs:
        tensor.requires_grad_()
    rest = () if with_affine else (None, None)
    torch.library.opcheck(op, (*inputs, *rest, EPS))

    def loss(*args: Tensor) -> Tensor:
        return (op(*args, *rest, EPS) * dy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("width", [128, 4096, 20000])
def test_backward_no_race(width: int) -> None:
    args = given(300, width, torch.bfloat16)
    first = layer_norm_backward(*args, EPS)
    for _ in range(100):
        assert all(same_bits(a, b) for a, b in zip(layer_norm_backward(*args, EPS), first, strict=True))
