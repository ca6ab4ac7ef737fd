"""What a token's experts gave, weighted, summed and added to the residual stream.

    r'[t] = r[t] + sum over j of weights[t, j] * outputs[t * k + j]           (Shazeer et al. 2017, arXiv:1701.06538)

The gradient, by the product rule, for the assignment a = t * k + j:

    doutputs[a] = weights[t, j] * dr'[t],   dweights[t, j] = outputs[a] . dr'[t],   dr = dr'

Shapes: outputs [T * k, N] by assignment (see routing.py), weights [T, k], r and r' [T, N]; gradients like what they are
of.
Rounding: the sum and the residual are in float32 (float64 stays) and round once to the dtype. The kernel takes j from 0
to k - 1 by fused multiply-adds, then adds the residual: an output's bits depend on nothing else. An assignment that is
in no expert may hold anything: it reaches its own token's row only, and its own weight's gradient. Gradients are in
float32 too, and round once; dweights is summed over N in blocks of a fixed size, by the width alone.
Floor: (T * k * N + 2 * T * N + T * k) * itemsize bytes moved; (2 k + 1) * T * N operations. Backward:
(2 * T * k * N + T * N + 2 * T * k) * itemsize bytes; 3 * k * T * N operations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import rows_of, wide, wide_dtype

WIDEST = 65535 * 128  # columns: blocks of the grid's second axis, at the smallest block of any table
UNROLLED = 16  # experts: their loads are all on their way at once; of many more, the code would take minutes to compile


def combine_reference(outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """The definition, in residual's dtype; the residual is not overwritten."""
    by_token = outputs.unflatten(0, weights.shape)
    total = torch.zeros_like(residual, dtype=wide_dtype(residual.dtype))
    for j in range(weights.shape[1]):
        total = torch.addcmul(total, wide(by_token[:, j]), wide(weights[:, j, None]))
    return (wide(residual) + total).to(residual.dtype)


