"""Causal grouped-query attention over ragged batches and over a paged cache.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j        over the keys j that query i may see
                                                          (softmax as in FlashAttention, arXiv:2205.14135)

Query i of a sequence with L keys and S queries stands at position L - S + i; it sees the keys at positions up to its
own, and with a window W only the last W of those. Query head h reads key/value head h // (Hq / Hk).

Shapes: q [T, Hq, D] with all sequences' queries packed one after another; k and v [T, Hk, D] packed likewise, or in
the cache [Hk, pages, page_size, D]; out [T, Hq, D].
Rounding: scores, mask and softmax in float32 (float64 stays); probabilities round to the input dtype before the
product with v, which accumulates in float32; one rounding at the end.
Floor: decode reads 2 * L * Hk * D * itemsize bytes a sequence; prefill does 4 * Hq * D operations for each visible
(query, key) pair.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .rms_norm import wide


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[S, L] bool: whether query i of a sequence's last S positions sees key j."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float, window: int | None = None
) -> Tensor:
    """Prefill and training: every sequence attends to its own new keys. `starts` [rows + 1] bounds the sequences."""
    rows = list(pairwise(starts))
    lengths = {end - start for start, end in rows}
    if len(lengths) == 1 and q.numel():  # one call for all rows
        shape = (len(rows), lengths.pop(), -1, q.shape[-1])
        return _attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), scale, window).reshape(q.shape)
    parts = [_attend(q[None, a:b], k[None, a:b], v[None, a:b], scale, window).squeeze(0) for a, b in rows]
    return torch.cat(parts) if parts else torch.empty_like(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [B, S, Hq, D], k and v [B, L, Hk, D] -> [B, S, Hq, D], causal with the last query at the last key."""
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


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Queries over a paged cache: row r has queries starts[r]:starts[r + 1] and `lengths[r]` keys, its own included.

    `page_table` [rows, pages] int64 names each row's pages in order.
    """
    parts = []
    for row, length in enumerate(lengths):
        pages = page_table[row, : -(-length // k_cache.shape[2])]
        # [Hk, pages, page_size, D] -> [1, L, Hk, D]
        k, v = (cache[:, pages].flatten(1, 2)[:, :length].transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
        parts.append(_attend(q[starts[row] : starts[row + 1]].unsqueeze(0), k, v, scale, window).squeeze(0))
    return torch.cat(parts) if parts else torch.empty_like(q)


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One query a row over dense keys: q [R, Hq, D], k and v [Hk * R, L, D] -> [R, Hq, D].

    `bias` [R or 1, 1, L or 1] is added to the scores and hides (with -inf) what a row must not see: keys past its
    length or before its window. Keys and values lie head by head, so that views of the cache need no copy.
    """
    rows, num_heads, head_dim = q.shape
    if not rows:
        return torch.empty_like(q)
    num_kv_heads = k.shape[0] // rows
    # A group of query heads becomes the rows of one small matrix: no key is repeated.
    groups = num_heads // num_kv_heads
    if rows > 1:
        q = q.view(rows, num_kv_heads, groups, head_dim).transpose(0, 1)
        if bias.shape[0] > 1:
            bias = bias.repeat(num_kv_heads, 1, 1)
    q = q.reshape(num_kv_heads * rows, groups, head_dim)
    if q.dtype is torch.float32:
        out = torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1), v)
    else:
        scores = torch.baddbmm(bias, wide(q), wide(k).transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(v.dtype), v)
    if rows > 1:
        out = out.view(num_kv_heads, rows, groups, head_dim).transpose(0, 1)
    return out.reshape(rows, num_heads, head_dim)
