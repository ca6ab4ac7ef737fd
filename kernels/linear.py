"""The linear layer, and its two fused forms: added to the residual stream, and gated.

    y = x @ weight^T + bias                 r' = r + (x @ weight^T + bias)
    z = silu(g) * u                         where [g, u] = x @ weight^T + bias, g the first F columns and u the last F

The gradient, of each form the same once dy is that of x @ weight^T + bias (of z: swiglu's, of g and u computed anew):

    dx = dy @ weight,   dweight = dy^T @ x,   dbias = sum of dy over the tokens,   dr = dr'

Shapes: x [T, K], weight [N, K], bias [N] or None, r and r' [T, N], y [T, N]; gated: weight [2F, K], bias [2F] or None,
z [T, F].
Rounding: products accumulate in at least float32; the sum with bias, and then with the residual, each rounds once to
x's dtype (the fused residual form may round only once, which is nearer to truth). Gated: g and u round to x's dtype,
silu is computed in float32 and rounds, the product rounds once more. Gradients: dx, dweight and dbias accumulate in at
least float32 and round once, but for the gated form's, of which g, u and their gradients round before.
Floor: (N * K + T * (K + N)) * itemsize bytes, T * N more for the residual (gated: 2 * F * K + T * (K + F));
2 * T * N * K operations (gated: 4 * T * F * K). Each of dx and dweight: as many bytes, 2 * T * N * K operations.

The kernel's bits for a token do not depend on how many tokens there are (He 2025, "Defeating nondeterminism in LLM
inference"): one program owns an output to its end and takes K in order from 0, in steps of a fixed BLOCK_K, without a
split. Weight rows are the matrix instruction's left operand and tokens its right one, so that one token pads to 16 and
not to 64, and one token and a thousand go through the same class of instruction. The gradient's products are the
vendor's, the same bits run to run but not for another batch, over which dweight is a sum in any case.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import wide_dtype
from .swiglu import swiglu_reference

# Up to this many rows, CPU libraries are up to twice as fast with the weight as the left operand (measured from 2 to 16
# rows at widths 128 and 576); for one row there is no difference.
FEW_ROWS = 16


def _weight_left(x: Tensor) -> bool:
    return x.is_cpu and x.dim() == 2 and 1 < x.shape[0] <= FEW_ROWS


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias, [T, K] -> [T, N]."""
    if bias is None and _weight_left(x):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight, bias)


def linear_residual_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight^T + bias, [T, K] and [T, N] -> [T, N]; the residual is not overwritten."""
    if bias is not None:
        return residual + F.linear(x, weight, bias)
    if _weight_left(x):
        return residual + torch.mm(weight, x.t()).t()
    return torch.addmm(residual, x, weight.t())


def linear_swiglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up of the packed projection, [T, K] -> [T, F]; weight [2F, K], the gate's rows first."""
    return swiglu_reference(linear_reference(x, weight, bias))


@triton.jit
def owned_block(num_tokens, N, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """Where the program's block begins: its first weight row, and its first token.

    GROUP blocks of weight rows pass over all tokens before the next ones begin: what runs at one time shares the L2.
    """
    pid = tl.program_id(0)
    num_blocks_m = tl.cdiv(num_tokens, BLOCK_M)
    first = pid // (GROUP * num_blocks_m) * GROUP
    size = tl.minimum(tl.cdiv(N, ROWS) - first, GROUP)
    within = pid % (GROUP * num_blocks_m)
    return (first + within % size) * ROWS, within // size * BLOCK_M


@triton.jit
def _tile(pointers, row, k, m_rows, o_k, K, EVEN_K: tl.constexpr, TMA: tl.constexpr):
    """One [rows, BLOCK_K] tile at column k, zero beyond the edges. With TMA, `pointers` is a descriptor."""
    if TMA:
        tile = pointers.load([row, k])
    elif EVEN_K:
        tile = tl.load(pointers + k, mask=m_rows[:, None], other=0.0)
    else:
        tile = tl.load(pointers + k, mask=m_rows[:, None] & (o_k[None, :] < K - k), other=0.0)
    return tile


@triton.jit
def _finish(acc, o_m, o_n, m_n, y_ptr, residual_ptr, num_tokens, N, stride_residual, HAS_RESIDUAL: tl.constexpr):
    """Turns acc [rows of weight, tokens] over, adds the residual, rounds and stores."""
    mask = (o_m < num_tokens)[:, None] & m_n[None, :]
    o_m = o_m.to(tl.int64)[:, None]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + o_m * stride_residual + o_n[None, :], mask=mask, other=0.0)
        y = (residual.to(tl.float32) + tl.trans(acc)).to(y_ptr.dtype.element_ty)
    else:
        y = tl.trans(acc.to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + o_m * N + o_n[None, :], y, mask=mask)


