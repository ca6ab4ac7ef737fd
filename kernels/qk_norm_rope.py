"""QK-norm and rotary position embedding over the packed QKV projection.

For every token t and every head h of q and k, with x = qkv[t, h] of D elements in two halves (x1, x2):

    norm(x)   = x / sqrt(mean(x^2) + eps) [* weight]              (arXiv:2010.04245; per head, v is never normalised)
    rotate(x) = (x1 * cos_t - x2 * sin_t,  x2 * cos_t + x1 * sin_t)          (RoPE, arXiv:2104.09864, half-split pairs)

    q, k = rotate(norm(x))   (norm_first: Qwen3)      or      norm(rotate(x))   (MobileLLM-R1)

Shapes: qkv [T, (Hq + 2 Hk) * D], heads in the order q, k, v; cos and sin [T, 1, D] (see `rope_rows`);
weight [Hq + Hk, D] (q's vector repeated for its heads, then k's) or None; q [T, Hq, D], k and v [T, Hk, D].
Rounding: the norm as in rms_norm.py. The rotation happens in cos's dtype: give cos and sin in the model dtype
for Qwen and Llama (each product and the sum round), in float32 for MobileLLM-R1 (one rounding, to the model dtype).
Floor: 2 * numel(q, k) * itemsize bytes, and numel(v) * itemsize twice more when K and V go to the cache.
"""

import torch
from torch import Tensor

from .rms_norm import Scaled, rms_norm_reference


def rope_rows(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Half-width tables [T, D/2] as the full-width rows [T, 1, D] of the rotation: (cos, cos) and (-sin, sin)."""
    return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone. x [T, H, D]; cos and sin as `rope_rows` gives them."""
    half = x.shape[-1] // 2
    if x.dtype is cos.dtype is torch.float32:
        return torch.addcmul(x * cos, x.roll(half, -1), sin)
    wide = x.to(cos.dtype)
    return (wide * cos + wide.roll(half, -1) * sin).to(x.dtype)


def qk_norm_rope_reference(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: bool = False,
    weight: Tensor | Scaled | None = None,
    eps: float = 0.0,
    norm_first: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: packed QKV -> (q, k, v). `cos=None` leaves positions out, `norm=False` the QK-norm."""
    rotated = num_heads + num_kv_heads
    tokens, width = qkv.shape
    heads = qkv.view(tokens, rotated + num_kv_heads, width // (rotated + num_kv_heads))
    qk, v = heads.split_with_sizes((rotated, num_kv_heads), 1)
    if norm and norm_first:
        qk = rms_norm_reference(qk, weight, eps)
    if cos is not None and sin is not None:
        qk = rotate_reference(qk, cos, sin)
    if norm and not norm_first:
        qk = rms_norm_reference(qk, weight, eps)
    q, k = qk.split_with_sizes((num_heads, num_kv_heads), 1)
    return q, k, v


def cache_write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, Hk, D] at `slots` [T] (page * page_size + offset) of the caches, in place.

    The caches are seen token by token, [all slots, Hk, D]; in memory a page of one head is contiguous.
    """
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
