"""The products of a mixture of experts: each assignment's row times its own expert's weight, plain and gated.

    y_a = x_(a // k) @ weight_e^T         z_a = silu(g) * u    where [g, u] = x_(a // k) @ weight_e^T, e the expert of a

Shapes: x [T, K], weight [E, N, K], y [A, N] for A = T * k assignments (a = t * k + j is token t's j-th); gated: weight
[E, 2F, K] with the gate's rows first, z [A, F]. order [A] int32 holds the assignments sorted by expert, and starts
[E + 1] int32 says where each expert's begin: expert e has order[starts[e] : starts[e + 1]], every a is there once, or
nowhere: then its row of y or z is undefined (zeros by the definition), which reaches no other row. Both come from
`group` (kernels/routing.py). Their shapes are checked; their values are not, as this would have to wait for the device.
Rounding: as kernels/linear.py. Products accumulate in at least float32, and y rounds once to x's dtype. Gated: g and u
round, silu is computed in float32 and rounds, the product rounds once more.
Floor: the weights of the experts that have an assignment, (touched * N * K + T * K + A * N) * itemsize bytes (gated:
touched * 2 * F * K + T * K + A * F); 2 * A * N * K operations (gated: 4 * A * F * K).

One launch for all experts, as in MegaBlocks (Gale et al. 2022, arXiv:2211.15841), but without padding or a copy of x:
the grid has as many tiles of tokens as any routing can make, known without a look at the device, and a program finds
its expert in `starts`. Experts without an assignment are never read. A token's bits depend neither on the other tokens
nor on their routing, for the reasons that kernels/linear.py gives: K in order from 0 in fixed steps, weight rows as the
left operand of one class of matrix instruction.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .linear import _add_product, _aligned, _finish, _tile, linear_reference
from .routing import MOST_EXPERTS
from .swiglu import swiglu_reference


def owned(order: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has assignments, and which those are; it waits for the device, to read `starts`."""
    places = order.long()
    for expert, (start, end) in enumerate(pairwise(starts.tolist())):
        if start < end:
            yield expert, places[start:end]


