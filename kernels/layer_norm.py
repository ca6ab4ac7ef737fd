"""Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba et al. 2016, arXiv:1607.06450)

Shapes: x [..., N], weight and bias [N] or None, y like x. The variance is the biased one (divided by N).
Rounding: statistics and the affine map in float32 (float64 stays), one rounding to x's dtype at the end, as torch does.
The kernel holds a row in registers and takes the mean first, then the squares of what is left: E[x^2] - E[x]^2 would
lose a variance that is small beside the mean.
Floor: 2 * numel(x) * itemsize bytes moved plus weight and bias; about 7 operations an element.
"""

import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton

WIDEST = 32768  # elements that one program holds


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


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


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The kernel: y like x, contiguous. float32, bfloat16 or float16; weight and bias have x's dtype.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(x, weight, bias)
    if x.dim() == 0:
        raise ValueError("x must be [..., N], got a tensor without dimensions")
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and (vector.shape != (width,) or vector.dtype != x.dtype):
            raise ValueError(f"{name} must be [{width}] {x.dtype} like x, got {list(vector.shape)} {vector.dtype}")
    if width > WIDEST:
        raise ValueError(f"rows of {width} elements are wider than {WIDEST}, what one program holds")
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
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


register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    layer_norm,
    layer_norm_reference,
    lambda x, weight, bias, eps: x.new_empty(x.shape),
)
