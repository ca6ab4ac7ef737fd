"""The linear layer of a weight that is stored in 8 or 4 bits.

    y = x @ w^T + bias,   w = q * scale,   q whole numbers

Shapes: x [T, K], bias [N] or None, y [T, N]; `values` and `scale` are a `Quantised`:
    8 bits: values int8 [N, K], scale float32 [N], one a row
    4 bits: values uint8 [N, P / 2], scale [N, P / 64] of the weight's dtype, one a block of 64 along K; P is K padded
            to whole blocks, with zeros. Byte j of a block's 32 holds q + 8 of its elements j (low bits) and 32 + j
            (high bits), q from -8 to 7: neither half needs to be unpacked along K.
Rounding: w is never rounded to x's dtype, nor is x: q is exact in every dtype, so products and sums over q and x are
those of kernels/linear.py, in at least float32. The scale multiplies the sum (4 bits: of each block, before they are
added up), the bias is added, and y rounds once to x's dtype.
Floor: N * K * bits / 8 bytes for values, 4 N (4 bits: N * K / 64 * itemsize) for scales, (T * (K + N)) * itemsize;
2 * T * N * K operations.

Symmetric quantisation: no zero point, so zeros stay zeros. 8 bits: scale = max |w| / 127, a row at a time (LLM.int8(),
Dettmers et al. 2022, arXiv:2208.07339, without its outliers: activations are not quantised here). 4 bits: of a few
scales, the one with the least squared error; where the largest value goes to -8 the scale has the other sign, for 16
levels instead of 15 (as in llama.cpp's Q4_0).

The kernel's bits for a token do not depend on how many tokens there are: see kernels/linear.py, whose order this is.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .linear import _add_product, _finish, _tile, _unit_columns, owned_block
from .rms_norm import wide_dtype

BLOCK = 64  # elements along K that share a scale, of 4 bits
SHRINKS = (1.0, 0.95, 0.9, 0.85)  # of the scale that spans a block: what it clips, the rest gains
BITS = {torch.int8: 8, torch.uint8: 4}  # by the dtype of values
AT_ONCE = 2**20  # elements whose temporaries are there at one time


class Quantised(NamedTuple):
    """A weight [N, K] in 8 or 4 bits: see the head of this file."""

    values: Tensor
    scale: Tensor


def quantised_shapes(rows: int, width: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of values and of scale, for a weight [rows, width]."""
    blocks = -(-width // BLOCK)
    return ((rows, width), (rows,)) if bits == 8 else ((rows, blocks * BLOCK // 2), (rows, blocks))


def bits_of(weight: Tensor) -> int:
    """Of a weight that comes with a scale. Raises TypeError for one that is in neither 8 nor 4."""
    if weight.dtype not in BITS:
        raise TypeError(f"a weight with a scale must be int8 (8 bits) or uint8 (4 bits), got {weight.dtype}")
    return BITS[weight.dtype]


@torch.no_grad()
def quantise(weight: Tensor, bits: int) -> Quantised:
    """weight [N, K] in `bits`, 8 or 4.

    Raises ValueError for other bits, and for a weight that has NaN or infinity in it.
    """
    if weight.dim() != 2 or weight.shape[1] == 0 or bits not in (8, 4):
        raise ValueError(f"quantise takes a weight [N, K] and 8 or 4 bits, got {list(weight.shape)} and {bits}")
    parts = [(_eight_bits if bits == 8 else _four_bits)(rows) for rows in weight.split(AT_ONCE // weight.shape[1] + 1)]
    values, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    if not scale.isfinite().all():  # a scale is made of the largest value, and NaN counts as that
        raise ValueError("a weight with NaN or infinity in it cannot be quantised")
    return Quantised(values, scale)


def _levels(weight: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    return (weight / torch.where(scale == 0, 1, scale)).round_().clamp_(least, most)


def _eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return _levels(weight, scale, -127, 127).to(torch.int8), scale.squeeze(1)


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = F.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).float()
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scale, least_error = None, None
    for shrink in SHRINKS:
        for level in (-8, 7):  # where the largest goes
            tried = (largest * (shrink / level)).to(weight.dtype)  # what is stored is what is judged
            error = _levels(blocks, tried.float(), -8, 7).mul_(tried).sub_(blocks).square_().sum(2, keepdim=True)
            if scale is None or least_error is None:
                scale, least_error = tried, error
            scale = torch.where(error < least_error, tried, scale)
            least_error = torch.minimum(error, least_error)
    assert scale is not None
    low, high = _levels(blocks, scale.float(), -8, 7).add_(8).to(torch.uint8).chunk(2, dim=2)
    return (low | high << 4).flatten(1), scale.squeeze(2)


def dequantise_reference(values: Tensor, scale: Tensor) -> Tensor:
    """The weight [N, K] in at least float32; of 4 bits with the columns that pad K to whole blocks."""
    scale = scale.to(wide_dtype(scale.dtype))
    if values.dtype == torch.int8:
        return values * scale[:, None]
    packed = values.unflatten(1, (-1, BLOCK // 2))
    return ((torch.cat((packed & 15, packed >> 4), 2).to(scale.dtype) - 8) * scale[:, :, None]).flatten(1)


def quantised_linear_reference(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w^T + bias, [T, K] -> [T, N]."""
    wide = wide_dtype(x.dtype)
    weight = dequantise_reference(values, scale)[:, : x.shape[1]].to(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _quantised_linear_kernel(
    y_ptr,  # [T, N], contiguous
    x_ptr,  # [T, K], rows `stride_x` apart
    values_ptr,  # [N, K] or [N, P / 2], rows `stride_values` apart
    scale_ptr,  # [N] or [N, P / 64], contiguous
    bias_ptr,  # [N]
    num_tokens,
    N,
    K,
    stride_x,
    stride_values,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # 4 bits: a block's 64
    GROUP: tl.constexpr,
):
    start_n, start_m = owned_block(num_tokens, N, BLOCK_N, BLOCK_M, GROUP)
    o_n = start_n + tl.arange(0, BLOCK_N)
    o_m = start_m + tl.arange(0, BLOCK_M)
    m_n = o_n < N
    m_m = o_m < num_tokens
    WIDTH: tl.constexpr = BLOCK_K * BITS // 8  # bytes of a row that a step reads, and columns that a product takes
    o_k = tl.arange(0, WIDTH)
    dtype = x_ptr.dtype.element_ty
    x_pointers = x_ptr + (o_m.to(tl.int64) * stride_x)[:, None] + o_k[None, :]
    pointers = values_ptr + (o_n.to(tl.int64) * stride_values)[:, None] + o_k[None, :]
    scale_pointers = scale_ptr + o_n.to(tl.int64) * (tl.cdiv(K, BLOCK_K) if BITS == 4 else 1)

    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K
        x_tile = tl.trans(_tile(x_pointers, 0, k, m_m, o_k, K, EVEN_K, False))
        if BITS == 8:
            tile = _tile(pointers, 0, k, m_n, o_k, K, EVEN_K, False)
            acc = _add_product(acc, tile.to(dtype), x_tile)
        else:
            tile = tl.load(pointers + step * WIDTH, mask=m_n[:, None], other=0)
            scale = tl.load(scale_pointers + step, mask=m_n, other=0.0).to(tl.float32)
            x_high = tl.trans(_tile(x_pointers + WIDTH, 0, k, m_m, o_k, K - WIDTH, EVEN_K, False))
            part = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
            part = _add_product(part, ((tile & 15).to(tl.int8) - 8).to(dtype), x_tile)
            part = _add_product(part, ((tile >> 4).to(tl.int8) - 8).to(dtype), x_high)
            acc += scale[:, None] * part
    if BITS == 8:
        acc *= tl.load(scale_pointers, mask=m_n, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    _finish(acc, o_m, o_n, m_n, y_ptr, y_ptr, num_tokens, N, N, False)


def quantised_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel: y [T, N], contiguous. x and bias float32, bfloat16 or float16; values and scale as `quantise` gives.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(x, values, scale, bias)
    if values.dtype not in BITS:
        raise TypeError(f"values must be int8 (8 bits) or uint8 (4 bits), got {values.dtype}")
    bits = BITS[values.dtype]
    if x.dim() != 2 or values.dim() != 2:
        raise ValueError(f"x must be [T, K] and values [N, bytes], got {list(x.shape)} and {list(values.shape)}")
    tokens, depth = x.shape
    width = values.shape[0]
    shapes = quantised_shapes(width, depth, bits)
    for name, tensor, shape, dtype in (
        ("values", values, shapes[0], values.dtype),
        ("scale", scale, shapes[1], torch.float32 if bits == 8 else scale.dtype),
        ("bias", bias, (width,), x.dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(f"{name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}")
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x, values, scale = _unit_columns(x), _unit_columns(values), scale.contiguous()
    padded = max(16, triton.next_power_of_2(tokens))  # a bounded number of keys, however many lengths there are
    key = {"width": width, "itemsize": x.element_size(), "bits": bits, "aligned": _aligned(x) and _aligned(values)}
    options = tuning.config("quantised_linear", x.device, tokens=padded, outputs=padded * width, **key)
    launch(
        _quantised_linear_kernel,
        (triton.cdiv(width, options["BLOCK_N"]) * triton.cdiv(tokens, options["BLOCK_M"]),),
        y,
        x,
        values,
        scale,
        bias.contiguous() if bias is not None else y,
        tokens,
        width,
        depth,
        x.stride(0),
        values.stride(0),
        HAS_BIAS=bias is not None,
        BITS=bits,
        EVEN_K=depth % options["BLOCK_K"] == 0,
        **options,
    )
    return y


def _aligned(tensor: Tensor) -> bool:
    """Whether Triton sees that rows begin at multiples of 16 bytes: it looks for multiples of 16 elements."""
    based = tensor.is_meta or tensor.data_ptr() % 16 == 0
    return based and tensor.shape[1] % 16 == tensor.stride(0) % 16 == 0


register(
    "quantised_linear(Tensor x, Tensor values, Tensor scale, Tensor? bias=None) -> Tensor",
    quantised_linear,
    quantised_linear_reference,
    lambda x, values, scale, bias=None: x.new_empty((x.shape[0], values.shape[0])),
)
