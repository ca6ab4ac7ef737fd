"""The linear layers of a decode step, each with what stands before and behind it, for a few rows of x.

    norm_linear              y = n @ w^T + bias
    norm_linear_swiglu       z = silu(g) * u,  [g, u] = n @ w^T + bias, g the first F columns and u the last F
    decode_linear_residual   r' = r + (x @ w^T + bias)
    norm_head                logits = n @ w^T, -inf from column `limit` on, and each row's largest packed key

where n = rms_norm(x) (kernels/rms_norm.py), or x itself where there is no weight of the norm. A packed key is
(key << 31) + (2^31 - 1 - id): the largest is that of the likeliest token, of equals the first (kernels/sampling.py).

Shapes: x [R, K], norm_weight [K], w [N, K], bias [N] or None, y, r, r' and logits [R, N], best [R] int64; gated: w
[2F, K], bias [2F], z [R, F]. With a scale, weight and scale are a `Quantised` of w (kernels/quantised_linear.py).
Rounding: n as rms_norm's, in x's dtype; then as kernels/linear.py's: products accumulate in float32, the sum with bias
and residual rounds once, g and u round, silu rounds, their product rounds. Of 8 and 4 bits w is never rounded: the
scale multiplies sums (of 4 bits each block's) in float32.
Floor: the weight's bytes, N * K * itemsize (8 or 4 bits: N * K * bits / 8 and the scales) and R * (K + N) * itemsize;
2 * R * N * K operations.

For one row this is reading the weight. A program keeps several tiles of it on their way by asynchronous copies of 16
bytes, and asks for its first ones before the kernel in front has ended (kernels/overlap.py). It computes the norm of
its rows itself, which costs less than a launch. K is cut into SLICES within a step, one a warp, so that few weight rows
a program still keep all warps busy: weight rows are the matrix instruction's left operand, rows of x its right one. A
row's bits do not depend on how many rows there are, nor on its place: the slices, and the shape in which squares are
summed, are the table's `order`.
"""

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .linear import _unit_columns, linear_reference, linear_residual_reference
from .linear_phase import linear_phase
from .overlap import dependent
from .quantised_linear import _aligned, bits_of, quantised_linear_reference, quantised_shapes
from .rms_norm import rms_norm_reference
from .swiglu import swiglu_reference


def norm_linear_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x)), [R, K] -> [R, N]; without `norm_weight` linear(x)."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    if scale is not None:
        return quantised_linear_reference(x, weight, scale, bias)
    return linear_reference(x, weight, bias)


def norm_linear_swiglu_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """silu(gate) * up of the packed projection of rms_norm(x), [R, K] -> [R, F]; weight [2F, K], the gate's first."""
    return swiglu_reference(norm_linear_reference(x, norm_weight, eps, weight, bias, scale))


def decode_linear_residual_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None = None
) -> Tensor:
    """residual + linear(x), [R, K] and [R, N] -> [R, N]; the residual is not overwritten."""
    if scale is not None:
        return residual + quantised_linear_reference(x, weight, scale, bias)
    return linear_residual_reference(x, weight, bias, residual)


