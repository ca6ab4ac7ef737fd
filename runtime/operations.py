"""The operations that the Triton phases are composed of, as one table, twice: kernels and definitions.

Both have the same signatures (a test holds it), so that either can stand in for the other: that is how a single kernel
is verified inside a running model.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels import attention as _attention
from ..kernels import combine as _combine
from ..kernels import decode_attention as _decode
from ..kernels import grouped_linear as _grouped
from ..kernels import layer_norm as _layer_norm
from ..kernels import linear as _linear
from ..kernels import qk_norm_rope as _rope
from ..kernels import rms_norm as _rms_norm
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
    swiglu: Callable[..., Tensor]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor, Tensor]]
    qk_norm_rope_cache: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    route: Callable[..., tuple[Tensor, Tensor]]
    group: Callable[..., tuple[Tensor, Tensor]]
    grouped_swiglu: Callable[..., Tensor]
    grouped_linear: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    sample: Callable[..., Tensor]


DEFINITIONS = Operations(
    rms_norm=_rms_norm.rms_norm_reference,
    layer_norm=_layer_norm.layer_norm_reference,
    linear=_linear.linear_reference,
    linear_residual=_linear.linear_residual_reference,
    linear_swiglu=_linear.linear_swiglu_reference,
    swiglu=_swiglu.swiglu_reference,
    qk_norm_rope=_rope.qk_norm_rope_at_reference,
    qk_norm_rope_cache=_rope.qk_norm_rope_cache_reference,
    attention=_attention.attention_reference,
    paged_attention=_attention.paged_attention_reference,
    decode_attention=_decode.decode_attention_reference,
    route=_routing.route_reference,
    group=_routing.group_reference,
    grouped_swiglu=_grouped.grouped_swiglu_reference,
    grouped_linear=_grouped.grouped_linear_reference,
    combine=_combine.combine_reference,
    sample=_sampling.sample_reference,
)

KERNELS = Operations(
    rms_norm=_rms_norm.rms_norm,
    layer_norm=_layer_norm.layer_norm,
    linear=_linear.linear,
    linear_residual=_linear.linear_residual,
    linear_swiglu=_linear.linear_swiglu,
    swiglu=_swiglu.swiglu,
    qk_norm_rope=_rope.qk_norm_rope,
    qk_norm_rope_cache=_rope.qk_norm_rope_cache,
    attention=_attention.attention,
    paged_attention=_attention.paged_attention,
    decode_attention=_decode.decode_attention,
    route=_routing.route,
    group=_routing.group,
    grouped_swiglu=_grouped.grouped_swiglu,
    grouped_linear=_grouped.grouped_linear,
    combine=_combine.combine,
    sample=_sampling.sample,
)
