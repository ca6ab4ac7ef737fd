"""The definitions of a decode step's linear layers: compositions, the packed key, the quantised forms."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.decode_linear import (
    decode_linear_residual_reference,
    norm_head_reference,
    norm_linear_reference,
    norm_linear_swiglu_reference,
)
from tritium.kernels.linear import linear_reference, linear_residual_reference, linear_swiglu_reference
from tritium.kernels.quantised_linear import dequantise_reference, quantise
from tritium.kernels.rms_norm import rms_norm_reference

NAN, INF = float("nan"), float("inf")


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, the norm's weight, a weight, a bias, a residual."""
    torch.manual_seed(0)
    x, gain, weight, bias, residual = (torch.randn(*shape) for shape in ((3, 80), (80,), (6, 80), (6,), (3, 6)))
    return tuple(tensor.to(dtype) for tensor in (x, gain, weight, bias, residual))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_they_are_the_steps_one_after_another(dtype: torch.dtype) -> None:
    x, gain, weight, bias, residual = drawn(dtype)
    normed = rms_norm_reference(x, gain, 1e-5)
    assert torch.equal(norm_linear_reference(x, gain, 1e-5, weight, bias), linear_reference(normed, weight, bias))
    assert torch.equal(norm_linear_reference(x, None, 1e-5, weight), linear_reference(x, weight))
    assert torch.equal(
        norm_linear_swiglu_reference(x, gain, 1e-5, weight, bias), linear_swiglu_reference(normed, weight, bias)
    )
    before = residual.clone()
    assert torch.equal(
        decode_linear_residual_reference(x, weight, bias, residual),
        linear_residual_reference(x, weight, bias, residual),
    )
    assert torch.equal(residual, before)
    assert torch.equal(norm_head_reference(x, gain, 1e-5, weight)[0], linear_reference(normed, weight))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_weight_is_not_rounded(bits: int) -> None:
    x, gain, weight, bias, residual = drawn()
    values, scale = quantise(weight.float(), bits)
    whole = dequantise_reference(values, scale.double())[:, :80]
    normed = rms_norm_reference(x, gain, 1e-5)
    out = norm_linear_reference(x, gain, 1e-5, values, bias, scale.double())
    torch.testing.assert_close(out, linear_reference(normed, whole, bias), rtol=1e-12, atol=1e-12)
    out = norm_linear_swiglu_reference(x, gain, 1e-5, values, bias, scale.double())
    torch.testing.assert_close(out, linear_swiglu_reference(normed, whole, bias), rtol=1e-12, atol=1e-12)
    out = decode_linear_residual_reference(x, values, bias, residual, scale.double())
    torch.testing.assert_close(out, residual + linear_reference(x, whole, bias), rtol=1e-12, atol=1e-12)
    logits, _ = norm_head_reference(x, gain, 1e-5, values, scale.double())
    torch.testing.assert_close(logits, linear_reference(normed, whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_packed_key_orders_as_the_logits_do(dtype: torch.dtype) -> None:
    """x is one, so a column's logit is its weight: both zeros are one, of equals the first, NaN above all."""
    rows = [
        [-INF, -3.0, -0.5, -0.0, 0.0, 0.5, 3.0, INF],
        [0.0, -0.0, 1.0, 1.0, 0.5, 1.0, -2.0, 0.0],
        [-0.0, 0.0, -1.0, -2.0, -INF, -1.0, -1.0, -1.0],
        [-INF] * 8,
        [5.0, INF, NAN, 3.0, NAN, INF, -1.0, 0.0],
    ]
    expected = [7, 2, 0, 0, 2]
    for row, first in zip(rows, expected, strict=True):
        weight = torch.tensor(row, dtype=dtype).unsqueeze(1)
        logits, best = norm_head_reference(torch.ones(1, 1, dtype=dtype), None, 0.0, weight)
        assert torch.equal(logits.nan_to_num(7.5), weight.t().nan_to_num(7.5))
        assert 0x7FFFFFFF - (best.item() & 0x7FFFFFFF) == first
    ascending = torch.tensor([[-INF], [-2.0], [-1e-3], [0.0], [1e-3], [2.0], [INF]], dtype=dtype)
    bests = [norm_head_reference(torch.ones(1, 1, dtype=dtype), None, 0.0, row[None])[1].item() for row in ascending]
    assert bests == sorted(bests)
    assert len(set(bests)) == 7
    assert min(bests) > 0  # what the kernel's atomic maximum begins with is below all


def test_columns_from_the_limit_on_are_no_tokens() -> None:
    x, gain, weight, _, _ = drawn()
    logits, best = norm_head_reference(x, gain, 1e-5, weight, None, 4)
    whole = linear_reference(rms_norm_reference(x, gain, 1e-5), weight)
    assert torch.equal(logits[:, :4], whole[:, :4])
    assert (logits[:, 4:] == -INF).all()
    assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), whole[:, :4].argmax(1))
    nothing, first = norm_head_reference(x, gain, 1e-5, weight, None, 0)
    assert (nothing == -INF).all()
    assert torch.equal(0x7FFFFFFF - (first & 0x7FFFFFFF), torch.zeros(3, dtype=torch.int64))
