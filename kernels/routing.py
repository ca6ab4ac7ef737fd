"""Routing to experts: which experts each token goes to and with what weight, and the tokens sorted by expert.

    p = softmax(logits),   experts = the k largest logits of a token,   weights = p[experts] [/ sum(p[experts])]

(Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088, and Qwen3 renormalise.) An *assignment* a = t * k + j
is token t's j-th expert. `group` sorts the assignments by expert, which is how grouped products read them: expert e
owns order[starts[e] : starts[e + 1]]. An id that is no expert's (-1, say, as a captured batch's padding has) places its
assignment nowhere: starts[E] is how many are placed, and order is 0 from there on.

Shapes: logits [T, E], experts [T, k] int32, likeliest first, weights [T, k]; order [T * k] and starts [E + 1], int32.
Rounding: all in float32 (float64 stays); the weights round once to logits' dtype. The choice is one of the logits
alone: ties go to the lower expert, and a NaN counts as -inf, so that k distinct experts come of any row. A row's
weights are NaN where a logit of it is, or where its largest is infinite.
Floor: T * E * itemsize bytes read and T * k * (4 + itemsize) written, about (8 + 5 k) * T * E operations; for `group`
T * k * 4 bytes read, and (T * k + E + 1) * 4 written.

A token's bits depend on its logits alone, not on the launch, let alone on the batch. The softmax's sum is one of
masses, exp(x - max) rounded down to whole multiples of 2^-40: integers, which add up exactly in any order. To
renormalise, that sum cancels, and only the one over the k experts is taken, in their order. The k largest are found one
after another: the largest logit as an integer, then the lowest expert that has it.

`group` is one launch of a program an expert, without atomics: each reads all T * k ids twice, counting those below its
expert, then giving its own their places by a running count. That is 8 * E * T * k bytes read in all, nearly all of them
from L2 (64 MiB at 65536 assignments and 128 experts); ids that fit one block, as at a decode step, are read once.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, require_able, tl, triton
from .rms_norm import wide

MOST_EXPERTS = 1024  # what one program holds a row of
MOST_ASSIGNMENTS = 2**30  # places, and a block beyond them, are 32-bit numbers


def route_reference(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The definition: logits [T, E] -> experts [T, k] int32 and weights [T, k] in logits' dtype."""
    x = wide(logits)
    ordered = x.masked_fill(x.isnan(), float("-inf")).sort(dim=-1, descending=True, stable=True)
    experts = ordered.indices[:, :k]
    weights = x.softmax(-1).gather(-1, experts)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts.int(), weights.to(logits.dtype)


