"""The interface between the decoder and its operations: the phases, and the set of them that plain PyTorch provides.

The phases are cut where a fused decode kernel begins and ends. x and the residual stream are [T, E] with the tokens of
all rows packed one after another (see batch.py); every phase is a function of its arguments alone, but for the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.cross_entropy import IGNORE_INDEX, cross_entropy_reference
from ..kernels.decode_attention import dense_decode_attention_reference
from ..kernels.layer_norm import layer_norm_reference
from ..kernels.linear import linear_reference, linear_residual_reference
from ..kernels.qk_norm_rope import cache_write_reference, qk_norm_rope_reference
from ..kernels.quantised_linear import quantised_linear_reference
from ..kernels.rms_norm import rms_norm_reference, wide_dtype
from ..kernels.sampling import sample_reference
from ..kernels.swiglu import swiglu_reference
from .batch import Batch
from .operations import DEFINITIONS, Operations
from .plan import Attention, Dense, Experts, LowRank, Mlp, Norm, Plan, QuantisedDense
from .sdpa import sdpa_attention, sdpa_paged_attention


@dataclass(frozen=True)
class Loss:
    """How the loss is taken: see kernels/cross_entropy.py."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: Literal["mean", "sum", "none"] = "mean"


@dataclass(frozen=True)
class KernelSet:
    """One implementation of the decoder's phases."""

    name: str
    norm: Callable[[Tensor, Norm | None], tuple[Tensor, Tensor]]
    norm_linear: Callable[[Tensor, Norm | None, Dense], tuple[Tensor, Tensor]]
    qk_norm_rope_cache: Callable[[Tensor, Attention, Batch], tuple[Tensor, Tensor | None, Tensor | None]]
    attention: Callable[[Tensor, Tensor | None, Tensor | None, Attention, Batch], Tensor]
    linear_residual: Callable[[Tensor, Dense, Tensor], Tensor]
    norm_gate_up_act: Callable[[Tensor, Norm | None, Mlp], tuple[Tensor, Tensor]]
    norm_experts: Callable[[Tensor, Norm | None, Experts, Tensor | None], Tensor]
    norm_head: Callable[[Tensor, Norm | None, Dense], tuple[Tensor | None, Tensor]]
    cross_entropy: Callable[..., Tensor]
    norm_head_loss: Callable[[Tensor, Norm | None, Dense, Tensor, Loss], tuple[Tensor, Tensor]]
    sample: Callable[[Tensor, float, int, float, Tensor | None], Tensor]
    decode: "KernelSet | None" = None  # what decode steps run instead; None: this one
    step: Callable[[Plan, Tensor, Batch], Tensor] | None = None  # tokens [R] -> logits [R, V], instead of the phases


