"""The RMSNorm kernel: the rule, batch invariance, views, extremes, what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels.rms_norm import (
    add_partials,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
WIDTHS = [1, 16, 56, 80, 128, 257, 576, 1025]
FULL = [(rows, width) for rows in (1, 17, 4096) for width in (64, 128, 1024, 1536, 2048, 4096, 4097, 5120, 8192, 20000)]


def check(rows: int, width: int, dtype: torch.dtype, weighted: bool, scale: float = 1.0) -> None:
    x = draw(rows, width, dtype=dtype, scale=scale)
    weight = draw(width, dtype=dtype, seed=1) if weighted else None
    args = (x, weight, EPS)
    assert_rule(rms_norm(*args), rms_norm_reference(*args), truth_of(rms_norm_reference, *args), f"{rows}x{width}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rule(width: int, dtype: torch.dtype) -> None:
    check(5, width, dtype, weighted=True)
    check(3, width, dtype, weighted=False)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), FULL)
def test_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    check(rows, width, dtype, weighted=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Squares beyond float16's range, and rows so small that eps decides."""
    check(3, 96, dtype, weighted=True, scale=scale)
    assert rms_norm(torch.zeros(2, 64, dtype=dtype, device=DEVICE), None, EPS).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_comes_after_the_rounding(dtype: torch.dtype) -> None:
    """Bit for bit the definition's order where float32 noise cannot decide; multiplying first would differ."""
    x, weight = draw(64, 128, dtype=dtype), draw(128, dtype=dtype, seed=1)
    exact = truth_of(rms_norm_reference, x, None, EPS)
    certain = (exact * (1 - 1e-6)).to(dtype) == (exact * (1 + 1e-6)).to(dtype)
    assert certain.float().mean() > 0.97
    assert torch.equal(rms_norm(x, weight, EPS)[certain], (exact.to(dtype) * weight)[certain])
    assert ((exact * weight.double()).to(dtype) != exact.to(dtype) * weight).float().mean() > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [56, 128, 576])
