"""The layer-norm kernel: the rule, its rounding, the two-pass variance, batch invariance, views, what it refuses."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.layer_norm import layer_norm, layer_norm_reference

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