@triton.jit
def _add_product(acc, tile, x_tile):
    """acc + tile @ x_tile. A float32 dot adds product after product to what it is given: a chain over all of K errs
    several times more than a vendor's sums do, so each block is summed by itself. Fused by name: Triton would turn
    dot + acc back into the chain."""
    if tile.dtype == tl.float32:
        acc = tl.fma(tl.dot(tile, x_tile, input_precision="ieee"), tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        acc = tl.dot(tile, x_tile, acc)
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    y_ptr,  # [T, N], contiguous
    x,  # [T, K], rows `stride_x` apart: a pointer, or with TMA a descriptor
    weight,  # [N, K] (GATED: [2 N, K]), rows `stride_weight` apart: likewise
    bias_ptr,  # [N] (GATED: [2 N])
    residual_ptr,  # [T, N], rows `stride_residual` apart
    num_tokens,
    N,
    units_k,  # K; like stride_x and stride_weight in units of UNIT elements, which tells the compiler a divisor
    stride_x,
    stride_weight,
    stride_residual,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,  # weight rows that a program owns: the rest of its BLOCK_N are zero, and are not read
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    start_n, start_m = owned_block(num_tokens, N, ROWS, BLOCK_M, GROUP)
    local = tl.arange(0, BLOCK_N)
    o_n = start_n + local
    o_m = start_m + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_n = (local < ROWS) & (o_n < N)
    m_m = o_m < num_tokens
    K = units_k * UNIT
    if TMA:
        x_pointers = x
        weight_pointers = weight
        up_pointers = weight
    else:
        x_pointers = x + (o_m.to(tl.int64) * stride_x * UNIT)[:, None] + o_k[None, :]
        weight_pointers = weight + (o_n.to(tl.int64) * stride_weight * UNIT)[:, None] + o_k[None, :]
        up_pointers = weight_pointers + tl.cast(N, tl.int64) * stride_weight * UNIT

    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = tl.trans(_tile(x_pointers, start_m, k, m_m, o_k, K, EVEN_K, TMA))
        tile = _tile(weight_pointers, start_n, k, m_n, o_k, K, EVEN_K, TMA)
        acc = _add_product(acc, tile, x_tile)
        if GATED:
            up_tile = _tile(up_pointers, N + start_n, k, m_n, o_k, K, EVEN_K, TMA)
            up_acc = _add_product(up_acc, up_tile, x_tile)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up_acc += tl.load(bias_ptr + N + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if GATED:
        dtype = y_ptr.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = activated * up_acc.to(dtype).to(tl.float32)
    if HAS_RESIDUAL and BLOCK_M == 256:  # in two halves, for the registers that both need
        halves = tl.permute(tl.reshape(acc, [BLOCK_N, 2, BLOCK_M // 2]), [0, 2, 1])
        early, late = tl.split(halves)
        o_half = start_m + tl.arange(0, BLOCK_M // 2)
        _finish(early, o_half, o_n, m_n, y_ptr, residual_ptr, num_tokens, N, stride_residual, HAS_RESIDUAL)
        o_half += BLOCK_M // 2
        _finish(late, o_half, o_n, m_n, y_ptr, residual_ptr, num_tokens, N, stride_residual, HAS_RESIDUAL)
    else:
        _finish(acc, o_m, o_n, m_n, y_ptr, residual_ptr, num_tokens, N, stride_residual, HAS_RESIDUAL)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The kernel: y [T, N], contiguous. float32, bfloat16 or float16; the weight and bias have x's dtype.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    return _run(x, weight, bias)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """The kernel with a residual [T, N]: residual + x @ weight^T + bias, rounded once; the residual survives."""
    return _run(x, weight, bias, residual)


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The gated kernel: weight [2F, K] with the gate's rows first, z [T, F], contiguous."""
    return _run(x, weight, bias, gated=True)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, gated: bool = False) -> Tensor:
    require(x, weight, bias, residual)
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}")
    tokens, depth = x.shape
    rows = weight.shape[0]
    if gated and rows % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, got {rows} in all")
    width = rows // 2 if gated else rows
    for name, tensor, shape in (
        ("weight", weight, (rows, depth)),
        ("bias", bias, (rows,)),
        ("residual", residual, (tokens, width)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(f"{name} must be {list(shape)} {x.dtype}, got {list(tensor.shape)} {tensor.dtype}")
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x, weight = _unit_columns(x), _unit_columns(weight)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else _unit_columns(residual)
    unit = 8 if depth % 8 == 0 and _aligned(x) and _aligned(weight) else 1
    padded = max(16, triton.next_power_of_2(tokens))  # a bounded number of keys, however many lengths there are
    aligned = unit > 1 and (residual is None or width % 16 == residual.stride(0) % 16 == 0)
    key = {"width": width, "itemsize": x.element_size(), "gated": gated, "aligned": aligned}
    options = tuning.config("linear", x.device, tokens=padded, outputs=padded * width, **key)
    block_n, block_m, block_k = options["BLOCK_N"], options["BLOCK_M"], options["BLOCK_K"]
    tma = options["TMA"]
    launch(
        _linear_kernel,
        (triton.cdiv(width, options["ROWS"]) * triton.cdiv(tokens, block_m),),
        y,
        _descriptor(x, [block_m, block_k]) if tma else x,
        _descriptor(weight, [block_n, block_k]) if tma else weight,
        bias if bias is not None else y,
        residual if residual is not None else y,
        tokens,
        width,
        depth // unit,
        x.stride(0) // unit,
        weight.stride(0) // unit,
        residual.stride(0) if residual is not None else width,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GATED=gated,
        UNIT=unit,
        EVEN_K=depth % block_k == 0,
        **options,
    )
    return y


def _unit_columns(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension: itself, or a copy."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _aligned(tensor: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes and do not overlap: what wide loads and the copy engine need."""
    based = tensor.is_meta or tensor.data_ptr() % 16 == 0
    return based and tensor.stride(0) % 8 == 0 and tensor.stride(0) >= tensor.shape[1] > 0


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), [tensor.stride(0), 1], block)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _gradient(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias and, where there is one, the residual; `dy` is that of the whole projection."""
    found: list[Tensor | None] = [None] * len(inputs)
    if dy is None:
        return tuple(found)
    if needed[0]:
        found[0] = torch.mm(dy, inputs[1])
    if needed[1]:
        found[1] = torch.mm(dy.t(), inputs[0])
    if any(needed[2:3]):  # a bias that was left out is not among the inputs
        found[2] = dy.sum(0, dtype=wide_dtype(dy.dtype)).to(dy.dtype)
    if any(needed[3:]):
        found[3] = dy
    return tuple(found)


def _gated_gradient(inputs: Sequence[Any], needed: Sequence[bool], dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """The packed projection is computed anew: saved, it would be the largest tensor of a layer."""
    if dz is None:
        return (None,) * len(inputs)
    packed = torch.ops.tritium.linear(*inputs)
    return _gradient(inputs, needed, torch.ops.tritium.swiglu_backward(dz, packed))


register("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear, linear_reference, _fake, _gradient)
register(
    "linear_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
    linear_residual,
    linear_residual_reference,
    _fake,
    _gradient,
)
register(
    "linear_swiglu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    linear_swiglu,
    linear_swiglu_reference,
    lambda x, weight, bias=None: x.new_empty((x.shape[0], weight.shape[0] // 2)),
    _gated_gradient,
)
