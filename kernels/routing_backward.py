"""The gradient of routing: of the router's logits, given that of the chosen experts' weights.

The choice is a constant (Shazeer et al. 2017, arXiv:1701.06538). With p = softmax(logits), C the k experts chosen, and
g_e the gradient of e's weight where e is in C and 0 elsewhere: a weight is p_e, or renormalised p_e / sum of p over C,
which is the softmax over C alone. By the softmax's derivative, p being the one or the other:

    dlogits_e = p_e * (g_e - sum over c in C of p_c g_c) = p_e * (sum over c in C of p_c (g_e - g_c) + q g_e)

where q is the sum of p over experts that are not in C. The second form is computed: where one expert has nearly all of
p, the first would be a difference of nearly equal numbers. Renormalised, q is 0, and so is p, and dlogits, outside C.

Shapes: dweights [T, k], logits and dlogits [T, E], experts [T, k] int32 from `route`, all of a row different.
Rounding: all in float32 (float64 stays), the softmax computed anew and not rounded as the weights were; dlogits rounds
once. A row whose weights are NaN, as one of its logits is or its largest is infinite, is NaN; a NaN among its dweights
makes NaN of what depends on it, of that row alone.
Floor: 2 * T * E * itemsize + T * k * (4 + itemsize) bytes; about (10 + 6 k) * T * E operations.

Rows of a number of experts have one launch, whatever the batch, so that a row's bits depend on its own values only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import rows_of, wide
from .routing import MOST_EXPERTS


def route_backward_reference(dweights: Tensor, logits: Tensor, experts: Tensor, renormalise: bool) -> Tensor:
    """The definition: dlogits [T, E] in logits' dtype."""
    chosen, dweights = experts.long(), wide(dweights)
    p = wide(logits).softmax(-1)
    mine = torch.zeros_like(p).scatter(-1, chosen, 1.0)
    if renormalise:
        p = p * mine
        p = p / p.sum(-1, keepdim=True)
    g = torch.zeros_like(p).scatter(-1, chosen, dweights)
    differences = (p.gather(-1, chosen)[:, None] * (g[:, :, None] - dweights[:, None])).sum(-1)
    return (p * (differences + (p * (1 - mine)).sum(-1, keepdim=True) * g)).to(logits.dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_backward_kernel(
    dlogits_ptr,  # [T, E], contiguous
    dweights_ptr,  # [T, K], rows `stride_w` apart
    logits_ptr,  # [T, E], rows `stride_x` apart
    experts_ptr,  # [T, K], contiguous
    num_tokens,
    stride_w,
    stride_x,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_t = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_t = o_t < num_tokens
    mask = m_t & (o_e < E)
    x = tl.load(logits_ptr + o_t * stride_x + o_e, mask=mask, other=float("-inf")).to(tl.float32)
    g = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    chosen = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for j in range(K):
        mine = o_e == tl.load(experts_ptr + o_t * K + j, mask=m_t, other=-1)
        g = tl.where(mine, tl.load(dweights_ptr + o_t * stride_w + j, mask=m_t, other=0.0).to(tl.float32), g)
        chosen = tl.where(mine, 1.0, chosen)

    top = tl.max(x, axis=1, keep_dims=True)
    mass = tl.exp(x - top)
    if RENORMALISE:
        mass *= chosen
    # Beyond the last expert there is no mass, but NaN where the whole row is -inf: then its experts' are NaN too.
    total = tl.sum(mass, axis=1, keep_dims=True)
    rest = tl.sum(mass * (1.0 - chosen), axis=1, keep_dims=True)
    sums = rest * g
    for j in range(K):
        expert = tl.load(experts_ptr + o_t * K + j, mask=m_t, other=0)
        own = tl.load(logits_ptr + o_t * stride_x + expert, mask=m_t, other=0.0).to(tl.float32)
        dweight = tl.load(dweights_ptr + o_t * stride_w + j, mask=m_t, other=0.0).to(tl.float32)
        sums += tl.exp(own - top) * (g - dweight)
    total = tl.broadcast_to(total, [ROWS, BLOCK_E])
    dlogits = tl.div_rn(mass, total) * tl.div_rn(sums, total)
    tl.store(dlogits_ptr + o_t * E + o_e, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def route_backward(dweights: Tensor, logits: Tensor, experts: Tensor, renormalise: bool) -> Tensor:
    """The kernel: dlogits [T, E], contiguous, of dweights [T, k], logits [T, E] and experts [T, k] int32.

    dweights and logits are float32, bfloat16 or float16, one for both; rows may be strided. The values of experts
    must be those that `route` gives: they are not checked. Raises RuntimeError where no kernel can run, TypeError and
    ValueError for what does not fit.
    """
    require(logits, dweights, experts)
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MOST_EXPERTS:
        raise ValueError(f"logits must be [tokens, experts] with 1 to {MOST_EXPERTS} experts, got {list(logits.shape)}")
    tokens, count = logits.shape
    if experts.dim() != 2 or experts.shape[0] != tokens or not 0 < experts.shape[1] <= count:
        expected = f"[{tokens}, k], k from 1 to {count}"
        raise ValueError(f"experts must be {expected}, for logits {[tokens, count]}, got {list(experts.shape)}")
    if dweights.shape != experts.shape:
        raise ValueError(f"dweights must be {list(experts.shape)} as experts are, got {list(dweights.shape)}")
    if dweights.dtype != logits.dtype or experts.dtype != torch.int32:
        given = f"{dweights.dtype} and {experts.dtype}"
        raise TypeError(f"dweights must be {logits.dtype} as logits are and experts torch.int32, got {given}")
    dlogits = logits.new_empty((tokens, count))
    if not tokens:
        return dlogits
    logits, dweights = rows_of(logits), rows_of(dweights)
    options = tuning.config("routing_backward", logits.device, experts=count)
    launch(
        _route_backward_kernel,
        (triton.cdiv(tokens, options["ROWS"]),),
        dlogits,
        dweights,
        logits,
        experts.contiguous(),
        tokens,
        dweights.stride(0),
        logits.stride(0),
        E=count,
        K=experts.shape[1],
        RENORMALISE=renormalise,
        BLOCK_E=triton.next_power_of_2(count),
        **options,
    )
    return dlogits


def gradient(inputs: Sequence[Any], needed: Sequence[bool], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of each of route's inputs, which its outputs follow: of the logits, where anything used the weights."""
    logits, _, renormalise, experts, _ = inputs
    dweights = gradients[1]
    if dweights is None:
        return None, None, None
    return torch.ops.tritium.route_backward(dweights, logits, experts, renormalise), None, None


register(
    "route_backward(Tensor dweights, Tensor logits, Tensor experts, bool renormalise) -> Tensor",
    route_backward,
    route_backward_reference,
    lambda dweights, logits, experts, renormalise: logits.new_empty(logits.shape),
)
