"""The gated feed-forward's activation, over the packed projection.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)               (Shazeer 2020, arXiv:2002.05202)

The gradient, by the product rule and the derivative of silu           (Elfwing et al. 2018, arXiv:1702.03118):

    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))),   dup = dy * silu(gate)

Shapes: gate_up [..., 2F] with the gate in the first F columns and up in the last F, y [..., F]; dy like y; dgate_up,
the two gradients packed, like gate_up.
Rounding: silu is computed in float32 (float64 stays) and rounds to the input dtype; the product rounds once more. The
gradient is computed in float32 from gate_up as it was, without those two roundings, and each element rounds once.
Floor: 3 * numel(y) * itemsize bytes moved; about 5 operations an element. Backward: 5 * numel(y) * itemsize bytes (read
gate_up and dy, write dgate_up); about 12 operations an element.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import rows_of, wide

WIDEST = 65535 * 256  # columns of y: blocks of the grid's second axis, at the smallest block of any table


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, in gate_up's dtype."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of one width, got {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient's definition: dgate_up [..., 2F] in gate_up's dtype, contiguous, of dy [..., F]."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    sigmoid, dy = gate.sigmoid(), wide(dy)
    dgate = dy * (sigmoid * (1 + gate * (1 - sigmoid))) * up
    return torch.cat((dgate, dy * (gate * sigmoid)), dim=-1).to(gate_up.dtype)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # [T, 2F], rows `stride_x` apart
    y_ptr,  # [T, F], contiguous
    stride_x,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    gate = tl.load(gate_up_ptr + row * stride_x + o_f, mask=m_f, other=0.0)
    up = tl.load(gate_up_ptr + row * stride_x + F + o_f, mask=m_f, other=0.0)
    wide = gate.to(tl.float32)
    # Far below zero exp overflows to infinity and the quotient is 0, as it should be.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    y = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(y_ptr + row * F + o_f, y, mask=m_f)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr,  # [T, 2F], rows `stride_x` apart
    dy_ptr,  # [T, F], rows `stride_dy` apart
    dgate_up_ptr,  # [T, 2F], contiguous
    stride_x,
    stride_dy,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    raw = tl.load(gate_up_ptr + row * stride_x + o_f, mask=m_f, other=0.0)
    up = tl.load(gate_up_ptr + row * stride_x + F + o_f, mask=m_f, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + o_f, mask=m_f, other=0.0).to(tl.float32)
    gate = raw.to(tl.float32)
    # Far below zero exp overflows to infinity and the sigmoid is 0; a product with it first keeps what follows finite.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * (sigmoid * (1.0 + gate * (1.0 - sigmoid))) * up
    dup = dy * (gate * sigmoid)
    tl.store(dgate_up_ptr + row * (2 * F) + o_f, dgate.to(raw.dtype), mask=m_f)
    tl.store(dgate_up_ptr + row * (2 * F) + F + o_f, dup.to(raw.dtype), mask=m_f)


def swiglu(gate_up: Tensor) -> Tensor:
    """The kernel: y [..., F] of gate_up [..., 2F], contiguous. float32, bfloat16 or float16; rows may be strided.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(gate_up)
    width = _width(gate_up)
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    if not y.numel():
        return y
    flat = rows_of(gate_up)
    options = dict(tuning.config("swiglu", gate_up.device, rows=flat.shape[0]))
    block = min(options.pop("BLOCK_F"), triton.next_power_of_2(width))
    grid = (flat.shape[0], triton.cdiv(width, block))
    launch(_swiglu_kernel, grid, flat, y, flat.stride(0), F=width, BLOCK_F=block, **options)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient's kernel: dgate_up [..., 2F], contiguous, of dy [..., F] like y; rows of both may be strided.

    Neither dy nor gate_up is overwritten. Raises what `swiglu` raises.
    """
    require(gate_up, dy)
    width = _width(gate_up)
    shape = (*gate_up.shape[:-1], width)
    if dy.shape != shape or dy.dtype != gate_up.dtype:
        raise ValueError(
            f"dy must be {list(shape)} {gate_up.dtype}, as swiglu's output, got {list(dy.shape)} {dy.dtype}"
        )
    dgate_up = gate_up.new_empty(gate_up.shape)
    if not dgate_up.numel():
        return dgate_up
    flat, dy = rows_of(gate_up), rows_of(dy)
    options = dict(tuning.config("swiglu_backward", gate_up.device, rows=flat.shape[0]))
    block = min(options.pop("BLOCK_F"), triton.next_power_of_2(width))
    grid = (flat.shape[0], triton.cdiv(width, block))
    strides = (flat.stride(0), dy.stride(0))
    launch(_swiglu_backward_kernel, grid, flat, dy, dgate_up, *strides, F=width, BLOCK_F=block, **options)
    return dgate_up


def _width(gate_up: Tensor) -> int:
    """F; raises ValueError where it is none, or more than a launch reaches."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of equal width, got {list(gate_up.shape)}")
    width = gate_up.shape[-1] // 2
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one launch reaches")
    return width


def _gradient(inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor) -> tuple[Tensor]:
    return (torch.ops.tritium.swiglu_backward(dy, *inputs),)


register(
    "swiglu(Tensor gate_up) -> Tensor",
    swiglu,
    swiglu_reference,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    _gradient,
)
register(
    "swiglu_backward(Tensor dy, Tensor gate_up) -> Tensor",
    swiglu_backward,
    swiglu_backward_reference,
    lambda dy, gate_up: gate_up.new_empty(gate_up.shape),
)