def grouped_linear_reference(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """y_a = x_(a // k) @ weight_e^T, [T, K] -> [A, N]; it waits for the device, to read `starts`."""
    y = x.new_zeros((order.shape[0], weight.shape[1]))
    for expert, mine in owned(order, starts):
        y[mine] = linear_reference(x[mine // k], weight[expert])
    return y


def grouped_swiglu_reference(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """silu(gate) * up of each assignment's packed projection, [T, K] -> [A, F]; weight [E, 2F, K], gate rows first."""
    return swiglu_reference(grouped_linear_reference(x, weight, order, starts, k))


@triton.jit
def _find(starts_ptr, tile, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile, counted over all experts' tiles, and where in `order` the tile begins; an expert beyond the
    last where there is no such tile."""
    MOST: tl.constexpr = BLOCK_E * BLOCK_M  # more than the rows that all tiles together lack
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < num_experts
    start = tl.load(starts_ptr + o_e, mask=m_e, other=0)
    end = tl.load(starts_ptr + o_e + 1, mask=m_e, other=0)
    ends = tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0)
    lacking = ends * BLOCK_M - end
    # Both grow from expert to expert, and come of one reduction: nothing may be read before it.
    last = tl.max(tl.where(m_e & (ends <= tile), (o_e + 1) * MOST + lacking, 0), 0)
    return last // MOST, tile * BLOCK_M - last % MOST


@triton.jit(do_not_specialize=["num_tiles", "num_assignments"])
def _grouped_linear_kernel(
    y_ptr,  # [A, N], contiguous
    x_ptr,  # [T, K], rows `stride_x` apart
    weight_ptr,  # [E, N, K] (GATED: [E, 2 N, K]), experts `stride_expert` and rows `stride_weight` apart
    order_ptr,  # [A]
    starts_ptr,  # [E + 1]
    num_tiles,  # of tokens, over all experts: at least as many as there are
    num_assignments,
    num_experts,
    N,
    units_k,  # K; like the strides in units of UNIT elements, which tells the compiler a divisor
    stride_x,
    stride_expert,
    stride_weight,
    SHARING: tl.constexpr,  # assignments that share a row of x
    GATED: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,  # weight rows that a program owns: the rest of its BLOCK_N are zero, and are not read
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP blocks of weight rows pass over all tiles, expert after expert, before the next ones begin: the tiles of an
    # expert follow each other and share its weights in the L2, as the blocks of a group share the tile's tokens.
    pid = tl.program_id(0)
    first = pid // (GROUP * num_tiles) * GROUP
    size = tl.minimum(tl.cdiv(N, ROWS) - first, GROUP)
    within = pid % (GROUP * num_tiles)
    start_n = (first + within % size) * ROWS
    tile_m = within // size

    expert, begin = _find(starts_ptr, tile_m, num_experts, BLOCK_E, BLOCK_M)
    if expert >= num_experts:
        return
    local = tl.arange(0, BLOCK_N)
    o_n = start_n + local
    m_n = (local < ROWS) & (o_n < N)
    o_k = tl.arange(0, BLOCK_K)
    K = units_k * UNIT
    weight_ptr += expert.to(tl.int64) * stride_expert * UNIT
    weight_pointers = weight_ptr + (o_n.to(tl.int64) * stride_weight * UNIT)[:, None] + o_k[None, :]
    up_pointers = weight_pointers + tl.cast(N, tl.int64) * stride_weight * UNIT
    place = begin + tl.arange(0, BLOCK_M)
    o_a = tl.load(order_ptr + place, mask=place < tl.load(starts_ptr + expert + 1), other=num_assignments)
    m_a = o_a < num_assignments
    x_pointers = x_ptr + ((o_a // SHARING).to(tl.int64) * stride_x * UNIT)[:, None] + o_k[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(0, K, BLOCK_K):
        tile = _tile(weight_pointers, 0, step, m_n, o_k, K, EVEN_K, False)  # first: its address is not of `order`
        if GATED:
            up_tile = _tile(up_pointers, 0, step, m_n, o_k, K, EVEN_K, False)
        x_tile = tl.trans(_tile(x_pointers, 0, step, m_a, o_k, K, EVEN_K, False))
        acc = _add_product(acc, tile, x_tile)
        if GATED:
            up_acc = _add_product(up_acc, up_tile, x_tile)

    if GATED:
        dtype = y_ptr.dtype.element_ty
        gate = acc.to(dtype).to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        acc = activated * up_acc.to(dtype).to(tl.float32)
    _finish(acc, o_a, o_n, m_n, y_ptr, y_ptr, num_assignments, N, N, False)


def grouped_linear(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """The kernel: y [A, N], contiguous, in the order of assignments. float32, bfloat16 or float16, as the weight.

    `k` is how many assignments share a row of x: A is T * k; each k is compiled by itself. The last dimension of weight
    must be contiguous. The values of `order` and `starts` must be those that
    `group` gives: they are not checked, and others may read or write what is not theirs.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    return _run(x, weight, order, starts, k)


def grouped_swiglu(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """The gated kernel: weight [E, 2F, K] with the gate's rows first, z [A, F], contiguous; else as grouped_linear."""
    return _run(x, weight, order, starts, k, gated=True)


def check_weight(weight: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError for a weight [E, N, K] that no kernel takes beside rows of `dtype`."""
    if weight.dtype != dtype:
        raise ValueError(f"weight must be {dtype} as the rows are, got {weight.dtype}")
    if weight.stride(2) != 1 and weight.shape[2] > 1:
        strides = f"the last dimension contiguous, got strides {list(weight.stride())}"
        raise ValueError(f"weight {list(weight.shape)} must have {strides}: every call would copy all experts")
    if weight.shape[0] > MOST_EXPERTS:
        raise ValueError(f"weight {list(weight.shape)} has {len(weight)} experts, and a kernel takes {MOST_EXPERTS}")


def check_routing(order: Tensor, starts: Tensor, tokens: int, k: int, experts: int) -> None:
    """Raises ValueError for what is not the shape of a routing of `tokens` rows, k assignments each, to `experts`."""
    if k < 1:
        raise ValueError(f"k must be at least 1, the assignments that share a row of x, got {k}")
    for name, tensor, length in (("order", order, tokens * k), ("starts", starts, experts + 1)):
        if tensor.shape != (length,) or tensor.dtype != torch.int32:
            expected = f"[{length}] torch.int32 for {tokens} rows of x, k = {k} and {experts} experts"
            raise ValueError(f"{name} must be {expected}, got {list(tensor.shape)} {tensor.dtype}")
    if tokens and not experts:
        raise ValueError(f"{tokens * k} assignments need an expert, and there is none")


def _run(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int, gated: bool = False) -> Tensor:
    require(x, weight, order, starts)
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1]:
        raise ValueError(f"x must be [T, K] and weight [E, N, K], got {list(x.shape)} and {list(weight.shape)}")
    (tokens, depth), (experts, rows, _) = x.shape, weight.shape
    check_weight(weight, x.dtype)
    if gated and rows % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, got {rows} in all")
    check_routing(order, starts, tokens, k, experts)
    count = tokens * k
    width = rows // 2 if gated else rows
    y = x.new_empty((count, width))
    if not y.numel():
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    based = weight.is_meta or weight.data_ptr() % 16 == 0
    aligned = depth % 8 == weight.stride(0) % 8 == weight.stride(1) % 8 == 0 and based and _aligned(x)
    unit = 8 if aligned else 1
    options = tuning.config(
        "grouped_linear",
        x.device,
        tokens=triton.next_power_of_2(triton.cdiv(count, experts)),  # on average: the routing is on the device
        outputs=triton.next_power_of_2(count) * width,
        width=width,
        itemsize=x.element_size(),
        gated=gated,
        aligned=aligned,
    )
    # ceil(m / BLOCK_M) summed over the experts that have m > 0 assignments, of which there are at most min(A, E).
    block_m = options["BLOCK_M"]
    tiles = (count + min(count, experts) * (block_m - 1)) // block_m
    launch(
        _grouped_linear_kernel,
        (triton.cdiv(width, options["ROWS"]) * tiles,),
        y,
        x,
        weight,
        order.contiguous(),
        starts.contiguous(),
        tiles,
        count,
        experts,
        width,
        depth // unit,
        x.stride(0) // unit,
        weight.stride(0) // unit,
        weight.stride(1) // unit,
        SHARING=k,
        GATED=gated,
        UNIT=unit,
        EVEN_K=depth % options["BLOCK_K"] == 0,
        BLOCK_E=triton.next_power_of_2(max(experts, 16)),
        **options,
    )
    return y


def _fake(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    return x.new_empty((order.shape[0], weight.shape[1]))


def _gradient(*args: Any) -> tuple[Any, ...]:
    from .grouped_linear_backward import gradient  # which stands on this file

    return gradient(*args)


def _gated_gradient(*args: Any) -> tuple[Any, ...]:
    from .grouped_linear_backward import gated_gradient

    return gated_gradient(*args)


register(
    "grouped_linear(Tensor x, Tensor weight, Tensor order, Tensor starts, int k) -> Tensor",
    grouped_linear,
    grouped_linear_reference,
    _fake,
    _gradient,
)
register(
    "grouped_swiglu(Tensor x, Tensor weight, Tensor order, Tensor starts, int k) -> Tensor",
    grouped_swiglu,
    grouped_swiglu_reference,
    lambda x, weight, order, starts, k: x.new_empty((order.shape[0], weight.shape[1] // 2)),
    _gated_gradient,
)