def norm_head_reference(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(logits [R, V], -inf from column `limit` on; each row's largest packed key [R], of float32 where wider)."""
    logits = norm_linear_reference(x, norm_weight, eps, weight, None, scale)
    logits[:, weight.shape[0] if limit is None else limit :] = float("-inf")
    values = logits.detach() if logits.itemsize <= 4 else logits.detach().float()
    sign = 1 << (8 * values.itemsize - 1)
    bits = values.view(torch.int16 if sign == 1 << 15 else torch.int32).to(torch.int64) & (2 * sign - 1)
    bits = bits.masked_fill(bits == sign, 0)
    keys = torch.where(bits > sign, 2 * sign - 1 - bits, bits + sign).masked_fill(values.isnan(), 2 * sign - 1)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    return logits, ((keys << 31) + (0x7FFFFFFF - tokens)).amax(1)


@triton.jit(do_not_specialize=["num_rows", "limit"])
def _decode_linear_kernel(
    y_ptr,  # as `linear_phase` takes them
    x_ptr,
    norm_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    best_ptr,
    num_rows,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    stride_best,
    limit,
    eps,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BEST: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LINES: tl.constexpr,
    SYNC: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    linear_phase(
        y_ptr,
        x_ptr,
        norm_ptr,
        weight_ptr,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        best_ptr,
        num_rows,
        N,
        K,
        stride_x,
        stride_weight,
        stride_residual,
        stride_best,
        limit,
        eps,
        best_ptr,  # there is no barrier to count at
        0,
        tl.program_id(0),
        tl.num_programs(0),
        HAS_NORM,
        HAS_BIAS,
        HAS_RESIDUAL,
        GATED,
        BEST,
        BITS,
        EVEN_K,
        ROWS,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        SLICES,
        BLOCK_S,
        LINES,
        SYNC,
        PREFETCH,
    )


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel: y [R, N], contiguous, in `out` where that is given. float32, bfloat16 or float16; the norm's weight,
    the weight and bias have x's dtype. With a scale, weight and scale are those of a `Quantised`.

    With `out` it is one of a chain of launches: on a GPU the weight may be read before the launch in front of this one
    has ended, which must not write it.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    return _run(x, norm_weight, eps, weight, bias, scale, out)


def norm_linear_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The gated kernel: weight [2F, K] with the gate's rows first, z [R, F]; otherwise as `norm_linear`."""
    return _run(x, norm_weight, eps, weight, bias, scale, out, gated=True)


def decode_linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The kernel with a residual [R, N]: residual + x @ weight^T + bias, rounded once; otherwise as `norm_linear`.

    `out` may be the residual, which survives unless it is.
    """
    return _run(x, None, 0.0, weight, bias, scale, out, residual)


def norm_head(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor | None = None,
    limit: int | None = None,
    *,
    out: Tensor | None = None,
    best: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel of the last projection: logits [R, V], -inf from column `limit` on, and each row's largest packed key.

    `best` [R] int64 may be a strided view, such as a column; its elements are zeroed by whoever gives it. Otherwise as
    `norm_linear`.
    """
    if best is None:
        best = torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device)
    if best.shape != x.shape[:1] or best.dtype != torch.int64 or best.device != x.device:
        raise ValueError(f"best must be {list(x.shape[:1])} torch.int64, got {list(best.shape)} {best.dtype}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be a number of columns, got {limit}")
    return _run(x, norm_weight, eps, weight, None, scale, out, best=best, limit=limit), best


def _run(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    residual: Tensor | None = None,
    gated: bool = False,
    best: Tensor | None = None,
    limit: int | None = None,
) -> Tensor:
    require(x, norm_weight, weight, bias, scale, out, residual)
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"x must be [R, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    num_rows, depth = x.shape
    height = weight.shape[0]
    if gated and height % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, got {height} in all")
    width = height // 2 if gated else height
    bits = 8 * x.itemsize if scale is None else bits_of(weight)
    stored, scaled = quantised_shapes(height, depth, bits)
    for name, tensor, shape, dtype in (
        ("norm_weight", norm_weight, (depth,), x.dtype),
        ("weight", weight, (height, depth) if scale is None else stored, x.dtype if scale is None else weight.dtype),
        ("bias", bias, (height,), x.dtype),
        ("scale", scale, scaled, None if bits == 4 else torch.float32),
        ("residual", residual, (num_rows, width), x.dtype),
        ("out", out, (num_rows, width), x.dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != (dtype or tensor.dtype)):
            raise ValueError(f"{name} must be {list(shape)} {dtype or ''}, got {list(tensor.shape)} {tensor.dtype}")
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    y = torch.empty((num_rows, width), dtype=x.dtype, device=x.device) if out is None else out
    if not y.numel():
        return y
    chained = out is not None and weight.stride(1) == 1  # a copy made here would be the launch in front
    x, weight = _unit_columns(x), _unit_columns(weight)
    residual = None if residual is None else _unit_columns(residual)
    options = launch_row(x, weight, bits, gated)
    tiles = triton.cdiv(width, options["ROWS"]) * triton.cdiv(num_rows, options["BLOCK_M"])
    launch(
        _decode_linear_kernel,
        (min(tiles, options.pop("PROGRAMS")),),
        y,
        x,
        norm_weight.contiguous() if norm_weight is not None else x,
        weight,
        scale.contiguous() if scale is not None else x,
        bias.contiguous() if bias is not None else y,
        residual if residual is not None else y,
        best if best is not None else y,
        num_rows,
        width,
        depth,
        x.stride(0),
        weight.stride(0),
        residual.stride(0) if residual is not None else width,
        best.stride(0) if best is not None else 1,
        width if limit is None else limit,
        eps,
        HAS_NORM=norm_weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        BEST=best is not None,
        BITS=bits,
        **dependent(x.device, chained),
        **options,
    )
    return y


def launch_row(x: Tensor, weight: Tensor, bits: int, gated: bool) -> dict[str, Any]:
    """What the tables say of x [R, K] and such a weight, and EVEN_K: launch arguments, and PROGRAMS."""
    height, (rows, depth) = weight.shape[0], x.shape
    key = {"width": height // 2 if gated else height, "itemsize": x.itemsize, "bits": bits, "gated": gated}
    key["aligned"] = _aligned(x) and _aligned(weight)
    padded = max(8, triton.next_power_of_2(rows))  # a bounded number of keys, however many rows there are
    options = dict(tuning.config("decode_linear", x.device, rows=padded, **key))
    options["EVEN_K"] = depth > 0 and depth % options["BLOCK_K"] == 0
    return options


def _fake(x: Tensor, norm_weight: Tensor | None, eps: float, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    "norm_linear(Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? bias=None, Tensor? scale=None) "
    "-> Tensor",
    norm_linear,
    norm_linear_reference,
    _fake,
)
register(
    "norm_linear_swiglu(Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? bias=None, "
    "Tensor? scale=None) -> Tensor",
    norm_linear_swiglu,
    norm_linear_swiglu_reference,
    lambda x, norm_weight, eps, weight, bias=None, scale=None: x.new_empty((x.shape[0], weight.shape[0] // 2)),
)
register(
    "decode_linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? scale=None) -> Tensor",
    decode_linear_residual,
    decode_linear_residual_reference,
    lambda x, weight, bias, residual, scale=None: residual.new_empty(residual.shape),
)
register(
    "norm_head(Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? scale=None, int? limit=None) "
    "-> (Tensor, Tensor)",
    norm_head,
    norm_head_reference,
    lambda x, norm_weight, eps, weight, scale=None, limit=None: (
        x.new_empty((x.shape[0], weight.shape[0])),
        x.new_empty((x.shape[0],), dtype=torch.int64),
    ),
)
