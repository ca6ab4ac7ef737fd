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

from ..kernels import attention_backward  # noqa: F401 - registers what a gradient needs
from ..kernels.attention import attention, attention_reference, paged_attention, paged_attention_reference
from ..kernels.combine import combine, combine_reference
from ..kernels.cross_entropy import cross_entropy, cross_entropy_reference
from ..kernels.decode_attention import decode_attention, decode_attention_reference
from ..kernels.decode_linear import (
    decode_linear_residual,
    decode_linear_residual_reference,
    norm_head,
    norm_head_reference,
    norm_linear,
    norm_linear_reference,
    norm_linear_swiglu,
    norm_linear_swiglu_reference,
)
from ..kernels.grouped_linear import grouped_linear, grouped_linear_reference, grouped_swiglu, grouped_swiglu_reference
from ..kernels.layer_norm import layer_norm, layer_norm_reference
from ..kernels.linear import (
    linear,
    linear_reference,
    linear_residual,
    linear_residual_reference,
    linear_swiglu,
    linear_swiglu_reference,
)
from ..kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ..kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_at_reference,
    qk_norm_rope_cache,
    qk_norm_rope_cache_reference,
)
from ..kernels.quantised_linear import quantised_linear, quantised_linear_reference
from ..kernels.rms_norm import rms_norm, rms_norm_reference
from ..kernels.rope_decode_attention import rope_decode_attention, rope_decode_attention_reference
from ..kernels.routing import group, group_reference, route, route_reference
from ..kernels.sampling import sample, sample_reference
from ..kernels.swiglu import swiglu, swiglu_reference


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
    rms_norm=rms_norm_reference,
    layer_norm=layer_norm_reference,
    linear=linear_reference,
    linear_residual=linear_residual_reference,
    linear_swiglu=linear_swiglu_reference,
    quantised_linear=quantised_linear_reference,
    swiglu=swiglu_reference,
    qk_norm_rope=qk_norm_rope_at_reference,
    qk_norm_rope_cache=qk_norm_rope_cache_reference,
    attention=attention_reference,
    paged_attention=paged_attention_reference,
    decode_attention=decode_attention_reference,
    norm_linear=norm_linear_reference,
    norm_linear_swiglu=norm_linear_swiglu_reference,
    decode_linear_residual=decode_linear_residual_reference,
    rope_decode_attention=rope_decode_attention_reference,
    norm_head=norm_head_reference,
    route=route_reference,
    group=group_reference,
    grouped_swiglu=grouped_swiglu_reference,
    grouped_linear=grouped_linear_reference,
    combine=combine_reference,
    cross_entropy=cross_entropy_reference,
    linear_cross_entropy=linear_cross_entropy_reference,
    sample=sample_reference,
)

KERNELS = Operations(
    rms_norm=rms_norm,
    layer_norm=layer_norm,
    linear=linear,
    linear_residual=linear_residual,
    linear_swiglu=linear_swiglu,
    quantised_linear=quantised_linear,
    swiglu=swiglu,
    qk_norm_rope=qk_norm_rope,
    qk_norm_rope_cache=qk_norm_rope_cache,
    attention=attention,
    paged_attention=paged_attention,
    decode_attention=decode_attention,
    norm_linear=norm_linear,
    norm_linear_swiglu=norm_linear_swiglu,
    decode_linear_residual=decode_linear_residual,
    rope_decode_attention=rope_decode_attention,
    norm_head=norm_head,
    route=route,
    group=group,
    grouped_swiglu=grouped_swiglu,
    grouped_linear=grouped_linear,
    combine=combine,
    cross_entropy=cross_entropy,
    linear_cross_entropy=linear_cross_entropy,
    sample=sample,
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