def group_reference(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The definition: experts [T, k] int32 -> order [T * k] and starts [num_experts + 1], int32."""
    ids = experts.flatten()
    ordered, order = ids.masked_fill((ids < 0) | (ids > num_experts), num_experts).sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=experts.dtype, device=experts.device)
    return order.masked_fill(ordered == num_experts, 0).int(), torch.searchsorted(ordered, bounds, out_int32=True)


@triton.jit
def _turned(bits):
    """A float32's bits as an integer of the same order, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,  # [T, E], rows `stride_x` apart
    experts_ptr,  # [T, K], contiguous
    weights_ptr,  # [T, K], contiguous
    num_tokens,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    LOWEST: tl.constexpr = -0x80000000  # below every logit: an expert that was taken
    UNIT: tl.constexpr = 1 << 40
    o_t = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    o_k = tl.arange(0, BLOCK_K)[None, :]
    m_t = o_t < num_tokens
    x = tl.load(logits_ptr + o_t * stride_x + o_e, mask=m_t & (o_e < E), other=float("-inf")).to(tl.float32)

    # Beyond the last expert there is -inf, which loses every tie by its place (and K <= E), and has no mass.
    low = tl.where(x != x, float("-inf"), x)
    keys = _turned(tl.where(low == 0.0, 0, low.to(tl.int32, bitcast=True)))  # one for both zeros
    top = _turned(tl.max(keys, axis=1, keep_dims=True)).to(tl.float32, bitcast=True)
    experts = tl.zeros([ROWS, BLOCK_K], dtype=tl.int32)
    masses = tl.zeros([ROWS, BLOCK_K], dtype=tl.float32)
    total = tl.zeros([ROWS, 1], dtype=tl.float32)
    for j in range(K):
        best = tl.max(keys, axis=1, keep_dims=True)
        expert = tl.min(tl.where(keys == best, o_e, BLOCK_E), axis=1, keep_dims=True)
        keys = tl.where(o_e == expert, LOWEST, keys)
        mass = tl.exp(_turned(best).to(tl.float32, bitcast=True) - top)
        total += mass
        experts = tl.where(o_k == j, expert, experts)
        masses = tl.where(o_k == j, mass, masses)

    below = x - top
    undefined = below != below  # a NaN, or inf - inf
    if not RENORMALISE:
        units = (tl.where(undefined, 0.0, tl.exp(below)) * UNIT).to(tl.int64)
        total = tl.sum(units, axis=1, keep_dims=True).to(tl.float32) * (1.0 / UNIT)
    undefined = tl.max(tl.where(undefined, 1, 0), axis=1, keep_dims=True) > 0
    weights = tl.where(undefined, float("nan"), tl.div_rn(masses, tl.broadcast_to(total, [ROWS, BLOCK_K])))
    m_k = m_t & (o_k < K)
    tl.store(experts_ptr + o_t * K + o_k, experts, mask=m_k)
    tl.store(weights_ptr + o_t * K + o_k, weights.to(weights_ptr.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["units"])
def _group_kernel(
    experts_ptr,  # [T * k], contiguous
    order_ptr,  # [T * k]
    starts_ptr,  # [E + 1]
    units,  # T * k in units of UNIT, which tells the compiler a divisor
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_assignments = units * UNIT
    expert = tl.program_id(0)
    none = tl.num_programs(0)  # beyond the last assignment: neither below an expert nor equal to one
    local = tl.arange(0, BLOCK)
    first = tl.load(experts_ptr + local, mask=local < num_assignments, other=none)
    below = tl.where((first >= 0) & (first < expert), 1, 0)
    for start in range(BLOCK, num_assignments, BLOCK):
        o_a = start + local
        ids = tl.load(experts_ptr + o_a, mask=o_a < num_assignments, other=none)
        below += tl.where((ids >= 0) & (ids < expert), 1, 0)
    place = tl.sum(below, axis=0)
    tl.store(starts_ptr + expert, place)
    ids = first
    for start in range(0, num_assignments, BLOCK):
        mine = tl.where(ids == expert, 1, 0)
        tl.store(order_ptr + place + tl.cumsum(mine, axis=0) - 1, start + local, mask=mine > 0)
        place += tl.sum(mine, axis=0)
        o_a = start + BLOCK + local
        ids = tl.load(experts_ptr + o_a, mask=o_a < num_assignments, other=none)
    if expert == none - 1:
        tl.store(starts_ptr + none, place)
        for start in range(place, num_assignments, BLOCK):  # what nobody owns
            o_a = start + local
            tl.store(order_ptr + o_a, tl.zeros([BLOCK], dtype=tl.int32), mask=o_a < num_assignments)


def route(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The kernel: experts [T, k] int32 and weights [T, k] of logits [T, E]. float32, bfloat16 or float16.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(logits)
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MOST_EXPERTS:
        raise ValueError(f"logits must be [tokens, experts] with 1 to {MOST_EXPERTS} experts, got {list(logits.shape)}")
    tokens, count = logits.shape
    if not 0 < k <= count:
        raise ValueError(f"k must be 1 to {count}, the number of experts, got {k}")
    experts = torch.empty((tokens, k), dtype=torch.int32, device=logits.device)
    weights = logits.new_empty((tokens, k))
    if not tokens:
        return experts, weights
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    options = tuning.config("routing", logits.device, operation="route", experts=count, rows=tokens)
    launch(
        _route_kernel,
        (triton.cdiv(tokens, options["ROWS"]),),
        logits,
        experts,
        weights,
        tokens,
        logits.stride(0),
        E=count,
        K=k,
        RENORMALISE=renormalise,
        BLOCK_E=triton.next_power_of_2(count),
        BLOCK_K=triton.next_power_of_2(k),
        **options,
    )
    return experts, weights


def group(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The kernel: order [T * k] and starts [num_experts + 1], int32, of experts [T, k] int32.

    An id that is not 0 to num_experts - 1 places its assignment nowhere: order holds those that are placed, starts[-1]
    in all, and then zeros. Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require_able(experts)
    if experts.dtype != torch.int32:
        raise TypeError(f"experts must be torch.int32, as route gives them, got {experts.dtype}")
    if experts.dim() != 2 or experts.numel() > MOST_ASSIGNMENTS:
        raise ValueError(f"experts must be [T, k], at most {MOST_ASSIGNMENTS} in all, got {list(experts.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be 1 or more, got {num_experts}")
    assignments = experts.numel()
    order = torch.empty(assignments, dtype=torch.int32, device=experts.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=experts.device)
    if not assignments:
        return order, starts.zero_()
    # No block of its own for each count: a server would compile one after the other.
    options = tuning.config("routing", experts.device, operation="group", experts=num_experts, rows=assignments)
    unit = math.gcd(assignments, 16 // experts.itemsize)
    launch(
        _group_kernel, (num_experts,), experts.contiguous(), order, starts, assignments // unit, UNIT=unit, **options
    )
    return order, starts


def _gradient(*args: Any) -> tuple[Any, ...]:
    from .routing_backward import gradient  # which stands on this file

    return gradient(*args)


register(
    "route(Tensor logits, int k, bool renormalise) -> (Tensor, Tensor)",
    route,
    route_reference,
    lambda logits, k, renormalise: (
        logits.new_empty((logits.shape[0], k), dtype=torch.int32),
        logits.new_empty((logits.shape[0], k)),
    ),
    _gradient,
    keep_outputs=True,
)
register(
    "group(Tensor experts, int num_experts) -> (Tensor, Tensor)",
    group,
    group_reference,
    lambda experts, num_experts: (experts.new_empty(experts.numel()), experts.new_empty(num_experts + 1)),
)
