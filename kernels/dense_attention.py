"""Causal grouped-query attention over dense keys [B, Hk, L, D], as `transformers` and most others hold them.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j        over the keys j that query i may see, as attention.py has it

A row's keys are those from `first` on, `lengths` of them; what lies before them (left padding) and behind them (room in
a static cache) is nobody's. Query i of S stands at the row's own position lengths - S + i, sees the keys up to there,
and with a window W only the last W of those. A query at a position below 0 (padding itself) gives 0.

Shapes: q and out [B, S, Hq, D]; k and v [B, Hk, L, D]; first and lengths [B].
Rounding: as in, and in the order of, decode_attention.py where S is 1, with pages of 256 keys from the
row's first, and else attention.py. So a row has the bits that it has alone and without padding, wherever it lies.
Floor: that of the kernel used: decode reads 2 * lengths * Hk * D * itemsize bytes a row; prefill does 4 * Hq * D
operations for each visible (query, key) pair.

There is no kernel of its own: dense keys are the cache of either kernel, with pages that may begin at any key.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import WIDEST, _attend, _run
from .decode_attention import WIDEST_GROUP, split
from .launch import register, require, triton

PAGE = 256  # the attention split of one query, as over a paged cache


def dense_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | Sequence[int],
    lengths: Tensor | Sequence[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The definition. Keys outside a row's own are not read; lengths may be 0 or below: then all queries give 0.

    Raises ValueError for a row that has more keys than there is room for.
    """
    num_queries = q.shape[1]
    firsts, counts = (x.tolist() if isinstance(x, Tensor) else x for x in (first, lengths))
    parts = []
    for row, (begin, count) in enumerate(zip(firsts, counts, strict=True)):
        if begin + count > k.shape[2]:
            raise ValueError(f"row {row} has {count} keys from {begin} on, and there is room for {k.shape[2]}")
        seeing = max(0, min(num_queries, count))  # the queries at positions from 0 on: the last ones
        keys, values = (x[row : row + 1, :, begin : begin + max(0, count)].transpose(1, 2) for x in (k, v))
        out = _attend(q[row : row + 1, num_queries - seeing :], keys, values, scale, window)
        parts.append(torch.cat((torch.zeros_like(q[row : row + 1, : num_queries - seeing]), out), 1))
    return torch.cat(parts) if parts else torch.empty_like(q)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, lengths: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """The kernels: [B, S, Hq, D], contiguous. float32, bfloat16 or float16, one dtype; `first` and `lengths` int32.

    Nothing is copied where a row's keys follow one another D apart (S = 1), or k and v have whole keys between rows.
    That first + lengths is at most L is the caller's to see to. Raises RuntimeError where no kernel can run, TypeError
    and ValueError for what does not fit.
    """
    _check(q, k, v, first, lengths, window)
    rows, queries, num_heads, head_dim = q.shape
    num_kv_heads, room = k.shape[1:3]
    if not q.numel() or not room:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if first.stride() != lengths.stride():
        first, lengths = first.contiguous(), lengths.contiguous()
    decodes = queries == 1 and num_heads <= WIDEST_GROUP * num_kv_heads
    if not _fits(k, v, decodes):
        k, v = k.contiguous(), v.contiguous()
    slot = k.stride(2) if room > 1 else head_dim
    row_slots = k.stride(0) // slot if rows > 1 else 0
    slots = (rows - 1) * row_slots + room  # of one head: its keys in all rows, and what lies between them
    if slots >= 2**31:
        raise ValueError(f"{rows} rows of keys that lie over {slots} places: at most 2^31 - 1, split the batch")
    if decodes:
        place, pages = (k.stride(1), slot, row_slots), triton.cdiv(room, PAGE)
        return split(q[:, 0], k, v, first, lengths, place, pages, PAGE, scale, window, dense=True).unsqueeze(1)
    k, v = (x.as_strided((num_kv_heads, slots, head_dim), (x.stride(1), slot, 1)) for x in (k, v))
    starts = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device=q.device)
    out, _ = _run(q.flatten(0, 1), k, v, starts, first, lengths, scale, window, row_slots=row_slots)
    return out.unflatten(0, (rows, queries))


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor, lengths: Tensor, window: int | None) -> None:
    require(q, k, v, first, lengths)
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"q must be [B, S, heads, D] and k and v [B, kv heads, L, D], "
            f"got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    num_heads, num_kv_heads = q.shape[2], k.shape[1]
    if not 1 <= q.shape[3] <= WIDEST or not num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"head_dim must be in 1..{WIDEST} and the query heads a multiple of the key/value heads, "
            f"got head_dim {q.shape[3]}, heads {num_heads} and {num_kv_heads}"
        )
    for name, integers in (("first", first), ("lengths", lengths)):
        if integers.shape != q.shape[:1] or integers.dtype != torch.int32:
            raise ValueError(f"{name} must be [{len(q)}] int32, got {list(integers.shape)} {integers.dtype}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: it must be at least 1, or None")


def _fits(k: Tensor, v: Tensor, decodes: bool) -> bool:
    """Whether the kernels can read k and v as they lie."""
    if k.stride() != v.stride() or k.stride(3) != 1:
        return False
    if k.shape[2] == 1:
        return k.shape[0] == 1 or k.stride(0) % k.shape[3] == 0
    if decodes and k.stride(2) != k.shape[3]:
        return False
    return k.stride(2) > 0 and (k.shape[0] == 1 or k.stride(0) % k.stride(2) == 0)


register(
    "dense_attention(Tensor q, Tensor k, Tensor v, Tensor first, Tensor lengths, float scale, "
    "int? window=None) -> Tensor",
    dense_attention,
    dense_attention_reference,
    lambda q, *rest: q.new_empty(q.shape),
)