def test_batch_invariance(width: int, dtype: torch.dtype) -> None:
    """A row's bits: alone, among 1 to 17, at another place, beside NaN."""
    x, weight = draw(17, width, dtype=dtype), draw(width, dtype=dtype, seed=1)
    whole = rms_norm(x, weight, EPS)
    for rows in range(1, 18):
        assert same_bits(rms_norm(x[:rows], weight, EPS), whole[:rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(rms_norm(x[order], weight, EPS), whole[order])
    poisoned = torch.full_like(x, float("nan"))
    poisoned[8] = x[8]
    assert same_bits(rms_norm(poisoned, weight, EPS)[8], whole[8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [80, 576])
def test_with_a_residual(width: int, dtype: torch.dtype) -> None:
    """The sum is the definition's to the bit, and what is normalised is the rounded sum; inputs survive."""
    x, residual, weight = (
        draw(5, width, dtype=dtype),
        draw(5, width, dtype=dtype, seed=2),
        draw(width, dtype=dtype, seed=1),
    )
    before = x.clone(), residual.clone()
    y, stream = add_rms_norm(x, residual, weight, EPS)
    assert same_bits(stream, residual + x)
    assert same_bits(y, rms_norm(stream, weight, EPS))
    assert same_bits(x, before[0])
    assert same_bits(residual, before[1])
    expected = add_rms_norm_reference(x, residual, weight, EPS)[0]
    assert_rule(y, expected, truth_of(rms_norm_reference, stream, weight, EPS))


def test_views_and_empty_input() -> None:
    """Strided rows, a transposed last dimension, more dimensions, no rows."""
    storage = draw(6, 4, 160, dtype=torch.float32)
    weight = draw(80, dtype=torch.float32, seed=1)
    for x in (storage[:, 1, :80], storage[::2, :, 40:120], storage[:, :, :80].transpose(0, 1)):
        assert same_bits(rms_norm(x, weight, EPS), rms_norm(x.contiguous(), weight, EPS))
    turned = draw(80, 6, dtype=torch.float32).t()
    assert same_bits(rms_norm(turned, weight, EPS), rms_norm(turned.contiguous(), weight, EPS))
    assert rms_norm(storage[:0], None, EPS).shape == (0, 4, 160)
    every_other = draw(160, dtype=torch.float32, seed=1)[::2]
    x = storage[:, 1, :80]
    assert same_bits(rms_norm(x, every_other, EPS), rms_norm(x, every_other.contiguous(), EPS))


def test_rows_beyond_int32_offsets() -> None:
    """The last row is more than 2^31 elements from the first, though one stride is not: int32 would wrap."""
    apart = 2**30 + 2**20
    count = 2 * apart + 128
    storage = torch.empty(count, dtype=torch.float16, device=DEVICE) if DEVICE == "cuda" else _untouched(count)
    x = storage.as_strided((3, 128), (apart, 1))
    x.copy_(draw(3, 128, dtype=torch.float16))
    assert same_bits(rms_norm(x, None, EPS), rms_norm(x.contiguous(), None, EPS))


def _untouched(count: int) -> torch.Tensor:
    """Host memory of which only the pages that are written are ever there: not poisoned."""
    torch.use_deterministic_algorithms(False)
    return torch.empty(count, dtype=torch.float16)


def test_refuses_what_does_not_fit() -> None:
    x = draw(2, 64, dtype=torch.float32)
    with pytest.raises(TypeError, match="float64"):
        rms_norm(x.double(), None, EPS)
    with pytest.raises(ValueError, match=r"weight must be \[64\] torch.float32"):
        rms_norm(x, x[0, :32], EPS)
    with pytest.raises(ValueError, match="without dimensions"):
        rms_norm(x[0, 0], None, EPS)
    with pytest.raises(ValueError, match="residual must be like x"):
        add_rms_norm(x, x[:1], None, EPS)
    with pytest.raises(ValueError, match="wider than 65536"):
        rms_norm(torch.zeros(1, 65537, device=DEVICE), None, EPS)


@pytest.mark.parametrize("residual", [False, True])
def test_registered(residual: bool) -> None:
    x, weight = draw(3, 64, dtype=torch.float32), draw(64, dtype=torch.float32, seed=1)
    op = torch.ops.tritium.add_rms_norm if residual else torch.ops.tritium.rms_norm
    args = (x, draw(3, 64, dtype=torch.float32, seed=2), weight, EPS) if residual else (x, weight, EPS)
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*args)
    eager = op(*args)
    for a, b in zip(compiled if residual else [compiled], eager if residual else [eager], strict=True):
        assert same_bits(a, b)


def given(rows: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x and the weight."""
    x = draw(rows, width, dtype=dtype, scale=scale)
    return draw(rows, width, dtype=dtype, seed=3), x, draw(width, dtype=dtype, seed=1)


def check_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, more: tuple[Tensor, ...] = (), eps: float = EPS
) -> None:
    """Against autograd of the definition in float64; `more` is the residual and the gradient of the sum."""
    found = rms_norm_backward(dy, x, weight, eps, True, *more)
    reference = rms_norm_backward_reference(dy, x, weight, eps, True, *more)
    stream = (more[0] + x if more else x).double().requires_grad_()
    wide = [stream] if weight is None else [stream, weight.double().requires_grad_()]
    out = rms_norm_reference(stream, None if weight is None else wide[1], eps)
    truth = list(torch.autograd.grad(out, wide, dy.double()))
    if more:
        truth[0] = truth[0] + more[1].double()
    for name, mine, theirs, exact in zip(("dx", "dweight"), found, reference, truth, strict=False):
        assert_rule(mine, theirs, exact, f"{name} of {list(x.shape)} residual {bool(more)}")
    assert weight is not None or found[1].shape == (0,)


BACKWARD = [(3, 16), (513, 56), (5, 80), (257, 128), (3, 257), (66, 576), (33, 1025), (2, 2049), (9, 4100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), BACKWARD)
def test_backward_rule(rows: int, width: int, dtype: torch.dtype) -> None:
    """One partial sum and two, rows whole and in pieces."""
    check_backward(*given(rows, width, dtype))


def test_backward_of_one_column() -> None:
    """dx is what rounding leaves of it: nearly all cancels."""
    dy, x, weight = given(5, 1, torch.float32)
    truth = truth_of(rms_norm_backward_reference, dy, x, weight, EPS)
    for mine, exact in zip(rms_norm_backward(dy, x, weight, EPS), truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [80, 576, 4100])
def test_backward_rule_with_a_residual_and_without_a_weight(width: int, dtype: torch.dtype) -> None:
    dy, x, weight = given(3, width, dtype)
    more = draw(3, width, dtype=dtype, seed=4), draw(3, width, dtype=dtype, seed=5)
    check_backward(dy, x, weight, more)
    check_backward(dy, x, None, more)
    check_backward(dy, x, None)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [*FULL, (17, 16384), (4096, 12288)])
def test_backward_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    dy, x, weight = given(rows, width, dtype)
    check_backward(dy, x, weight)
    check_backward(dy, x, weight, (draw(rows, width, dtype=dtype, seed=4), draw(rows, width, dtype=dtype, seed=5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_backward_of_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    """Squares beyond float16's range, and rows so small that eps decides."""
    check_backward(*given(3, 96, dtype, scale))


@pytest.mark.parametrize("width", [16, 4100])
def test_backward_counts_no_row_that_is_not_there(width: int) -> None:
    """Without an eps the scale of a row of zeros is infinite."""
    check_backward(*given(1, width, torch.float32), eps=0.0)


@pytest.mark.parametrize("width", [56, 576])
def test_backward_is_batch_invariant(width: int) -> None:
    """A row's dx, alone and among others; dweight's bits with rows behind that add nothing, and when taken twice."""
    dy, x, weight = given(70, width, torch.float32)
    dx, dweight = rms_norm_backward(dy, x, weight, EPS)
    for rows in (1, 2, 17, 65):
        assert same_bits(rms_norm_backward(dy[:rows], x[:rows], weight, EPS)[0], dx[:rows])
    assert same_bits(rms_norm_backward(dy, x, weight, EPS)[1], dweight)
    longer = torch.cat((dy, torch.zeros_like(dy[:63]))), torch.cat((x, x[:63]))
    assert same_bits(rms_norm_backward(*longer, weight, EPS)[1], dweight)


def test_backward_of_views_and_nothing() -> None:
    """Strided rows, a transposed last dimension, expanded gradients, more dimensions, no rows, no weight."""
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
        plain = rms_norm_backward(dy.contiguous(), x.contiguous(), weight.contiguous(), EPS)
        assert all(same_bits(a, b) for a, b in zip(rms_norm_backward(dy, x, weight, EPS), plain, strict=True))
        assert same_bits(dy, before[0])
        assert same_bits(x, before[1])
    streamed = (more[:, 0, :80], storage[:, 0, :80], weight, (storage[:, 1, :80], more[:, 1, 80:]))
    check_backward(*streamed)
    dx, dweight = rms_norm_backward(more[:0], storage[:0], draw(160, dtype=torch.float32), EPS)
    assert dx.shape == (0, 4, 160)
    assert dweight.tolist() == [0.0] * 160


def test_backward_rows_beyond_int32_offsets() -> None:
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    far: Any = [
        torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE).as_strided((3, 128), (apart, 1)) for _ in "ab"
    ]
    near = draw(3, 128, dtype=torch.float16), draw(3, 128, dtype=torch.float16, seed=3)
    for view, values in zip(far, near, strict=True):
        view.copy_(values)
    weight = draw(128, dtype=torch.float16, seed=1)
    expected = rms_norm_backward(*near, weight, EPS)
    assert all(same_bits(a, b) for a, b in zip(rms_norm_backward(*far, weight, EPS), expected, strict=True))


def test_backward_writes_nothing_beside_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = room_around_outputs(monkeypatch)
    for rows, width in ((3, 57), (2, 257), (2, 4100)):
        assert all(out.ne(7).all() for out in rms_norm_backward(*given(rows, width, torch.float32), EPS))
    assert len(rooms) >= 6
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_backward_refuses_what_does_not_fit() -> None:
    dy, x, weight = given(2, 64, torch.float32)
    with pytest.raises(ValueError, match=r"dy must be like x, \[2, 64\] torch.float32, got \[1, 64\]"):
        rms_norm_backward(dy[:1], x, weight, EPS)
    with pytest.raises(ValueError, match=r"residual must be like x, .* got \[2, 64\] torch.float16"):
        rms_norm_backward(dy, x, weight, EPS, True, x.half())
    with pytest.raises(ValueError, match="dstream must be like x"):
        rms_norm_backward(dy, x, weight, EPS, True, x, dy[:, :1])
    with pytest.raises(ValueError, match=r"weight must be \[64\]"):
        rms_norm_backward(dy, x, x, EPS)


def test_partial_sums_are_all_added() -> None:
    """More of them than are added side by side, of one gradient and of two; integers, so that sums are exact."""
    partials = torch.arange(2 * 300 * 40, dtype=torch.float32, device=DEVICE).reshape(2, 300, 40) % 97
    outs = torch.empty(40, device=DEVICE), torch.empty(40, device=DEVICE)
    add_partials(partials, *outs)
    assert all(torch.equal(out, expected) for out, expected in zip(outs, partials.sum(1), strict=True))


def leaves(*shapes: tuple[int, ...]) -> Any:
    return [draw(*shape, dtype=torch.float32, seed=index).requires_grad_() for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("uses", ["normalised", "stream", "both"])
def test_gradients_of_whichever_output_was_used(uses: str) -> None:
    """Of torch.ops against autograd of the definition, twice over one graph, from expanded gradients too."""
    results = []
    for operation in (torch.ops.tritium.add_rms_norm, add_rms_norm_reference):
        inputs = leaves((5, 48), (5, 48), (48,))
        y, stream = operation(*inputs, EPS)
        loss = {"normalised": y.sum(), "stream": stream.sum(), "both": y.sum() + (stream * stream).sum()}[uses]
        wanted = inputs if uses != "stream" else inputs[:2]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
        results.append(first)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one() -> None:
    """And a gradient that is used again is as it was."""
    x, residual, weight = leaves((3, 48), (3, 48), (48,))
    dy = draw(3, 48, dtype=torch.float32, seed=7)
    kept = dy.clone()
    both = torch.autograd.grad(torch.ops.tritium.rms_norm(x, weight, EPS), (x, weight), dy)
    assert same_bits(dy, kept)
    frozen = torch.ops.tritium.rms_norm(x, weight.detach(), EPS)
    assert same_bits(torch.autograd.grad(frozen, x, dy)[0], both[0])
    data = torch.ops.tritium.rms_norm(x.detach(), weight, EPS)
    assert same_bits(torch.autograd.grad(data, weight, dy)[0], both[1])
    torch.ops.tritium.add_rms_norm(x, residual.detach(), weight.detach(), EPS)[0].backward(dy)
    assert x.grad is not None
    assert residual.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("residual", [False, True])
def test_backward_registered(residual: bool) -> None:
    """opcheck of the backward itself and, with gradients, of the forward; compiled, the same bits."""
    dy, x, weight = given(3, 64, torch.float32)
    more = (draw(3, 64, dtype=torch.float32, seed=4), draw(3, 64, dtype=torch.float32, seed=5)) if residual else ()
    torch.library.opcheck(torch.ops.tritium.rms_norm_backward, (dy, x, weight, EPS, True, *more))
    torch.library.opcheck(torch.ops.tritium.rms_norm_backward, (dy, x, None, EPS, False, *more))
    op = torch.ops.tritium.add_rms_norm if residual else torch.ops.tritium.rms_norm
    inputs = leaves((3, 64), (3, 64), (64,)) if residual else leaves((3, 64), (64,))
    torch.library.opcheck(op, (*inputs, EPS))

    def loss(*args: Tensor) -> Tensor:
        out = op(*args, EPS)
        return (out[0] * dy + out[1]).sum() if residual else (out * dy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("width", [128, 4096, 20000])
def test_backward_no_race(width: int) -> None:
    args = given(300, width, torch.bfloat16)
    first = rms_norm_backward(*args, EPS)
    for _ in range(100):
        assert all(same_bits(a, b) for a, b in zip(rms_norm_backward(*args, EPS), first, strict=True))
