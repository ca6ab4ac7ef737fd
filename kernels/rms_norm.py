"""Root-mean-square normalisation.

    y = (x / sqrt(mean(x^2) + eps)) * weight                      (Zhang & Sennrich 2019, arXiv:1910.07467)

With a residual, the sum r' = r + x comes first and is normalised: the pre-norm block's two steps in one pass.

Shapes: x, r, r' and y [..., N]; weight [N] (the definition takes anything that broadcasts against x).
Rounding: r + x rounds to x's dtype once, and that is what is normalised. x is widened to float32 (float64 stays),
normalised there, rounded to x's dtype, *then* multiplied by the weight, which rounds once more: the order of the
published Qwen and Llama code. Multiplying first changes tokens.
Floor: 2 * numel(x) * itemsize bytes moved (read x, write y; 4 with a residual) plus the weight; about 4 operations an
element.

Backward, from the inputs alone, with s = 1 / sqrt(mean(x^2) + eps), n = x s and g = dy * weight (the chain rule on the
formula above):

    dx = s (g - n mean(g n))        dweight = sum of dy * n over the rows

With a residual x above is r', and both x and r receive dx + dr'. Shapes: dy and dr' like y.
Rounding: in float32 (float64 stays); each gradient rounds once to its input's dtype; n is not rounded, as a rounding
has no derivative. dweight is summed in blocks of SPAN rows (by table), the blocks by a fixed tree: no atomics, and its
bits depend on no number of programs.
Floor: 3 * numel(x) * itemsize bytes moved (read x and dy, write dx; 5 with a residual) plus the weight and dweight;
about 9 operations an element. Rows that are too wide for registers are read twice.
"""

from collections.abc import Sequence
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


