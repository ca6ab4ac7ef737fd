"""RMSNorm's definition against a naive one in float64, and its promised order of rounding."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.rms_norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference

HALVES = [torch.bfloat16, torch.float16]
EPS = 1e-6


def naive(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The formula, a number at a time, in Python's own float64."""
    rows = x.double().reshape(-1, x.shape[-1])
    weights = [1.0] * x.shape[-1] if weight is None else weight.double().tolist()
    out = torch.empty_like(rows)
    for r, row in enumerate(rows.tolist()):
        root = math.sqrt(sum(value * value for value in row) / len(row) + eps)
        for i, value in enumerate(row):
            out[r, i] = value / root * weights[i]
    return out.reshape(x.shape)


def unambiguous(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Where a few float32 units of error cannot change what `exact` rounds to."""
    return (exact * (1 - 1e-6)).to(dtype) == (exact * (1 + 1e-6)).to(dtype)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("width", [1, 56, 80, 257])
@pytest.mark.parametrize("weighted", [True, False])
def test_is_the_formula_in_float64(rows: int, width: int, weighted: bool) -> None:
    """A wrong divisor, a forgotten eps or weight would show."""
    torch.manual_seed(0)
    x = torch.randn(rows, width, dtype=torch.float64)
    weight = torch.randn(width, dtype=torch.float64) if weighted else None
    out = rms_norm_reference(x, weight, 0.3)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, naive(x, weight, 0.3), rtol=1e-13, atol=1e-13)


def test_eps_inside_the_root_decides_for_small_rows() -> None:
    """eps added outside the root, or to the sum instead of the mean, gives another number."""
    x = torch.full((1, 4), 3.0, dtype=torch.float64)
    assert rms_norm_reference(x, None, 7.0).tolist() == [[0.75] * 4]  # 3 / sqrt(9 + 7)


@pytest.mark.parametrize("dtype", HALVES)
def test_normalises_in_float32_rounds_then_multiplies(dtype: torch.dtype) -> None:
    """The published order, bit for bit; multiplying before the cast changes a quarter of the results."""
    torch.manual_seed(1)
    x, weight = torch.randn(64, 128).to(dtype), torch.randn(128).to(dtype)
    out = rms_norm_reference(x, weight, EPS)
    exact = naive(x, None, EPS)
    certain = unambiguous(exact, dtype)
    assert certain.float().mean() > 0.98
    expected = exact.to(dtype) * weight
    assert torch.equal(out[certain], expected[certain])
    multiplied_first = (exact * weight.double()).to(dtype)
    assert (multiplied_first != expected).float().mean() > 0.1  # else this test would prove nothing


@pytest.mark.parametrize("dtype", HALVES)
def test_agrees_with_the_code_checkpoints_were_trained_with(dtype: torch.dtype) -> None:
    """transformers' Qwen3RMSNorm, line by line: a difference would change tokens."""
    torch.manual_seed(2)
    x, weight = torch.randn(32, 96).to(dtype) * 5, torch.randn(96).to(dtype)
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    certain = unambiguous(hidden.double(), dtype)
    assert torch.equal(rms_norm_reference(x, weight, EPS)[certain], (weight * hidden.to(dtype))[certain])


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_are_not_taken_in_the_half_type(dtype: torch.dtype) -> None:
    """4096 ones and a large value: a sum kept in the half type would stop growing, and 300^2 overflows float16."""
    x = torch.ones(1, 4096)
    x[0, 0] = 300.0
    x = x.to(dtype)
    expected = naive(x, None, EPS).to(dtype)
    assert torch.equal(rms_norm_reference(x, None, EPS), expected)
    assert expected.isfinite().all()


def test_extreme_magnitudes_in_float32() -> None:
    """Below the eps nothing may vanish; at 1e15 the squares, 1e30, still fit float32."""
    torch.manual_seed(3)
    for scale in (1e-20, 1e-3, 1e15):
        x = torch.randn(3, 64) * scale
        out = rms_norm_reference(x, None, EPS)
        torch.testing.assert_close(out.double(), naive(x, None, EPS), rtol=2e-6, atol=0.0)
    assert rms_norm_reference(torch.zeros(2, 8), None, EPS).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_eps_as_a_tensor_is_the_same_bits(dtype: torch.dtype) -> None:
    """The hot loop's eps, built once, must not change a result."""
    torch.manual_seed(4)
    x, weight = (torch.randn(4, 64) * 1e-3).to(dtype), torch.randn(64).to(dtype)
    as_tensor = rms_norm_reference(x, weight, torch.full((), EPS, dtype=torch.float32))
    assert torch.equal(as_tensor, rms_norm_reference(x, weight, EPS))
    assert as_tensor.dtype == dtype


def test_non_contiguous_input_and_broadcast_weight() -> None:
    """Transposed and strided views, and the per-head weight [heads, N] that QK-norm passes."""
    torch.manual_seed(5)
    storage = torch.randn(16, 6, 4, dtype=torch.float64)
    x = storage.permute(2, 1, 0)[:, ::2]  # [4, 3, 16]
    assert not x.is_contiguous()
    weight = torch.randn(3, 16, dtype=torch.float64)
    expected = torch.stack([naive(x[:, head], weight[head], EPS) for head in range(3)], 1)
    torch.testing.assert_close(rms_norm_reference(x, weight, EPS), expected, rtol=1e-13, atol=1e-13)


def test_rows_do_not_mix_and_the_input_survives() -> None:
    """A NaN row poisons only itself, and nothing is normalised in place."""
    torch.manual_seed(6)
    x = torch.randn(3, 32)
    x[1] = math.nan
    before = x.clone()
    out = rms_norm_reference(x, None, EPS)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert out[1].isnan().all()
    assert torch.equal(out[::2], rms_norm_reference(x[::2], None, EPS))


def test_gradients() -> None:
    """Against finite differences, in x and weight."""
    torch.manual_seed(7)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm_reference(x, weight, 0.1), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm_reference(x, None, 0.1), (x,))


