"""What a token's experts gave, weighted, summed and added to the residual stream.

    r'[t] = r[t] + sum over j of weights[t, j] * outputs[t * k + j]           (Shazeer et al. 2017, arXiv:1701.06538)

Shapes: outputs [T * k, N] by assignment (see routing.py), weights [T, k], r and r' [T, N].
Rounding: the sum and the residual are in float32 (float64 stays) and round once to the dtype. The kernel takes j from 0
to k - 1 by fused multiply-adds, then adds the residual: an output's bits depend on nothing else. An assignment that is
in no expert may hold anything: it reaches its own token's row only.
Floor: (T * k * N + 2 * T * N + T * k) * itemsize bytes moved; (2 k + 1) * T * N operations.
"""

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import wide, wide_dtype

WIDEST = 65535 * 128  # columns: blocks of the grid's second axis, at the smallest block of any table
UNROLLED = 16  # experts: their loads are all on their way at once; of many more, the code would take minutes to compile


def combine_reference(outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """The definition, in residual's dtype; the residual is not overwritten."""
    by_token = outputs.unflatten(0, weights.shape)
    total = torch.zeros_like(residual, dtype=wide_dtype(residual.dtype))
    for j in range(weights.shape[1]):
        total = torch.addcmul(total, wide(by_token[:, j]), wide(weights[:, j, None]))
    return (wide(residual) + total).to(residual.dtype)


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


def combine(outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """The kernel: r' [T, N], contiguous, of outputs [T * k, N], weights [T, k] and residual [T, N], which survives.

    All are float32, bfloat16 or float16, one for all; rows may be strided. Raises RuntimeError where no kernel can run,
    TypeError and ValueError for what does not fit.
    """
    require(outputs, weights, residual)
    if weights.dim() != 2 or residual.dim() != 2 or not weights.shape[1]:
        given = f"{list(weights.shape)} and {list(residual.shape)}"
        raise ValueError(f"weights must be [T, k] and residual [T, N], got {given}")
    (tokens, k), width = weights.shape, residual.shape[1]
    for name, tensor, shape in (("outputs", outputs, (tokens * k, width)), ("residual", residual, (tokens, width))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for weights {[tokens, k]}, got {list(tensor.shape)}")
    if not outputs.dtype == weights.dtype == residual.dtype:
        raise TypeError(f"all must be of one dtype, got {outputs.dtype}, {weights.dtype} and {residual.dtype}")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one launch reaches")
    y = residual.new_empty((tokens, width))
    if not y.numel():
        return y
    outputs = outputs if outputs.stride(1) == 1 else outputs.contiguous()
    residual = residual if residual.stride(1) == 1 else residual.contiguous()
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


register(
    "combine(Tensor outputs, Tensor weights, Tensor residual) -> Tensor",
    combine,
    combine_reference,
    lambda outputs, weights, residual: residual.new_empty(residual.shape),
)