def rms_norm_backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_weight: bool = True,
    residual: Tensor | None = None,
    dstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients' definition: dx, which a residual receives too, and dweight, empty, [0], where it is not wanted."""
    x = x if residual is None else residual + x
    x_wide, dy_wide = wide(x), wide(dy)
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    normalised = x_wide * scale
    inner = dy_wide if weight is None else dy_wide * weight
    dx = scale * (inner - normalised * (inner * normalised).mean(-1, keepdim=True))
    dx = (dx if dstream is None else dx + dstream).to(x.dtype)
    if weight is None or not wants_weight:
        return dx, x.new_empty(0)
    return dx, (dy_wide * normalised).sum_to_size(weight.shape).to(weight.dtype)


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


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    dy_ptr,  # [T, N], rows `stride_dy` apart
    dstream_ptr,  # [T, N], rows `stride_ds` apart
    x_ptr,  # [T, N], rows `stride_x` apart
    residual_ptr,  # [T, N], contiguous
    weight_ptr,  # [N]
    dx_ptr,  # [T, N], contiguous
    partials_ptr,  # [cdiv(T, SPAN), N] float32
    num_rows,
    stride_dy,
    stride_ds,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """SPAN rows, ROWS at a time whole in registers, the next ones on their way meanwhile."""
    start = tl.program_id(0).to(tl.int64) * SPAN
    end = tl.minimum(start + SPAN, num_rows)
    o_r = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < N
    mask = (o_r < end) & m_n
    x = tl.load(x_ptr + o_r * stride_x + o_n, mask=mask, other=0.0)
    dy = tl.load(dy_ptr + o_r * stride_dy + o_n, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + o_r * N + o_n, mask=mask, other=0.0)
    if HAS_STREAM:
        dstream = tl.load(dstream_ptr + o_r * stride_ds + o_n, mask=mask, other=0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o_n, mask=m_n, other=0.0)
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(start, end, ROWS):
        o_next = o_r + ROWS
        m_next = (o_next < end) & m_n
        next_x = tl.load(x_ptr + o_next * stride_x + o_n, mask=m_next, other=0.0)
        next_dy = tl.load(dy_ptr + o_next * stride_dy + o_n, mask=m_next, other=0.0)
        if HAS_RESIDUAL:
            next_residual = tl.load(residual_ptr + o_next * N + o_n, mask=m_next, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            residual = next_residual
        wide = x.to(tl.float32)
        inner = dy.to(tl.float32)
        if HAS_WEIGHT:
            inner *= weight.to(tl.float32)
        mean_square = tl.sum(wide * wide, axis=1, keep_dims=True) / N
        mean_product = tl.sum(inner * wide, axis=1, keep_dims=True) / N
        # Rows that are not there are read as 0: with an eps of 0 their scale would be infinite, and the total NaN.
        scale = tl.where(o_r < end, tl.rsqrt(mean_square + eps), 0.0)
        normalised = wide * scale
        if WANTS_WEIGHT:
            total += dy.to(tl.float32) * normalised
        dx = scale * (inner - normalised * (mean_product * scale))
        if HAS_STREAM:
            dx += dstream.to(tl.float32)
            dstream = tl.load(dstream_ptr + o_next * stride_ds + o_n, mask=m_next, other=0.0)
        tl.store(dx_ptr + o_r * N + o_n, dx.to(x.dtype), mask=(o_r < end) & m_n)
        x = next_x
        dy = next_dy
        o_r = o_next
    if WANTS_WEIGHT:
        o_n = tl.arange(0, BLOCK_N)
        tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * N + o_n, tl.sum(total, axis=0), mask=o_n < N)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_wide_kernel(
    dy_ptr,  # as above
    dstream_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    stride_dy,
    stride_ds,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_STREAM: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """SPAN rows, BLOCK_N columns at a time: once for the means, once for the gradients."""
    o_r = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN).to(tl.int64)[:, None]
    m_r = o_r < num_rows
    squares = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    products = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    scale = tl.zeros([SPAN, 1], dtype=tl.float32)
    mean_product = scale
    for step in tl.static_range(2):
        for column in range(0, N, BLOCK_N):
            o_n = column + tl.arange(0, BLOCK_N)[None, :]
            mask = m_r & (o_n < N)
            x = tl.load(x_ptr + o_r * stride_x + o_n, mask=mask, other=0.0)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + o_r * N + o_n, mask=mask, other=0.0)
                x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
            wide = x.to(tl.float32)
            dy = tl.load(dy_ptr + o_r * stride_dy + o_n, mask=mask, other=0.0).to(tl.float32)
            inner = dy
            if HAS_WEIGHT:
                inner = dy * tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
            if step == 0:
                squares += wide * wide
                products += inner * wide
            else:
                normalised = wide * scale
                dx = scale * (inner - normalised * mean_product)
                if HAS_STREAM:
                    dx += tl.load(dstream_ptr + o_r * stride_ds + o_n, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + o_r * N + o_n, dx.to(x.dtype), mask=mask)
                if WANTS_WEIGHT:
                    o_p = tl.program_id(0).to(tl.int64) * N + column + tl.arange(0, BLOCK_N)
                    partial = tl.sum(dy * normalised, axis=0)
                    tl.store(partials_ptr + o_p, partial, mask=column + tl.arange(0, BLOCK_N) < N)
        if step == 0:
            mean_square = tl.sum(squares, axis=1, keep_dims=True) / N
            scale = tl.where(m_r, tl.rsqrt(mean_square + eps), 0.0)
            mean_product = tl.sum(products, axis=1, keep_dims=True) / N * scale


