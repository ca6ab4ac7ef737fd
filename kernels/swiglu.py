"""The gated feed-forward's activation, over the packed projection (`swiglu`) or over two of their own (`silu_mul`).

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)               (Shazeer 2020, arXiv:2002.05202)

The gradient, by the product rule and the derivative of silu           (Elfwing et al. 2018, arXiv:1702.03118):

    dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))),   dup = dy * silu(gate)

Shapes: gate_up [..., 2F] with the gate in the first F columns and up in the last F, y [..., F]; dy like y; dgate_up,
the two gradients packed, like gate_up. Apart, gate, up, y, dy, dgate and dup are [..., F].
Rounding: silu is computed in float32 (float64 stays) and rounds to the input dtype; the product rounds once more. The
gradient is computed in float32 from gate_up as it was, without those two roundings, and each element rounds once.
Floor: 3 * numel(y) * itemsize bytes moved; about 5 operations an element. Backward: 5 * numel(y) * itemsize bytes (read
gate_up and dy, write dgate_up); about 12 operations an element.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import rows_of, wide

WIDEST = 65535 * 256  # columns of y: blocks of the grid's second axis, at the smallest block of any table
APART = "gate and up must be [..., F] of one shape and dtype"


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, in gate_up's dtype."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of one width, got {list(gate_up.shape)}")
    return silu_mul_reference(*gate_up.chunk(2, dim=-1))


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of a gate and an up that lie apart, in their dtype; contiguous."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{APART}, got {list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}")
    return (F.silu(gate) * up).contiguous()


def swiglu_backward_reference(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient's definition: dgate_up [..., 2F] in gate_up's dtype, contiguous, of dy [..., F]."""
    return torch.cat(silu_mul_backward_reference(dy, *gate_up.chunk(2, dim=-1)), dim=-1)