def normalise(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """(residual stream, normalised x)."""
    if norm is None:
        return x, x
    if norm.kind == "rms":
        prepared = norm.scaled if x.dtype is torch.float32 else None
        y = rms_norm_reference(x, prepared or norm.weight, norm.eps)
    else:
        y = layer_norm_reference(x, norm.weight, norm.bias, norm.eps)
    return (y if norm.replaces_stream else x), y


def adapted(
    y: Tensor, x: Tensor, linear: Dense, project: Callable[..., Tensor], project_onto: Callable[..., Tensor]
) -> Tensor:
    """y [T, N] with what the adapter of a LowRank weight makes of x [T, K]; with a plain weight, y as it is."""
    if not isinstance(linear, LowRank):
        return y
    x = F.dropout(x, linear.dropout) if linear.dropout else x
    return project_onto(project(x, linear.a, None), linear.b, None, y)


def _project(x: Tensor, linear: Dense) -> Tensor:
    if isinstance(linear, QuantisedDense):
        return quantised_linear_reference(x, linear.weight, linear.scale, linear.bias)
    y = linear_reference(x, linear.weight, linear.bias)
    return adapted(y, x, linear, linear_reference, linear_residual_reference)


def _norm_linear(x: Tensor, norm: Norm | None, linear: Dense) -> tuple[Tensor, Tensor]:
    """[T, E] -> (stream [T, E], projection [T, N])."""
    stream, y = normalise(x, norm)
    return stream, _project(y, linear)


def _qk_norm_rope_cache(qkv: Tensor, attention: Attention, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Packed QKV [T, (Hq + 2 Hk) D] -> q [T, Hq, D], k and v [T, Hk, D]; k and v also go to the batch's cache."""
    cos, sin, scale = (None, None, None)
    if attention.rotary is not None:
        cos, sin, scale = batch.rope(attention.rotary, attention.rope_dtype)
    prepared = attention.qk_norm_scaled if qkv.dtype is torch.float32 else None
    q, k, v = qk_norm_rope_reference(
        qkv,
        attention.num_heads,
        attention.num_kv_heads,
        cos,
        sin,
        attention.qk_norm,
        prepared or attention.qk_norm_weight,
        attention.eps,
        attention.qk_norm_first,
        scale,
    )
    if batch.cache is not None and batch.slots is not None:
        keys, values = batch.cache.slot_keys[attention.slot], batch.cache.slot_values[attention.slot]
        cache_write_reference(k, v, keys, values, batch.slots)
    return q, k, v


def _attention(q: Tensor, k: Tensor | None, v: Tensor | None, attention: Attention, batch: Batch) -> Tensor:
    """[T, Hq, D] -> [T, Hq * D]."""
    cache, slot, scale, window = batch.cache, attention.slot, attention.scale, attention.window
    if cache is None or batch.is_fresh:
        assert k is not None  # this set hands both on in any case
        assert v is not None
        out = sdpa_attention(q, k, v, batch.starts, scale, window)
    elif batch.dense is not None:
        keys, values = batch.dense
        bias = batch.decode_bias(window, wide_dtype(q.dtype))
        out = dense_decode_attention_reference(q, keys[slot], values[slot], bias, scale)
    else:
        keys, values, table = cache.keys[slot], cache.values[slot], batch.page_table
        out = sdpa_paged_attention(q, keys, values, table, batch.starts, batch.lengths, scale, window)
    return out.flatten(1)


def _linear_residual(x: Tensor, linear: Dense, stream: Tensor) -> Tensor:
    """[T, K] and the stream [T, E] -> the stream with the projection added."""
    if isinstance(linear, QuantisedDense):
        return stream + _project(x, linear)
    stream = linear_residual_reference(x, linear.weight, linear.bias, stream)
    return adapted(stream, x, linear, linear_reference, linear_residual_reference)


PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _norm_gate_up_act(x: Tensor, norm: Norm | None, mlp: Mlp) -> tuple[Tensor, Tensor]:
    """[T, E] -> (stream [T, E], activated hidden [T, F])."""
    stream, hidden = _norm_linear(x, norm, mlp.up)
    if mlp.kind == "gated":
        return stream, swiglu_reference(hidden)
    return stream, PLAIN_ACTIVATIONS[mlp.activation](hidden)


def mixture(operations: Operations, x: Tensor, logits: Tensor, experts: Experts, residual: Tensor) -> Tensor:
    """The experts that the router's logits [T, experts] choose for x [T, E], weighted and added to the residual."""
    chosen, weights = operations.route(logits, experts.per_token, experts.renormalise)
    order, starts = operations.group(chosen, experts.router.weight.shape[0])
    hidden = operations.grouped_swiglu(x, experts.up, order, starts, experts.per_token)
    outputs = operations.grouped_linear(hidden, experts.down, order, starts, 1)
    return operations.combine(outputs, weights, residual)


def _norm_experts(x: Tensor, norm: Norm | None, experts: Experts, residual: Tensor | None) -> Tensor:
    """[T, E] -> what the experts give, added to `residual`, or where that is None to the stream: [T, E]."""
    stream, y = normalise(x, norm)
    logits = linear_reference(y, experts.router.weight, experts.router.bias)
    return mixture(DEFINITIONS, y, logits, experts, stream if residual is None else residual)


def _norm_head(x: Tensor, norm: Norm | None, head: Dense) -> tuple[Tensor, Tensor]:
    """[T, E] -> (normalised [T, E], logits [T, V])."""
    _, hidden = normalise(x, norm)
    return hidden, _project(hidden, head)


def head_loss(
    operations: Operations, hidden: Tensor, head: Dense, labels: Tensor, loss: Loss, invariant: bool = False
) -> Tensor:
    """The loss of the head's projection of normalised x [T, E] against labels [T]: a scalar, or [T]. `invariant` as in
    kernels/linear_cross_entropy.py.
    """
    options = (IGNORE_INDEX, loss.label_smoothing, loss.z_loss, loss.reduction)
    if isinstance(head, QuantisedDense):
        logits = operations.quantised_linear(hidden, head.weight, head.scale, head.bias)
        return operations.cross_entropy(logits, labels, *options)
    return operations.linear_cross_entropy(hidden, head.weight, labels, *options, invariant)


def _norm_head_loss(x: Tensor, norm: Norm | None, head: Dense, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """[T, E] and labels [T] -> (normalised [T, E], loss)."""
    _, hidden = normalise(x, norm)
    return hidden, head_loss(DEFINITIONS, hidden, head, labels, loss)


REFERENCE = KernelSet(
    name="torch",
    norm=normalise,
    norm_linear=_norm_linear,
    qk_norm_rope_cache=_qk_norm_rope_cache,
    attention=_attention,
    linear_residual=_linear_residual,
    norm_gate_up_act=_norm_gate_up_act,
    norm_experts=_norm_experts,
    norm_head=_norm_head,
    cross_entropy=cross_entropy_reference,
    norm_head_loss=_norm_head_loss,
    sample=sample_reference,
)
