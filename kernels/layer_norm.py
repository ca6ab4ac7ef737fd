"""Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba et al. 2016, arXiv:1607.06450)

Shapes: x [..., N], weight and bias [N] or None, y like x. The variance is the biased one (divided by N).
Rounding: statistics and the affine map in float32 (float64 stays), one rounding to x's dtype at the end, as torch does.
The kernel holds a row in registers and takes the mean first, then the squares of what is left: E[x^2] - E[x]^2 would
lose a variance that is small beside the mean.
Floor: 2 * numel(x) * itemsize bytes moved plus weight and bias; about 7 operations an element.

Backward, from the inputs alone, with s = 1 / sqrt(var(x) + eps), n = (x - mean(x)) s and g = dy * weight (the chain
rule on the formula above):

    dx = s (g - mean(g) - n mean(g n))      dweight = sum of dy * n over the rows      dbias = sum of dy over the rows

Rounding: in float32 (float64 stays); each gradient rounds once to its input's dtype. dweight and dbias are summed in
blocks of SPAN rows (by table), the blocks by a fixed tree: no atomics, and their bits depend on no number of programs.
Floor: 3 * numel(x) * itemsize bytes moved (read x and dy, write dx) plus the weight and its and the bias's gradients;
about 13 operations an element. Rows that are too wide for registers are read three times.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import add_partials, rows_of, wide

WIDEST = 32768  # elements that one program holds


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, wants_weight: bool = True, wants_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients' definition: (dx, dweight, dbias); of the latter two what is not wanted is empty, [0]."""
    x_wide, dy_wide = wide(x), wide(dy)
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normalised = centred * scale
    inner = dy_wide if weight is None else dy_wide * weight
    dx = inner - inner.mean(-1, keepdim=True) - normalised * (inner * normalised).mean(-1, keepdim=True)
    like = x if weight is None else weight
    dweight = (dy_wide * normalised).sum_to_size(x.shape[-1:]) if wants_weight else x.new_empty(0)
    dbias = dy_wide.sum_to_size(x.shape[-1:]) if wants_bias else x.new_empty(0)
    return (scale * dx).to(x.dtype), dweight.to(like.dtype), dbias.to(like.dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    x_ptr,  # [T, N], rows `stride_x` apart
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    y_ptr,  # [T, N], contiguous
    num_rows,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < N
    mask = (o_r < num_rows) & m_n
    x = tl.load(x_ptr + o_r * stride_x + o_n, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    mean = tl.sum(wide, axis=1, keep_dims=True)
    mean = tl.div_rn(mean, tl.full(mean.shape, N, tl.float32))  # `/ N` becomes a product with 1 / N, fused below
    # Columns beyond N were read as 0, which is -mean from the mean: they must not count.
    centred = tl.where(m_n, wide - mean, 0.0)
    variance = tl.sum(centred * centred, axis=1, keep_dims=True) / N
    y = centred * tl.rsqrt(variance + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_r * N + o_n, y.to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_backward_kernel(
    dy_ptr,  # [T, N], rows `stride_dy` apart
    x_ptr,  # [T, N], rows `stride_x` apart
    weight_ptr,  # [N]
    dx_ptr,  # [T, N], contiguous
    partials_ptr,  # [dweight, dbias as wanted; cdiv(T, SPAN), N] float32
    num_rows,
    stride_dy,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
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
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + o_n, mask=m_n, other=0.0)
    dweight = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for _ in range(start, end, ROWS):
        o_next = o_r + ROWS
        m_next = (o_next < end) & m_n
        next_x = tl.load(x_ptr + o_next * stride_x + o_n, mask=m_next, other=0.0)
        next_dy = tl.load(dy_ptr + o_next * stride_dy + o_n, mask=m_next, other=0.0)
        wide = x.to(tl.float32)
        mean = tl.sum(wide, axis=1, keep_dims=True)
        mean = tl.div_rn(mean, tl.full(mean.shape, N, tl.float32))  # as in the forward kernel
        centred = tl.where(m_n, wide - mean, 0.0)
        inner = dy.to(tl.float32)
        if HAS_WEIGHT:
            inner *= weight.to(tl.float32)
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / N
        mean_inner = tl.sum(inner, axis=1, keep_dims=True) / N
        mean_product = tl.sum(inner * centred, axis=1, keep_dims=True) / N
        # Rows that are not there are read as 0: with an eps of 0 their scale would be infinite, and the sums NaN.
        scale = tl.where(o_r < end, tl.rsqrt(variance + eps), 0.0)
        normalised = centred * scale
        if WANTS_WEIGHT:
            dweight += dy.to(tl.float32) * normalised
        if WANTS_BIAS:
            dbias += dy.to(tl.float32)
        dx = scale * (inner - mean_inner - normalised * (mean_product * scale))
        tl.store(dx_ptr + o_r * N + o_n, dx.to(x.dtype), mask=(o_r < end) & m_n)
        x = next_x
        dy = next_dy
        o_r = o_next
    o_n = tl.arange(0, BLOCK_N)
    o_p = tl.program_id(0).to(tl.int64) * N + o_n
    if WANTS_WEIGHT:
        tl.store(partials_ptr + o_p, tl.sum(dweight, axis=0), mask=o_n < N)
        partials_ptr += tl.num_programs(0).to(tl.int64) * N
    if WANTS_BIAS:
        tl.store(partials_ptr + o_p, tl.sum(dbias, axis=0), mask=o_n < N)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_backward_wide_kernel(
    dy_ptr,  # as above
    x_ptr,
    weight_ptr,
    dx_ptr,
    partials_ptr,
    num_rows,
    stride_dy,
    stride_x,
    eps,
    N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """SPAN rows, BLOCK_N columns at a time: once for the mean, once for what needs it, once for the gradients."""
    o_r = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN).to(tl.int64)[:, None]
    m_r = o_r < num_rows
    sums = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    for column in range(0, N, BLOCK_N):
        o_n = column + tl.arange(0, BLOCK_N)[None, :]
        sums += tl.load(x_ptr + o_r * stride_x + o_n, mask=m_r & (o_n < N), other=0.0).to(tl.float32)
    mean = tl.sum(sums, axis=1, keep_dims=True)
    mean = tl.div_rn(mean, tl.full(mean.shape, N, tl.float32))
    squares = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    inners = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    products = tl.zeros([SPAN, BLOCK_N], dtype=tl.float32)
    scale = tl.zeros([SPAN, 1], dtype=tl.float32)
    mean_inner = scale
    mean_product = scale
    for step in tl.static_range(2):
        for column in range(0, N, BLOCK_N):
            o_n = column + tl.arange(0, BLOCK_N)[None, :]
            mask = m_r & (o_n < N)
            x = tl.load(x_ptr + o_r * stride_x + o_n, mask=mask, other=0.0)
            centred = tl.where(mask, x.to(tl.float32) - mean, 0.0)
            dy = tl.load(dy_ptr + o_r * stride_dy + o_n, mask=mask, other=0.0).to(tl.float32)
            inner = dy
            if HAS_WEIGHT:
                inner = dy * tl.load(weight_ptr + o_n, mask=o_n < N, other=0.0).to(tl.float32)
            if step == 0:
                squares += centred * centred
                inners += inner
                products += inner * centred
            else:
                normalised = centred * scale
                dx = scale * (inner - mean_inner - normalised * mean_product)
                tl.store(dx_ptr + o_r * N + o_n, dx.to(x.dtype), mask=mask)
                o_c = column + tl.arange(0, BLOCK_N)
                o_p = tl.program_id(0).to(tl.int64) * N + o_c
                if WANTS_WEIGHT:
                    tl.store(partials_ptr + o_p, tl.sum(dy * normalised, axis=0), mask=o_c < N)
                    o_p += tl.num_programs(0).to(tl.int64) * N
                if WANTS_BIAS:
                    tl.store(partials_ptr + o_p, tl.sum(dy, axis=0), mask=o_c < N)
        if step == 0:
            variance = tl.sum(squares, axis=1, keep_dims=True) / N
            scale = tl.where(m_r, tl.rsqrt(variance + eps), 0.0)
            mean_inner = tl.sum(inners, axis=1, keep_dims=True) / N
            mean_product = tl.sum(products, axis=1, keep_dims=True) / N * scale


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The kernel: y like x, contiguous. float32, bfloat16 or float16; weight and bias have x's dtype.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(x, weight, bias)
    width = _width(x, weight=weight, bias=bias)
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    flat = rows_of(x)
    options = tuning.config("layer_norm", x.device, width=width)
    launch(
        _layer_norm_kernel,
        (triton.cdiv(flat.shape[0], options["ROWS"]),),
        flat,
        weight.contiguous() if weight is not None else flat,
        bias.contiguous() if bias is not None else flat,
        y,
        flat.shape[0],
        flat.stride(0),
        eps,
        N=width,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        BLOCK_N=triton.next_power_of_2(width),
        **options,
    )
    return y


def _width(x: Tensor, **vectors: Tensor | None) -> int:
    """N; raises ValueError where x or a vector is not what the kernels take."""
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a tensor without dimensions")
    width = x.shape[-1]
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (width,) or vector.dtype != x.dtype):
            raise ValueError(f"{name} must be [{width}] {x.dtype} like x, got {list(vector.shape)} {vector.dtype}")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one program holds")
    return width


def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, wants_weight: bool = True, wants_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients' kernels: dx like x, contiguous, dweight and dbias [N], or [0] where they are not wanted.

    dy is like layer_norm's output; rows of dy and x may be strided, and neither is overwritten. Raises what
    `layer_norm` raises.
    """
    require(x, dy, weight)
    width = _width(x, weight=weight)
    if dy.shape != x.shape or dy.dtype != x.dtype:
        raise ValueError(f"dy must be like x, {list(x.shape)} {x.dtype}, got {list(dy.shape)} {dy.dtype}")
    dx = x.new_empty(x.shape)
    dweight, dbias = x.new_empty(width if wants_weight else 0), x.new_empty(width if wants_bias else 0)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_()
    flat, dy = rows_of(x), rows_of(dy)
    key = {"width": width, "aligned": width % 16 == 0, "itemsize": x.element_size()}
    options = dict(tuning.config("layer_norm_backward", x.device, **key))
    kernel = _layer_norm_backward_kernel if "ROWS" in options else _layer_norm_backward_wide_kernel
    options.setdefault("BLOCK_N", triton.next_power_of_2(width))
    blocks = triton.cdiv(flat.shape[0], options["SPAN"])
    wanted = [out for out, wants in ((dweight, wants_weight), (dbias, wants_bias)) if wants]
    partials = x.new_empty((len(wanted), blocks, width), dtype=torch.float32) if wanted else None
    launch(
        kernel,
        (blocks,),
        dy,
        flat,
        weight.contiguous() if weight is not None else flat,
        dx,
        partials if partials is not None else dx,
        flat.shape[0],
        dy.stride(0),
        flat.stride(0),
        eps,
        N=width,
        HAS_WEIGHT=weight is not None,
        WANTS_WEIGHT=wants_weight,
        WANTS_BIAS=wants_bias,
        **options,
    )
    if partials is not None:
        add_partials(partials, *wanted)
    return dx, dweight, dbias


def _gradient(
    inputs: tuple[Tensor, Tensor | None, Tensor | None, float], needed: Sequence[bool], dy: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, _, eps = inputs
    found = torch.ops.tritium.layer_norm_backward(dy, x, weight, eps, needed[1], needed[2])
    return *(gradient if wanted else None for gradient, wanted in zip(found, needed, strict=False)), None


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, wants_weight: bool = True, wants_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    width, like = x.shape[-1], x if weight is None else weight
    dweight, dbias = (like.new_empty(width if wants else 0) for wants in (wants_weight, wants_bias))
    return x.new_empty(x.shape), dweight, dbias


register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    layer_norm,
    layer_norm_reference,
    lambda x, weight, bias, eps: x.new_empty(x.shape),
    _gradient,
)
register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps, bool wants_weight=True, bool wants_bias=True) "
    "-> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    layer_norm_backward_reference,
    _fake_backward,
)