def silu_mul_backward_reference(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient's definition apart: dgate and dup [..., F] in gate's dtype, contiguous, of dy [..., F]."""
    gate_wide, up_wide, dy_wide = wide(gate), wide(up), wide(dy)
    sigmoid = gate_wide.sigmoid()
    dgate = dy_wide * (sigmoid * (1 + gate_wide * (1 - sigmoid))) * up_wide
    dup = dy_wide * (gate_wide * sigmoid)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


@triton.jit
def _swiglu_kernel(
    gate_ptr,  # [T, F], rows `stride_g` apart
    up_ptr,  # [T, F], rows `stride_u` apart
    y_ptr,  # [T, F], contiguous
    stride_g,
    stride_u,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    gate = tl.load(gate_ptr + row * stride_g + o_f, mask=m_f, other=0.0)
    up = tl.load(up_ptr + row * stride_u + o_f, mask=m_f, other=0.0)
    wide = gate.to(tl.float32)
    # Far below zero exp overflows to infinity and the quotient is 0, as it should be.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    y = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    tl.store(y_ptr + row * F + o_f, y, mask=m_f)


@triton.jit
def _swiglu_backward_kernel(
    gate_ptr,  # [T, F], rows `stride_g` apart
    up_ptr,  # [T, F], rows `stride_u` apart
    dy_ptr,  # [T, F], rows `stride_dy` apart
    dgate_ptr,  # [T, F], rows `stride_dx` apart
    dup_ptr,  # [T, F], rows `stride_dx` apart
    stride_g,
    stride_u,
    stride_dy,
    stride_dx,
    F: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    raw = tl.load(gate_ptr + row * stride_g + o_f, mask=m_f, other=0.0)
    up = tl.load(up_ptr + row * stride_u + o_f, mask=m_f, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + o_f, mask=m_f, other=0.0).to(tl.float32)
    gate = raw.to(tl.float32)
    # Far below zero exp overflows to infinity and the sigmoid is 0; a product with it first keeps what follows finite.
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    dgate = dy * (sigmoid * (1.0 + gate * (1.0 - sigmoid))) * up
    dup = dy * (gate * sigmoid)
    tl.store(dgate_ptr + row * stride_dx + o_f, dgate.to(raw.dtype), mask=m_f)
    tl.store(dup_ptr + row * stride_dx + o_f, dup.to(raw.dtype), mask=m_f)


def swiglu(gate_up: Tensor) -> Tensor:
    """The kernel: y [..., F] of gate_up [..., 2F], contiguous. float32, bfloat16 or float16; rows may be strided.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(gate_up)
    width = _width(gate_up)
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    flat = rows_of(gate_up) if y.numel() else y
    return _run(flat[:, :width], flat[:, width:], y) if y.numel() else y


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The kernel of a gate and an up that lie apart: y [..., F] of two like it, contiguous; rows may be strided.

    Raises what `swiglu` raises.
    """
    _check_apart(gate, up)
    y = gate.new_empty(gate.shape)
    return _run(rows_of(gate), rows_of(up), y) if y.numel() else y


def _run(gate: Tensor, up: Tensor, y: Tensor) -> Tensor:
    rows, width = gate.shape
    block, options = _options("swiglu", gate)
    grid = (rows, triton.cdiv(width, block))
    launch(_swiglu_kernel, grid, gate, up, y, gate.stride(0), up.stride(0), F=width, BLOCK_F=block, **options)
    return y


def swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient's kernel: dgate_up [..., 2F], contiguous, of dy [..., F] like y; rows of both may be strided.

    Neither dy nor gate_up is overwritten. Raises what `swiglu` raises.
    """
    require(gate_up, dy)
    width = _width(gate_up)
    _check_dy(dy, (*gate_up.shape[:-1], width), gate_up.dtype)
    dgate_up = gate_up.new_empty(gate_up.shape)
    if dgate_up.numel():
        flat, out = rows_of(gate_up), dgate_up.view(-1, 2 * width)
        _run_backward(dy, flat[:, :width], flat[:, width:], out[:, :width], out[:, width:])
    return dgate_up


def silu_mul_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient's kernel apart: dgate and dup [..., F], contiguous, of dy [..., F] like y; rows may be strided.

    Nothing that is given is overwritten. Raises what `swiglu` raises.
    """
    _check_apart(gate, up)
    require(gate, dy)
    _check_dy(dy, gate.shape, gate.dtype)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if dgate.numel():
        _run_backward(dy, rows_of(gate), rows_of(up), rows_of(dgate), rows_of(dup))
    return dgate, dup


def _run_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    (rows, width), dy = gate.shape, rows_of(dy)
    block, options = _options("swiglu_backward", gate)
    strides = (gate.stride(0), up.stride(0), dy.stride(0), dgate.stride(0))
    grid = (rows, triton.cdiv(width, block))
    launch(_swiglu_backward_kernel, grid, gate, up, dy, dgate, dup, *strides, F=width, BLOCK_F=block, **options)


def _options(kernel: str, rows: Tensor) -> tuple[int, dict[str, Any]]:
    """The block and the rest of the configuration for rows [T, F]."""
    options = dict(tuning.config(kernel, rows.device, rows=rows.shape[0]))
    return min(options.pop("BLOCK_F"), triton.next_power_of_2(rows.shape[1])), options


def _width(gate_up: Tensor) -> int:
    """F; raises ValueError where it is none, or more than a launch reaches."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of equal width, got {list(gate_up.shape)}")
    width = gate_up.shape[-1] // 2
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one launch reaches")
    return width


def _check_apart(gate: Tensor, up: Tensor) -> None:
    require(gate, up)
    if gate.dim() == 0 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{APART}, got {list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}")
    if gate.shape[-1] > WIDEST:
        raise ValueError(f"rows of {gate.shape[-1]} elements are wider than {WIDEST}, what one launch reaches")


def _check_dy(dy: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if dy.shape != tuple(shape) or dy.dtype != dtype:
        raise ValueError(f"dy must be {list(shape)} {dtype}, as swiglu's output, got {list(dy.shape)} {dy.dtype}")


def _gradient(inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor) -> tuple[Tensor]:
    return (torch.ops.tritium.swiglu_backward(dy, *inputs),)


def _gradient_apart(inputs: Sequence[Tensor], needed: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.tritium.silu_mul_backward(dy, *inputs)
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True))


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
register(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    silu_mul,
    silu_mul_reference,
    lambda gate, up: gate.new_empty(gate.shape),
    _gradient_apart,
)
register(
    "silu_mul_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    silu_mul_backward,
    silu_mul_backward_reference,
    lambda dy, gate, up: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
)
