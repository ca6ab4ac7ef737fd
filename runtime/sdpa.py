"""Attention by torch's fused kernels, as the PyTorch path runs it: see kernels/attention.py for what it computes."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import packed, paged, visible


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, scale: float, window: int | None = None
) -> Tensor:
    """`attention_reference` by torch's fused kernels: no scores in memory, the rounding of whichever torch picks."""
    return packed(_fused, q, k, v, starts, scale, window)


def sdpa_paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """`paged_attention_reference` by torch's fused kernels."""
    return paged(_fused, q, k_cache, v_cache, page_table, starts, lengths, scale, window)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    num_queries, num_keys = q.shape[1], k.shape[1]
    plain = window is None and num_queries in (1, num_keys)
    mask = None if plain else visible(num_queries, num_keys, window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain and num_queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
