"""The RMSNorm kernel: the rule, batch invariance, views, extremes, what it refuses."""

import pytest
import torch
from tritium.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

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
