"""The gated feed-forward's activation, over the packed projection.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)               (Shazeer 2020, arXiv:2002.05202)

Shapes: gate_up [..., 2F] with the gate in the first F columns and up in the last F, y [..., F].
Rounding: silu is computed in float32 (float64 stays) and rounds to the input dtype; the product rounds once more.
Floor: 3 * numel(y) * itemsize bytes moved; about 5 operations an element.
"""

import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton

WIDEST = 65535 * 256  # columns of y: blocks of the grid's second axis, at the smallest block of any table


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, in gate_up's dtype."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of one width, got {list(gate_up.shape)}")
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


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


def swiglu(gate_up: Tensor) -> Tensor:
    """The kernel: y [..., F] of gate_up [..., 2F], contiguous. float32, bfloat16 or float16; rows may be strided.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F], gate and up of equal width, got {list(gate_up.shape)}")
    width = gate_up.shape[-1] // 2
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one launch reaches")
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    if not y.numel():
        return y
    flat = gate_up.reshape(-1, 2 * width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    options = dict(tuning.config("swiglu", gate_up.device, rows=flat.shape[0]))
    block = min(options.pop("BLOCK_F"), triton.next_power_of_2(width))
    grid = (flat.shape[0], triton.cdiv(width, block))
    launch(_swiglu_kernel, grid, flat, y, flat.stride(0), F=width, BLOCK_F=block, **options)
    return y


register(
    "swiglu(Tensor gate_up) -> Tensor",
    swiglu,
    swiglu_reference,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