def combine_backward_reference(dr: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient's definition: doutputs [T * k, N] and dweights [T, k] of dr [T, N]."""
    by_token, upstream = wide(outputs).unflatten(0, weights.shape), wide(dr)[:, None]
    doutputs = (wide(weights)[:, :, None] * upstream).flatten(0, 1)
    return doutputs.to(outputs.dtype), (by_token * upstream).sum(-1).to(weights.dtype)


@triton.jit
def _add(total, x_ptr, weight_ptr, mask):
    """One expert's share."""
    x = tl.load(x_ptr, mask=mask, other=0.0)
    return tl.fma(x.to(tl.float32), tl.load(weight_ptr).to(tl.float32), total)


@triton.jit
def _combine_kernel(
    outputs_ptr,  # [T K, N], rows `stride_x` apart
    weights_ptr,  # [T, K], contiguous
    residual_ptr,  # [T, N], rows `stride_r` apart
    y_ptr,  # [T, N], contiguous
    stride_x,
    stride_r,
    N: tl.constexpr,
    K: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    residual = tl.load(residual_ptr + row * stride_r + o_n, mask=m_n, other=0.0)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    if K <= UNROLLED:
        for j in tl.static_range(K):
            total = _add(total, outputs_ptr + (row * K + j) * stride_x + o_n, weights_ptr + row * K + j, m_n)
    else:
        for j in range(K):
            total = _add(total, outputs_ptr + (row * K + j) * stride_x + o_n, weights_ptr + row * K + j, m_n)
    y = residual.to(tl.float32) + total
    tl.store(y_ptr + row * N + o_n, y.to(y_ptr.dtype.element_ty), mask=m_n)


@triton.jit
def _combine_backward_kernel(
    doutputs_ptr,  # [T K, N], contiguous
    dweights_ptr,  # [T, K], contiguous
    dr_ptr,  # [T, N], rows `stride_r` apart
    outputs_ptr,  # [T K, N], rows `stride_x` apart
    weights_ptr,  # [T, K], contiguous
    stride_r,
    stride_x,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program owns an assignment: those of a token follow each other, and share its row of dr in the L2.
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        dr = tl.load(dr_ptr + row // K * stride_r + o_n, mask=m_n, other=0.0).to(tl.float32)
        x = tl.load(outputs_ptr + row * stride_x + o_n, mask=m_n, other=0.0).to(tl.float32)
        total = tl.fma(x, dr, total)
        tl.store(doutputs_ptr + row * N + o_n, (weight * dr).to(doutputs_ptr.dtype.element_ty), mask=m_n)
    tl.store(dweights_ptr + row, tl.sum(total, axis=0).to(dweights_ptr.dtype.element_ty))


def combine(outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """The kernel: r' [T, N], contiguous, of outputs [T * k, N], weights [T, k] and residual [T, N], which survives.

    All are float32, bfloat16 or float16, one for all; rows may be strided. Raises RuntimeError where no kernel can run,
    TypeError and ValueError for what does not fit.
    """
    tokens, k, width = _check(outputs, weights, residual, "residual")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one launch reaches")
    y = residual.new_empty((tokens, width))
    if not y.numel():
        return y
    outputs, residual = rows_of(outputs), rows_of(residual)
    options = dict(tuning.config("combine", outputs.device, rows=tokens))
    block = min(options.pop("BLOCK_N"), triton.next_power_of_2(width))
    launch(
        _combine_kernel,
        (tokens, triton.cdiv(width, block)),
        outputs,
        weights.contiguous(),
        residual,
        y,
        outputs.stride(0),
        residual.stride(0),
        N=width,
        K=k,
        UNROLLED=UNROLLED,
        BLOCK_N=block,
        **options,
    )
    return y


def combine_backward(dr: Tensor, outputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient's kernel: doutputs [T * k, N] and dweights [T, k], contiguous, of dr [T, N], outputs and weights.

    All are of one dtype, rows strided or not, and none is overwritten. Raises what `combine` raises.
    """
    tokens, k, width = _check(outputs, weights, dr, "dr")
    doutputs, dweights = outputs.new_empty((tokens * k, width)), weights.new_empty((tokens, k))
    if not doutputs.numel():
        return doutputs, dweights.zero_()
    outputs, dr = rows_of(outputs), rows_of(dr)
    options = dict(tuning.config("combine_backward", outputs.device, width=width))
    launch(
        _combine_backward_kernel,
        (tokens * k,),
        doutputs,
        dweights,
        dr,
        outputs,
        weights.contiguous(),
        dr.stride(0),
        outputs.stride(0),
        N=width,
        K=k,
        **options,
    )
    return doutputs, dweights


def _check(outputs: Tensor, weights: Tensor, by_token: Tensor, name: str) -> tuple[int, int, int]:
    """T, k and N; raises for what does not fit, of which `name` is what has a row for each token."""
    require(outputs, weights, by_token)
    if weights.dim() != 2 or by_token.dim() != 2 or not weights.shape[1]:
        given = f"{list(weights.shape)} and {list(by_token.shape)}"
        raise ValueError(f"weights must be [T, k] and {name} [T, N], got {given}")
    (tokens, k), width = weights.shape, by_token.shape[1]
    for what, tensor, shape in (("outputs", outputs, (tokens * k, width)), (name, by_token, (tokens, width))):
        if tensor.shape != shape:
            raise ValueError(f"{what} must be {list(shape)} for weights {[tokens, k]}, got {list(tensor.shape)}")
    if not outputs.dtype == weights.dtype == by_token.dtype:
        raise TypeError(f"all must be of one dtype, got {outputs.dtype}, {weights.dtype} and {by_token.dtype}")
    return tokens, k, width


def _gradient(inputs: Sequence[Tensor], needed: Sequence[bool], dr: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of outputs, weights and residual; autograd leaves aside what is not needed."""
    if dr is None:
        return None, None, None
    outputs, weights, _ = inputs
    doutputs = dweights = None
    if needed[0] or needed[1]:
        doutputs, dweights = torch.ops.tritium.combine_backward(dr, outputs, weights)
    return doutputs, dweights, dr


register(
    "combine(Tensor outputs, Tensor weights, Tensor residual) -> Tensor",
    combine,
    combine_reference,
    lambda outputs, weights, residual: residual.new_empty(residual.shape),
    _gradient,
)
register(
    "combine_backward(Tensor dr, Tensor outputs, Tensor weights) -> (Tensor, Tensor)",
    combine_backward,
    combine_backward_reference,
    lambda dr, outputs, weights: (outputs.new_empty(outputs.shape), weights.new_empty(weights.shape)),
)