def test_the_gradient_of_a_row_of_zeros_is_finite() -> None:
    """A norm's own derivative at zero is 0 / 0: one such row would poison every weight."""
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm_reference(x, None, 0.25).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2, 4), 2.0))  # 1 / sqrt(eps)


def test_a_gradient_taken_twice_is_the_same() -> None:
    """A backward pass that overwrote what was saved would give another answer the second time."""
    torch.manual_seed(8)
    x = torch.randn(4, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    out = rms_norm_reference(x, weight, EPS)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, (x, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (x, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_backward_is_what_autograd_finds(rows: int, weighted: bool) -> None:
    """In float64, eps of the size of the squares: a factor lost, or the eps outside the root, would show."""
    torch.manual_seed(9)
    x, dy = torch.randn(2, rows, 7, dtype=torch.float64)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True) if weighted else None
    x.requires_grad_()
    wanted = [x] if weight is None else [x, weight]
    expected = torch.autograd.grad(rms_norm_reference(x, weight, 0.3), wanted, dy)
    with torch.no_grad():
        dx, dweight = rms_norm_backward_reference(dy, x, weight, 0.3)
        assert rms_norm_backward_reference(dy, x, weight, 0.3, False)[1].shape == (0,)
    found = [dx] if weight is None else [dx, dweight]
    assert dweight.shape == (7 if weighted else 0,)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_backward_of_a_weight_for_each_head() -> None:
    """Whatever the definition broadcasts, its gradient sums."""
    torch.manual_seed(10)
    x, dy = torch.randn(2, 4, 3, 16, dtype=torch.float64)
    weight = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(rms_norm_reference(x, weight, EPS), weight, dy)
    found = rms_norm_backward_reference(dy, x, weight.detach(), EPS)[1]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("streamed", [True, False])
def test_the_backward_with_a_residual(streamed: bool) -> None:
    """x and the residual receive the same: what came through the norm, and the sum's own gradient."""
    torch.manual_seed(11)
    x, residual, dy, dstream = torch.randn(4, 3, 5, dtype=torch.float64)
    weight = torch.randn(5, dtype=torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    y, stream = add_rms_norm_reference(*inputs, 0.3)
    (y * dy + stream * dstream * streamed).sum().backward()
    given = dstream if streamed else None
    dx, dweight = rms_norm_backward_reference(dy, x, weight, 0.3, True, residual, given)
    for mine, theirs in zip((dx, dx, dweight), inputs, strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_backward_rounds_once(dtype: torch.dtype) -> None:
    """Bit for bit the float64 gradient, rounded, where float32 noise cannot decide."""
    torch.manual_seed(12)
    x, dy, residual, dstream = torch.randn(4, 64, 128).to(dtype)
    weight = torch.randn(128).to(dtype)
    found = rms_norm_backward_reference(dy, x, weight, EPS, True, residual, dstream)
    stream = residual + x
    doubles = [tensor.double() for tensor in (dy, stream, weight)]
    exact = list(rms_norm_backward_reference(*doubles, EPS))
    exact[0] += dstream.double()
    for mine, truth in zip(found, exact, strict=True):
        certain = (truth * (1 - 1e-6) - 1e-6).to(dtype) == (truth * (1 + 1e-6) + 1e-6).to(dtype)
        assert certain.float().mean() > 0.9
        assert torch.equal(mine[certain], truth.to(dtype)[certain])