@triton.jit(do_not_specialize=["num_blocks"])
def _add_partials_kernel(
    partials_ptr,  # [1 or 2, B, N] float32
    first_ptr,  # [N]
    second_ptr,  # [N]
    num_blocks,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """ROWS running sums a column, block b in sum b % ROWS, then a tree over them."""
    o_b = tl.arange(0, ROWS)[:, None]
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    partials_ptr += tl.program_id(1).to(tl.int64) * num_blocks * N
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for block in range(0, num_blocks, ROWS):
        o_p = (block + o_b).to(tl.int64) * N + o_n[None, :]
        total += tl.load(partials_ptr + o_p, mask=(block + o_b < num_blocks) & (o_n < N)[None, :], other=0.0)
    out = tl.sum(total, axis=0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + o_n, out.to(first_ptr.dtype.element_ty), mask=o_n < N)
    else:
        tl.store(second_ptr + o_n, out.to(second_ptr.dtype.element_ty), mask=o_n < N)


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
    width = _width(x, weight)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = torch.empty_like(y) if residual is not None else y
    if not x.numel():
        return y, stream
    flat = rows_of(x)
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


def _width(x: Tensor, weight: Tensor | None) -> int:
    """N; raises ValueError where x or the weight is not what the kernels take."""
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a tensor without dimensions")
    width = x.shape[-1]
    if weight is not None and (weight.shape != (width,) or weight.dtype != x.dtype):
        raise ValueError(f"weight must be [{width}] {x.dtype} like x, got {list(weight.shape)} {weight.dtype}")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one program holds")
    return width


def rows_of(x: Tensor) -> Tensor:
    """x [..., N] as [T, N] with adjacent columns; a copy only where it must be one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_weight: bool = True,
    residual: Tensor | None = None,
    dstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients' kernels, of rms_norm and, with a residual, of add_rms_norm: dx like x, contiguous, which the
    residual receives too, and dweight like the weight, or [0] where it is not wanted.

    dy and dstream are the gradients of y and of residual + x, like x; rows of all may be strided, and nothing is
    overwritten. Raises what `rms_norm` raises.
    """
    require(x, dy, weight, residual, dstream)
    width = _width(x, weight)
    for name, like in (("dy", dy), ("residual", residual), ("dstream", dstream)):
        if like is not None and (like.shape != x.shape or like.dtype != x.dtype):
            raise ValueError(f"{name} must be like x, {list(x.shape)} {x.dtype}, got {list(like.shape)} {like.dtype}")
    wanted = weight is not None and wants_weight
    dx = x.new_empty(x.shape)
    dweight = x.new_empty(width if wanted else 0)
    if not x.numel():
        return dx, dweight.zero_()
    flat, dy = rows_of(x), rows_of(dy)
    other = flat if dstream is None else rows_of(dstream)
    key = {"width": width, "aligned": width % 16 == 0, "itemsize": x.element_size(), "residual": residual is not None}
    options = dict(tuning.config("rms_norm_backward", x.device, operation="rows", **key))
    kernel = _rms_norm_backward_kernel if "ROWS" in options else _rms_norm_backward_wide_kernel
    options.setdefault("BLOCK_N", triton.next_power_of_2(width))
    blocks = triton.cdiv(flat.shape[0], options["SPAN"])
    partials = x.new_empty((1, blocks, width), dtype=torch.float32) if wanted else None
    launch(
        kernel,
        (blocks,),
        dy,
        other,
        flat,
        residual.contiguous() if residual is not None else flat,
        weight.contiguous() if weight is not None else flat,
        dx,
        partials if partials is not None else dx,
        flat.shape[0],
        *(dy.stride(0), other.stride(0), flat.stride(0)),
        eps,
        N=width,
        HAS_WEIGHT=weight is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_STREAM=dstream is not None,
        WANTS_WEIGHT=wanted,
        **options,
    )
    if partials is not None:
        add_partials(partials, dweight)
    return dx, dweight


def add_partials(partials: Tensor, *outs: Tensor) -> None:
    """Writes the sum of each partials[i] [B, N] float32 over its rows into outs[i] [N]; one or two of them."""
    _, blocks, width = partials.shape
    options = tuning.config("rms_norm_backward", partials.device, operation="add", width=width)
    grid = (triton.cdiv(width, options["BLOCK_N"]), len(outs))
    launch(_add_partials_kernel, grid, partials, outs[0], outs[-1], blocks, N=width, **options)


def _gradient(
    inputs: tuple[Tensor, Tensor | None, float], needed: Sequence[bool], dy: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    dx, dweight = torch.ops.tritium.rms_norm_backward(dy, *inputs, needed[1])
    return dx if needed[0] else None, dweight if needed[1] else None, None


def _add_gradient(
    inputs: tuple[Tensor, Tensor, Tensor | None, float],
    needed: Sequence[bool],
    dy: Tensor | None,
    dstream: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, residual, weight, eps = inputs
    both, dweight = dstream, None  # all there is where y was not used
    if dy is not None:
        both, dweight = torch.ops.tritium.rms_norm_backward(dy, x, weight, eps, needed[2], residual, dstream)
    return both if needed[0] else None, both if needed[1] else None, dweight if needed[2] else None, None


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    wants_weight: bool = True,
    residual: Tensor | None = None,
    dstream: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if weight is None or not wants_weight:
        return x.new_empty(x.shape), x.new_empty(0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


register(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    rms_norm,
    rms_norm_reference,
    lambda x, weight, eps: torch.empty(x.shape, dtype=x.dtype, device=x.device),
    _gradient,
)
register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    add_rms_norm,
    add_rms_norm_reference,
    lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)),
    _add_gradient,
)
register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, bool wants_weight=True, Tensor? residual=None, "
    "Tensor? dstream=None) -> (Tensor, Tensor)",
    rms_norm_backward,
    rms_norm_backward_reference,
    _fake_backward,
)
