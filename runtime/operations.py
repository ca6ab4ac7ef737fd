"""The operations that the Triton phases are composed of, as one table, three times: kernels, definitions, and kernels
with gradients.

All have the same signatures (a test holds it), so that one can stand in for the other: that is how a single kernel is
verified inside a running model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import attention as _attention
from ..kernels import attention_backward  # noqa: F401 - registers what a gradient needs
from ..kernels import combine as _combine
from ..kernels import cross_entropy as _cross_entropy
from ..kernels import decode_attention as _decode
from ..kernels import decode_linear as _decode_linear
from ..kernels import grouped_linear as _grouped
from ..kernels import layer_norm as _layer_norm
from ..kernels import linear as _linear
from ..kernels import linear_cross_entropy as _loss
from ..kernels import qk_norm_rope as _rope
from ..kernels import quantised_linear as _quantised
from ..kernels import rms_norm as _rms_norm
from ..kernels import rope_decode_attention as _rope_decode
from ..kernels import routing as _routing
from ..kernels import sampling as _sampling
from ..kernels import swiglu as _swiglu


@dataclass(frozen=True)
class Operations:
    """One implementation of every operation; what each takes and gives is said in its file under kernels/."""

    rms_norm: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    linear_residual: Callable[..., Tensor]
    linear_swiglu: Callable[..., Tensor]
    quantised_linear: Callable[..., Tensor]
    swiglu: Callable[..., Tensor]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    qk_norm_rope_cache: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    norm_linear: Callable[..., Tensor]
    norm_linear_swiglu: Callable[..., Tensor]
    decode_linear_residual: Callable[..., Tensor]
    rope_decode_attention: Callable[..., Tensor]
    norm_head: Callable[..., tuple[Tensor, Tensor]]
    route: Callable[..., tuple[Tensor, Tensor]]
    group: Callable[..., tuple[Tensor, Tensor]]
    grouped_swiglu: Callable[..., Tensor]
    grouped_linear: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    cross_entropy: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    sample: Callable[..., Tensor]


DEFINITIONS = Operations(
    rms_norm=_rms_norm.rms_norm_reference,
    layer_norm=_layer_norm.layer_norm_reference,
    linear=_linear.linear_reference,
    linear_residual=_linear.linear_residual_reference,
    linear_swiglu=_linear.linear_swiglu_reference,
    quantised_linear=_quantised.quantised_linear_reference,
    swiglu=_swiglu.swiglu_reference,
    qk_norm_rope=_rope.qk_norm_rope_at_reference,
    qk_norm_rope_cache=_rope.qk_norm_rope_cache_reference,
    attention=_attention.attention_reference,
    paged_attention=_attention.paged_attention_reference,
    decode_attention=_decode.decode_attention_reference,
    norm_linear=_decode_linear.norm_linear_reference,
    norm_linear_swiglu=_decode_linear.norm_linear_swiglu_reference,
    decode_linear_residual=_decode_linear.decode_linear_residual_reference,
    rope_decode_attention=_rope_decode.rope_decode_attention_reference,
    norm_head=_decode_linear.norm_head_reference,
    route=_routing.route_reference,
    group=_routing.group_reference,
    grouped_swiglu=_grouped.grouped_swiglu_reference,
    grouped_linear=_grouped.grouped_linear_reference,
    combine=_combine.combine_reference,
    cross_entropy=_cross_entropy.cross_entropy_reference,
    linear_cross_entropy=_loss.linear_cross_entropy_reference,
    sample=_sampling.sample_reference,
)

KERNELS = Operations(
    rms_norm=_rms_norm.rms_norm,
    layer_norm=_layer_norm.layer_norm,
    linear=_linear.linear,
    linear_residual=_linear.linear_residual,
    linear_swiglu=_linear.linear_swiglu,
    quantised_linear=_quantised.quantised_linear,
    swiglu=_swiglu.swiglu,
    qk_norm_rope=_rope.qk_norm_rope,
    qk_norm_rope_cache=_rope.qk_norm_rope_cache,
    attention=_attention.attention,
    paged_attention=_attention.paged_attention,
    decode_attention=_decode.decode_attention,
    norm_linear=_decode_linear.norm_linear,
    norm_linear_swiglu=_decode_linear.norm_linear_swiglu,
    decode_linear_residual=_decode_linear.decode_linear_residual,
    rope_decode_attention=_rope_decode.rope_decode_attention,
    norm_head=_decode_linear.norm_head,
    route=_routing.route,
    group=_routing.group,
    grouped_swiglu=_grouped.grouped_swiglu,
    grouped_linear=_grouped.grouped_linear,
    combine=_combine.combine,
    cross_entropy=_cross_entropy.cross_entropy,
    linear_cross_entropy=_loss.linear_cross_entropy,
    sample=_sampling.sample,
)


def _attention_keeping_lse(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Attention whose backward finds the softmax's sums instead of computing them anew."""
    out: Tensor = torch.ops.tritium.attention_with_lse(q, k, v, starts, scale, window)[0]
    return out


def _qk_norm_rope(qkv: Tensor, num_heads: int, num_kv_heads: int, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operation gives q and k; v is a view of qkv, which it may not return."""
    q, k = torch.ops.tritium.qk_norm_rope(qkv, num_heads, num_kv_heads, *how)
    return q, k, qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))[:, num_heads + num_kv_heads :]


_REGISTERED = torch.ops.tritium
DIFFERENTIABLE = replace(
    KERNELS,
    rms_norm=_REGISTERED.rms_norm,
    layer_norm=_REGISTERED.layer_norm,
    linear=_REGISTERED.linear,
    linear_residual=_REGISTERED.linear_residual,
    linear_swiglu=_REGISTERED.linear_swiglu,
    swiglu=_REGISTERED.swiglu,
    qk_norm_rope=_qk_norm_rope,
    attention=_attention_keeping_lse,
    route=_REGISTERED.route,
    group=_REGISTERED.group,
    grouped_swiglu=_REGISTERED.grouped_swiglu,
    grouped_linear=_REGISTERED.grouped_linear,
    combine=_REGISTERED.combine,
    cross_entropy=_REGISTERED.cross_entropy,
    linear_cross_entropy=_REGISTERED.linear_cross_entropy,
)
"""The kernels as torch.library has them, with their gradients; on a CPU each is its definition. Those of a cache, and
sampling, have no gradients."""
