"""The gradients of a mixture of experts' products, of each assignment's row and of every expert's weight.

Of y_a = x_(a // k) @ weight_e^T, e the expert of a (grouped_linear.py), by the product rule:

    dx_t = sum over t's assignments a that are placed of dy_a @ weight_e
    dweight_e = sum over the assignments a of e of dy_a^T x_(a // k)

The gated product's are these of the packed projection, which is computed anew, after swiglu's gradient of it.

Shapes: dy [A, N] for A = T * k assignments, weight and dweight [E, N, K], x and dx [T, K], order [A] and starts [E + 1]
int32 from `group`. An assignment that is placed nowhere has no part in either, whatever its row of dy holds: a token
that has no other gets zeros, and so does the weight of an expert that has none.
Rounding: products accumulate in at least float32 and round once to the dtype. Of k > 1, dx is a sum of k such rows as
`combine` sums them, from j = 0 on in float32, and rounds once more: the rows stand in between, A * K * itemsize bytes,
as the forward pass's outputs do. To add them up where they are computed would need atomics, in no order that holds, or
every expert's weight in each token's program; standing in float32, they would take twice the memory and its traffic.
Floor: dx (touched * N * K + A * N + T * K) * itemsize bytes for the experts that have an assignment, dweight
(A * N + T * K + E * N * K) * itemsize; 2 * A * N * K operations each.

As MegaBlocks has them (Gale et al. 2022, arXiv:2211.15841), without its padding, copies or transposed weights. A
program owns its outputs to their end: dx takes N in order from 0, dweight its expert's assignments in order, both in
steps of a fixed size, without a split. So a token's dx depends on no other token; dweight is a sum over them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .combine import combine
from .grouped_linear import _find, check_routing, check_weight, owned
from .launch import launch, register, require, tl, triton
from .linear import _add_product, _aligned, _finish, _tile, _unit_columns
from .rms_norm import wide


def grouped_linear_dx_reference(dy: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """dx [T, K] of dy [T * k, N] and weight [E, N, K]; it waits for the device, to read `starts`."""
    rows = dy.new_zeros((order.shape[0], weight.shape[2]))
    for expert, mine in owned(order, starts):
        rows[mine] = dy[mine] @ weight[expert]
    return rows if k == 1 else wide(rows).unflatten(0, (-1, k)).sum(1).to(dy.dtype)


def grouped_linear_dweight_reference(dy: Tensor, x: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """dweight [E, N, K] of dy [T * k, N] and x [T, K]; it waits for the device, to read `starts`."""
    dweight = dy.new_zeros((starts.shape[0] - 1, dy.shape[1], x.shape[1]))
    for expert, mine in owned(order, starts):
        dweight[expert] = dy[mine].t() @ x[mine // k]
    return dweight


@triton.jit(do_not_specialize=["num_tiles", "num_assignments"])
def _grouped_linear_dx_kernel(
    dx_ptr,  # [A, K], contiguous: of each assignment by itself
    dy_ptr,  # [A, N], rows `stride_dy` apart
    weight_ptr,  # [E, N, K], experts `stride_expert` and rows `stride_weight` apart
    order_ptr,  # [A]
    starts_ptr,  # [E + 1]
    num_tiles,  # of assignments, over all experts: at least as many as there are
    num_assignments,
    num_experts,
    units_n,  # N; like K and the strides in units of UNIT elements, which tells the compiler a divisor
    units_k,
    stride_dy,
    stride_expert,
    stride_weight,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # The forward product's order: GROUP blocks of columns pass over all tiles, expert after expert.
    N = units_n * UNIT
    K = units_k * UNIT
    pid = tl.program_id(0)
    first = pid // (GROUP * num_tiles) * GROUP
    size = tl.minimum(tl.cdiv(K, BLOCK_K) - first, GROUP)
    within = pid % (GROUP * num_tiles)
    expert, begin = _find(starts_ptr, within // size, num_experts, BLOCK_E, BLOCK_M)
    if expert >= num_experts:
        return
    o_k = (first + within % size) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    o_n = tl.arange(0, BLOCK_N)
    row = tl.cast(stride_weight, tl.int64) * UNIT
    weight_ptr += expert.to(tl.int64) * stride_expert * UNIT
    weight_pointers = weight_ptr + o_n[:, None] * row + o_k[None, :]
    place = begin + tl.arange(0, BLOCK_M)
    o_a = tl.load(order_ptr + place, mask=place < tl.load(starts_ptr + expert + 1), other=num_assignments)
    m_a = o_a < num_assignments
    dy_pointers = dy_ptr + (o_a.to(tl.int64) * stride_dy * UNIT)[:, None] + o_n[None, :]

    # Columns of the weight are the matrix instruction's left operand, and assignments its right one, as in linear.py.
    acc = tl.zeros([BLOCK_K, BLOCK_M], dtype=tl.float32)
    for step in range(0, N, BLOCK_N):
        mask = m_k[None, :] if EVEN_N else m_k[None, :] & (o_n[:, None] < N - step)
        tile = tl.load(weight_pointers + step * row, mask=mask, other=0.0)
        dy_tile = _tile(dy_pointers, 0, step, m_a, o_n, N, EVEN_N, False)
        acc = _add_product(acc, tl.trans(tile), tl.trans(dy_tile))
    _finish(acc, o_a, o_k, m_k, dx_ptr, dx_ptr, num_assignments, K, K, False)


@triton.jit
def _grouped_linear_dweight_kernel(
    dweight_ptr,  # [E, N, K], contiguous
    dy_ptr,  # [A, N], rows `stride_dy` apart
    x_ptr,  # [T, K], rows `stride_x` apart
    order_ptr,  # [A]
    starts_ptr,  # [E + 1]
    units_n,  # N; like K and the strides in units of UNIT elements, which tells the compiler a divisor
    units_k,
    stride_dy,
    stride_x,
    SHARING: tl.constexpr,  # assignments that share a row of x
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tiles of an expert follow each other, and share its rows of dy and x in the L2.
    N = units_n * UNIT
    K = units_k * UNIT
    blocks_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * blocks_k
    expert = tl.program_id(0) // tiles
    within = tl.program_id(0) % tiles
    o_n = within // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = within % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n < N
    m_k = o_k < K
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)

    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in range(start, end, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        m_a = place < end
        o_a = tl.load(order_ptr + place, mask=m_a, other=0)
        dy_pointers = dy_ptr + (o_a.to(tl.int64) * stride_dy * UNIT)[:, None] + o_n[None, :]
        x_pointers = x_ptr + ((o_a // SHARING).to(tl.int64) * stride_x * UNIT)[:, None] + o_k[None, :]
        dy_tile = tl.load(dy_pointers, mask=m_a[:, None] & m_n[None, :], other=0.0)
        x_tile = tl.load(x_pointers, mask=m_a[:, None] & m_k[None, :], other=0.0)
        acc = _add_product(acc, tl.trans(dy_tile), x_tile)
    o_w = (expert.to(tl.int64) * N + o_n)[:, None] * K + o_k[None, :]
    tl.store(dweight_ptr + o_w, acc.to(dweight_ptr.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


def grouped_linear_dx(dy: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """The input gradient's kernel: dx [T, K], contiguous, of dy [T * k, N] and weight [E, N, K].

    Both are float32, bfloat16 or float16, rows of dy strided or not. The last dimension of weight must be
    contiguous; of experts without assignments it is not read. The values of `order` and `starts` must be those that
    `group` gives: they are not checked.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(dy, weight, order, starts)
    if dy.dim() != 2 or weight.dim() != 3 or weight.shape[1] != dy.shape[1]:
        raise ValueError(f"dy must be [A, N] and weight [E, N, K], got {list(dy.shape)} and {list(weight.shape)}")
    (count, depth), (experts, _, width) = dy.shape, weight.shape
    if k < 1 or count % k:
        raise ValueError(f"k must divide the rows of dy, k assignments for each row of x, got {k} and {count} rows")
    check_weight(weight, dy.dtype)
    check_routing(order, starts, count // k, k, experts)
    rows = dy.new_zeros((count, width))  # of what is placed nowhere there are zeros, and nobody knows which those are
    if not rows.numel():
        return rows[: count // k]
    dy = _unit_columns(dy)
    based = weight.is_meta or weight.data_ptr() % 16 == 0
    strides = width % 8 == weight.stride(0) % 8 == weight.stride(1) % 8 == 0
    unit = 8 if depth % 8 == 0 and strides and based and _aligned(dy) else 1
    options = _options("dx", dy, unit, count, experts)
    block_m = options["BLOCK_M"]
    tiles = (count + min(count, experts) * (block_m - 1)) // block_m  # as in the forward product
    launch(
        _grouped_linear_dx_kernel,
        (triton.cdiv(width, options["BLOCK_K"]) * tiles,),
        rows,
        dy,
        weight,
        order.contiguous(),
        starts.contiguous(),
        tiles,
        count,
        experts,
        depth // unit,
        width // unit,
        dy.stride(0) // unit,
        weight.stride(0) // unit,
        weight.stride(1) // unit,
        UNIT=unit,
        EVEN_N=depth % options["BLOCK_N"] == 0,
        BLOCK_E=triton.next_power_of_2(max(experts, 16)),
        **options,
    )
    if k == 1:
        return rows
    return combine(rows, rows.new_ones((count // k, k)), rows.new_zeros(width).expand(count // k, width))


def grouped_linear_dweight(dy: Tensor, x: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """The weight gradient's kernel: dweight [E, N, K], contiguous, of dy [T * k, N] and x [T, K], E from `starts`.

    float32, bfloat16 or float16, one for all; rows may be strided. The values of `order` and `starts` must be those
    that `group` gives: they are not checked.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(dy, x, order, starts)
    if dy.dim() != 2 or x.dim() != 2 or k < 1 or dy.shape[0] != x.shape[0] * k:
        given = f"{list(dy.shape)}, {list(x.shape)} and {k}"
        raise ValueError(f"dy must be [T * k, N] and x [T, K], k at least 1, got {given}")
    if x.dtype != dy.dtype:
        raise ValueError(f"x must be {dy.dtype} as dy is, got {x.dtype}")
    (count, height), (tokens, width), experts = dy.shape, x.shape, max(starts.numel() - 1, 0)
    check_routing(order, starts, tokens, k, experts)
    dweight = dy.new_empty((experts, height, width))
    if not dweight.numel():
        return dweight
    dy, x = _unit_columns(dy), _unit_columns(x)
    unit = 8 if height % 8 == width % 8 == 0 and _aligned(dy) and _aligned(x) else 1
    options = _options("dweight", dy, unit, count, experts)
    launch(
        _grouped_linear_dweight_kernel,
        (experts * triton.cdiv(height, options["BLOCK_N"]) * triton.cdiv(width, options["BLOCK_K"]),),
        dweight,
        dy,
        x,
        order.contiguous(),
        starts.contiguous(),
        height // unit,
        width // unit,
        dy.stride(0) // unit,
        x.stride(0) // unit,
        SHARING=k,
        UNIT=unit,
        **options,
    )
    return dweight


def _options(operation: str, dy: Tensor, unit: int, count: int, experts: int) -> Mapping[str, Any]:
    return tuning.config(
        "grouped_linear_backward",
        dy.device,
        operation=operation,
        tokens=triton.next_power_of_2(triton.cdiv(count, experts)),  # on average: the routing is on the device
        itemsize=dy.element_size(),
        aligned=unit > 1,
    )


def gradient(inputs: Sequence[Any], needed: Sequence[bool], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of each of grouped_linear's inputs: of x and of weight, where they are needed."""
    dx = dweight = None
    if dy is not None:
        x, weight, *routing = inputs
        dx = torch.ops.tritium.grouped_linear_dx(dy, weight, *routing) if needed[0] else None
        dweight = torch.ops.tritium.grouped_linear_dweight(dy, x, *routing) if needed[1] else None
    return dx, dweight, None, None, None


def gated_gradient(inputs: Sequence[Any], needed: Sequence[bool], dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of each of grouped_swiglu's. The packed projection is computed anew: saved, it would be a layer's largest."""
    if dz is None:
        return (None,) * 5
    packed = torch.ops.tritium.grouped_linear(*inputs)
    return gradient(inputs, needed, torch.ops.tritium.swiglu_backward(dz, packed))


register(
    "grouped_linear_dx(Tensor dy, Tensor weight, Tensor order, Tensor starts, int k) -> Tensor",
    grouped_linear_dx,
    grouped_linear_dx_reference,
    lambda dy, weight, order, starts, k: dy.new_empty((dy.shape[0] // k, weight.shape[2])),
)
register(
    "grouped_linear_dweight(Tensor dy, Tensor x, Tensor order, Tensor starts, int k) -> Tensor",
    grouped_linear_dweight,
    grouped_linear_dweight_reference,
    lambda dy, x, order, starts, k: dy.new_empty((starts.shape[0] - 1, dy.shape[1], x.shape[1])),
)
