"""Root-mean-square normalisation.

    y = (x / sqrt(mean(x^2) + eps)) * weight                      (Zhang & Sennrich 2019, arXiv:1910.07467)

With a residual, the sum r' = r + x comes first and is normalised: the pre-norm block's two steps in one pass.

Shapes: x, r, r' and y [..., N]; weight [N] (the definition takes anything that broadcasts against x).
Rounding: r + x rounds to x's dtype once, and that is what is normalised. x is widened to float32 (float64 stays),
normalised there, rounded to x's dtype, *then* multiplied by the weight, which rounds once more: the order of the
published Qwen and Llama code. Multiplying first changes tokens.
Floor: 2 * numel(x) * itemsize bytes moved (read x, write y; 4 with a residual) plus the weight; about 4 operations an
element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton

WIDEST = 65536  # elements that one program holds


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` are taken: float32, or float64 for the truth."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of its statistics."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Scaled(NamedTuple):
    """A weight and its eps, prepared once for many float32 calls: see `scaled`."""

    gain: Tensor  # weight * sqrt(N)
    floor: Tensor  # sqrt(N * eps), no dimensions


def scaled(weight: Tensor | None, eps: float, like: Tensor, width: int) -> Scaled | None:
    """What `rms_norm_reference` takes in place of a weight [..., width] to save half of its steps; float32 only.

    x / sqrt(mean(x^2) + eps) * weight = x / hypot(|x|, sqrt(N eps)) * (weight sqrt(N)), with one rounding elsewhere.
    """
    if like.dtype != torch.float32:
        return None
    root = torch.full((), width**0.5, dtype=like.dtype, device=like.device)
    return Scaled(root if weight is None else weight * root, root * eps**0.5)


def rms_norm_reference(x: Tensor, weight: Tensor | Scaled | None, eps: float) -> Tensor:
    """The definition, in x's dtype. `weight=None` normalises only."""
    if isinstance(weight, Scaled):
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), weight.floor) * weight.gain
    x_wide = wide(x)
    normalised = (x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normalised if weight is None else normalised * weight


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The definition with a residual: (normalised, residual + x)."""
    stream = residual + x
    return rms_norm_reference(stream, weight, eps), stream


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,  # [T, N], rows `stride_x` apart
    weight_ptr,  # [N]
    residual_ptr,  # [T, N], contiguous
    stream_ptr,  # [T, N], contiguous
    y_ptr,  # [T, N], contiguous
    num_rows,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    mask = (o_r < num_rows) & (o_n < N)
    x = tl.load(x_ptr + o_r * stride_x + o_n, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + o_r * N + o_n, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(stream_ptr + o_r * N + o_n, x, mask=mask)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1, keep_dims=True) / N
    y = (wide * tl.rsqrt(mean_square + eps)).to(x.dtype)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0)
        y = (y.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    tl.store(y_ptr + o_r * N + o_n, y, mask=mask)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The kernel: y like x, contiguous. float32, bfloat16 or float16; the weight has x's dtype.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    return _run(x, None, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The kernel with a residual: (normalised, residual + x); neither input is overwritten."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual must be like x, {list(x.shape)} {x.dtype}, got {list(residual.shape)} {residual.dtype}"
        )
    y, stream = _run(x, residual.contiguous(), weight, eps)
    return y, stream


def _run(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    require(x, residual, weight)
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a tensor without dimensions")
    width = x.shape[-1]
    if weight is not None and (weight.shape != (width,) or weight.dtype != x.dtype):
        raise ValueError(f"weight must be [{width}] {x.dtype} like x, got {list(weight.shape)} {weight.dtype}")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one program holds")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty_like(y) if residual is not None else y
    if not x.numel():
        return y, stream
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    options = tuning.config("rms_norm", x.device, width=width)
    launch(
        _rms_norm_kernel,
        (triton.cdiv(flat.shape[0], options["ROWS"]),),
        flat,
        weight.contiguous() if weight is not None else flat,
        residual if residual is not None else flat,
        stream,
        y,
        flat.shape[0],
        flat.stride(0),
        eps,
        N=width,
        HAS_WEIGHT=weight is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=triton.next_power_of_2(width),
        **options,
    )
    return y, stream


register(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    rms_norm,
    rms_norm_reference,
    lambda x, weight, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm,
    add_rms_norm_reference,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
