"""Causal grouped-query attention over ragged batches and over a paged cache.

    out_i = sum_j softmax_j(q_i . k_j * scale) v_j        over the keys j that query i may see
                                                          (softmax as in FlashAttention, arXiv:2205.14135)

Query i of a sequence with L keys and S queries stands at position L - S + i; it sees the keys at positions up to its
own, and with a window W only the last W of those. Query head h reads key/value head h // (Hq / Hk).

Shapes: q [T, Hq, D] with all sequences' queries packed one after another; k and v [T, Hk, D] packed likewise, or in
the cache [Hk, pages, page_size, D]; out [T, Hq, D].
Rounding: scores, mask and softmax in float32 (float64 stays); exp(score - maximum) rounds to the input dtype before the
product with v, which accumulates in float32 and is divided by the sum of the unrounded ones; one rounding at the end.
The definition takes the maximum of all scores, the kernel that of the tiles so far.
Order: a query's keys are taken in tiles of BLOCK_N that begin at multiples of BLOCK_N from the sequence's first key.
A tile of which a query sees nothing leaves the query's bits as they were. So they depend neither on the batch, nor on
where the keys lie, nor on the chunks in which a sequence is prefilled. A NaN reaches the queries that see it, and the
others of its own sequence in the same tile, whose probability of 0 multiplies it; never another sequence's.
Floor: decode reads 2 * L * Hk * D * itemsize bytes a sequence; prefill does 4 * Hq * D operations for each visible
(query, key) pair.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import wide

WIDEST = 256  # the largest head dimension: a program holds a tile of whole heads
LOG2_E = math.log2(math.e)


def _ints(values: Sequence[int] | Tensor) -> Sequence[int]:
    return values.tolist() if isinstance(values, Tensor) else values


def visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[S, L] bool: whether query i of a sequence's last S positions sees key j."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key = torch.arange(num_keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Prefill and training: every sequence attends to its own new keys. `starts` [rows + 1] bounds the sequences."""
    return packed(_attend, q, k, v, starts, scale, window)


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Queries over a paged cache: row r has queries starts[r]:starts[r + 1] and `lengths[r]` keys, its own included.

    `page_table` [rows, pages] of integers names each row's pages in order.
    """
    return paged(_attend, q, k_cache, v_cache, page_table, starts, lengths, scale, window)


# q [B, S, Hq, D], k and v [B, L, Hk, D], scale, window -> [B, S, Hq, D], causal with the last query at the last key.
Attend = Callable[[Tensor, Tensor, Tensor, float, int | None], Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    scores = torch.einsum("bshgd,blhd->bhgsl", wide(q).unflatten(2, (k.shape[2], -1)), wide(k)) * scale
    if not scores.numel():
        return torch.zeros_like(q) if q.numel() else q.clone()
    scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], window, q.device), float("-inf"))
    p = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
    out = torch.einsum("bhgsl,blhd->bhgsd", wide(p.to(v.dtype)), wide(v)) / p.sum(-1, keepdim=True)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


def packed(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, scale: float, window: int | None
) -> Tensor:
    rows = list(pairwise(_ints(starts)))
    lengths = {end - start for start, end in rows}
    if len(lengths) == 1 and q.numel():  # one call for all rows
        shape = (len(rows), lengths.pop(), -1, q.shape[-1])
        return attend(q.reshape(shape), k.reshape(shape), v.reshape(shape), scale, window).reshape(q.shape)
    parts = [attend(q[None, a:b], k[None, a:b], v[None, a:b], scale, window).squeeze(0) for a, b in rows]
    return torch.cat(parts) if parts else torch.empty_like(q)


def paged(
    attend: Attend,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Sequence[int] | Tensor,
    lengths: Sequence[int] | Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    parts = []
    starts = _ints(starts)
    for row, length in enumerate(_ints(lengths)):
        pages = page_table[row, : -(-length // k_cache.shape[2])].long()
        # [Hk, pages, page_size, D] -> [1, L, Hk, D]
        k, v = (cache[:, pages].flatten(1, 2)[:, :length].transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
        parts.append(attend(q[starts[row] : starts[row + 1]].unsqueeze(0), k, v, scale, window).squeeze(0))
    return torch.cat(parts) if parts else torch.empty_like(q)


@triton.jit
def _attend_tiles(
    acc,  # [BLOCK_M, BLOCK_D] float32, sum of probabilities * v so far, for the maximum `best`
    total,  # [BLOCK_M] float32, sum of probabilities so far
    best,  # [BLOCK_M] float32, largest score * scale so far
    q,  # [BLOCK_M, BLOCK_D]
    o_m,  # [BLOCK_M], positions of the queries in their sequence
    k_ptr,  # the head's keys
    v_ptr,  # the head's values
    k_desc,
    v_desc,
    table_ptr,  # the sequence's pages
    kv_head,
    start,  # slot of the sequence's first key, where not PAGED
    length,  # keys of the sequence
    first,  # key of the first tile
    last,  # end of the last one
    stride_kt,
    stride_vt,
    scale,
    window,
    MASKED: tl.constexpr,  # some query does not see some key
    TAIL: tl.constexpr,  # some key may lie past the length
    D: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Takes the keys first:last. Both forms do the same arithmetic: where the mask hides nothing, to the bit."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    for n in tl.range(first, last, BLOCK_N):
        slot = start + n
        if PAGED:
            slot = tl.load(table_ptr + n // PAGE) * PAGE + n % PAGE
        # What lies past the length belongs to others, or was never written. Its scores are masked; its values must be
        # zeroed, as a probability of 0 times NaN is NaN, which bulk copies cannot do.
        if TMA:
            k = k_desc.load([kv_head, slot, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k_ptrs = k_ptr + slot.to(tl.int64) * stride_kt + o_n[:, None] * stride_kt + o_d
            if TAIL:
                k = tl.load(k_ptrs, mask=(n + o_n < length)[:, None] & (o_d < D), other=0.0)
            elif D == BLOCK_D:
                k = tl.load(k_ptrs)
            else:
                k = tl.load(k_ptrs, mask=o_d < D, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            seen = (n + o_n)[None, :] <= o_m[:, None]
            if WINDOWED:
                seen &= (n + o_n)[None, :] > o_m[:, None] - window
            scores = tl.where(seen, scores, -float("inf"))
        largest = tl.maximum(best, tl.max(scores, 1) * scale)
        # While a query has seen no key its maximum is -inf, and -inf - -inf is NaN.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        # Fused by name: left to the compiler, masked and unmasked tiles could round differently.
        p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        decay = tl.exp2(best - shift)
        total = tl.fma(total, decay, tl.sum(p, 1))
        best = largest
        if TMA and not TAIL:
            v = v_desc.load([kv_head, slot, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            v_ptrs = v_ptr + slot.to(tl.int64) * stride_vt + o_n[:, None] * stride_vt + o_d
            if TAIL:
                v = tl.load(v_ptrs, mask=(n + o_n < length)[:, None] & (o_d < D), other=0.0)
            elif D == BLOCK_D:
                v = tl.load(v_ptrs)
            else:
                v = tl.load(v_ptrs, mask=o_d < D, other=0.0)
        if v.dtype == tl.float32:
            # A float32 dot adds product after product to what it is given: one chain over all keys would err more than
            # sums by tiles do. Fused by name: Triton would turn dot + acc back into the chain.
            acc = tl.fma(acc, tl.broadcast_to(decay[:, None], acc.shape), tl.dot(p, v, input_precision="ieee"))
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return acc, total, best


@triton.jit
def find_tile(tile, starts_ptr, num_rows, BLOCK: tl.constexpr):
    """(row, its first token, its tokens, where in them the tile begins: beyond them where there is no such tile).

    Row r's tiles begin at starts[r] // BLOCK + r, which leaves room for each row's part-filled last one: nobody needs
    to know the lengths before the launch.
    """
    row = 0
    after = num_rows
    while row + 1 < after:
        middle = (row + after) // 2
        if tl.load(starts_ptr + middle) // BLOCK + middle <= tile:
            row = middle
        else:
            after = middle
    start = tl.load(starts_ptr + row)
    return row, start, tl.load(starts_ptr + row + 1) - start, (tile - start // BLOCK - row) * BLOCK


@triton.jit(do_not_specialize=["stride_lse", "num_rows", "groups", "window"])
def _attention_kernel(
    q_ptr,  # [T, Hq, D], tokens `stride_qt` units apart, heads `stride_qh`
    k_ptr,  # [Hk, slots, D] by `stride_kh` and `stride_kt`; a slot is a packed token or a place in the cache
    v_ptr,  # [Hk, slots, D]
    k_desc,  # k as a descriptor of blocks [1, BLOCK_N, BLOCK_D], where TMA
    v_desc,
    out_ptr,  # [T, Hq, D], contiguous
    lse_ptr,  # float32 [Hq, T], where LSE
    starts_ptr,  # [rows + 1]
    lengths_ptr,  # [rows], where PAGED or DENSE
    table_ptr,  # [rows, pages], where PAGED; where DENSE [rows], the place of each row's first key among its own
    stride_lse,
    num_rows,
    groups,  # query heads of a key/value head
    stride_qt,
    stride_qh,
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    stride_table,  # where DENSE, the slots from one row's keys to the next's
    stride_row,  # where DENSE, of `lengths` and `table`
    scale,  # times log2(e): exponentials are powers of two
    window,
    D: tl.constexpr,
    PAGED: tl.constexpr,
    PAGE: tl.constexpr,
    DENSE: tl.constexpr,  # a row's keys lie one after another, wherever they begin
    WINDOWED: tl.constexpr,
    TMA: tl.constexpr,
    LSE: tl.constexpr,
    UNIT: tl.constexpr,  # elements that the strides count in: 16 bytes where all are whole, so that loads are as wide
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The last tiles, which see the most keys, are launched first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, start, num_queries, begin = find_tile(tile, starts_ptr, num_rows, BLOCK_M)
    if begin >= num_queries:
        return
    length = num_queries
    keys = start  # the slot of the first one
    if PAGED:
        length = tl.load(lengths_ptr + row)
        table_ptr += tl.cast(row, tl.int64) * stride_table
    if DENSE:
        length = tl.load(lengths_ptr + row * stride_row)
        keys = row * stride_table + tl.load(table_ptr + row * stride_row)
    head = tl.program_id(1)
    kv_head = head // groups
    k_ptr += kv_head.to(tl.int64) * stride_kh * UNIT
    v_ptr += kv_head.to(tl.int64) * stride_vh * UNIT
    stride_kt *= UNIT
    stride_vt *= UNIT
    o_i = begin + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_q = (o_i < num_queries)[:, None] & (o_d < D)
    o_t = (start + o_i).to(tl.int64)[:, None]
    q = tl.load(q_ptr + (o_t * stride_qt + head.to(tl.int64) * stride_qh) * UNIT + o_d, mask=m_q, other=0.0)

    low = length - num_queries + begin  # positions of the tile's first and last query
    high = tl.minimum(low + BLOCK_M, length) - 1
    o_m = low + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    best = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    # Of the tiles from `first` on, every query sees those in full_first:full_last whole. With a window that is worth a
    # loop of its own only where it is a loop of bulk copies.
    first = 0
    full_first = 0
    full_last = tl.maximum(low + 1, 0) // BLOCK_N * BLOCK_N
    if WINDOWED:
        first = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
        if TMA:
            edge = tl.cdiv(tl.maximum(high - window + 1, 0), BLOCK_N) * BLOCK_N  # the first tile inside all windows
            full_first = tl.minimum(edge, tl.maximum(high, 0) // BLOCK_N * BLOCK_N)  # only the last loop minds the tail
            full_last = tl.where(edge < full_last, full_last, full_first)
            acc, total, best = _attend_tiles(
                acc, total, best, q, o_m, k_ptr, v_ptr, k_desc, v_desc, table_ptr, kv_head, keys, length,
                first, full_first, stride_kt, stride_vt, scale, window,
                True, False, D, PAGED, PAGE, WINDOWED, TMA, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            full_last = first
    if TMA or not WINDOWED:
        acc, total, best = _attend_tiles(
            acc, total, best, q, o_m, k_ptr, v_ptr, k_desc, v_desc, table_ptr, kv_head, keys, length,
            full_first, full_last, stride_kt, stride_vt, scale, window,
            False, False, D, PAGED, PAGE, WINDOWED, TMA, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, best = _attend_tiles(
        acc, total, best, q, o_m, k_ptr, v_ptr, k_desc, v_desc, table_ptr, kv_head, keys, length,
        full_last, high + 1, stride_kt, stride_vt, scale, window,
        True, True, D, PAGED, PAGE, WINDOWED, TMA, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc / tl.where(total == 0, 1.0, total)[:, None]  # 0 where no key is visible
    o_out = (o_t * tl.num_programs(1) + head) * D + o_d
    tl.store(out_ptr + o_out, out.to(out_ptr.dtype.element_ty), mask=m_q)
    if LSE:
        p_lse = lse_ptr + head.to(tl.int64) * stride_lse + start + o_i
        tl.store(p_lse, best + tl.log2(total), mask=o_i < num_queries)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None = None) -> Tensor:
    """The kernel for prefill: every sequence attends to its own new keys.

    q [T, Hq, D], k and v [T, Hk, D]; `starts` [rows + 1] int32 on the same device, from 0 to T. float32, bfloat16 or
    float16, one dtype for all; out is contiguous. Raises RuntimeError where no kernel can run, TypeError and ValueError
    for what does not fit.
    """
    return _run(q, k, v, starts, None, None, scale, window)[0]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The kernel over a paged cache: row r has queries starts[r]:starts[r + 1] and `lengths[r]` keys, its own included.

    q [T, Hq, D]; caches [Hk, pages, page_size, D], a head's pages one after another; `page_table` [rows, pages of the
    longest], `starts` [rows + 1], from 0 to T, and `lengths` [rows], all int32 on the same device.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or (cache.shape[1] > 1 and cache.stride(1) != cache.shape[2] * cache.stride(2)):
            raise ValueError(
                f"{name} must be [kv heads, pages, page size, head_dim] with a head's pages one after another, "
                f"got {list(cache.shape)} with strides {list(cache.stride())}"
            )
    return _run(q, k_cache, v_cache, starts, page_table, lengths, scale, window)[0]


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    table: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    window: int | None,
    with_lse: bool = False,
    row_slots: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp). With `row_slots`, keys are dense: k and v are [Hk, slots, D], row r's own slots begin at
    r * row_slots, and `table` [rows], strided like `lengths`, says at which of them its first key lies.
    """
    require(q, k, v, starts, table, lengths)
    heads_first = table is not None
    pages = table if row_slots is None else None
    is_paged = pages is not None
    if q.dim() == k.dim() == 3 and not heads_first and k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have the {q.shape[0]} tokens of q, got {list(k.shape)}")
    if q.dim() != 3 or k.dim() != 3 + is_paged or k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q, k and v do not fit: {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[0 if heads_first else 1]
    if not 1 <= head_dim <= WIDEST or not num_kv_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"head_dim must be in 1..{WIDEST} and the query heads a multiple of the key/value heads, "
            f"got head_dim {head_dim}, heads {num_heads} and {num_kv_heads}"
        )
    if not scale > 0 or (window is not None and window < 1):
        raise ValueError(f"scale must be positive and window at least 1 or None, got {scale} and {window}")
    num_rows = starts.numel() - 1
    if num_rows < (1 if tokens else 0):
        raise ValueError(f"starts must be [rows + 1] int32 from 0 to {tokens}, got {list(starts.shape)}")
    for name, integers, shape in (("starts", starts, (num_rows + 1,)), ("lengths", lengths, (num_rows,))):
        if integers is not None and (integers.shape != shape or integers.dtype != torch.int32):
            raise ValueError(f"{name} must be {list(shape)} int32, got {list(integers.shape)} {integers.dtype}")
    if pages is not None and (pages.dim() != 2 or pages.shape[0] != num_rows or pages.dtype != torch.int32):
        raise ValueError(f"page_table must be [{num_rows}, pages] int32, got {list(pages.shape)} {pages.dtype}")
    if pages is not None and num_rows and not (pages.shape[1] and k.shape[1]):
        raise ValueError(f"page_table {list(pages.shape)} and caches {list(k.shape)} hold no page")
    allocate = torch.zeros if with_lse else torch.empty
    out = allocate(q.shape, dtype=q.dtype, device=q.device)
    lse = allocate((num_heads, tokens) if with_lse else 0, dtype=torch.float32, device=q.device)
    if not q.numel() or not num_rows:
        return out, lse
    starts = starts.contiguous()
    if pages is not None and lengths is not None:
        lengths = lengths.contiguous()
        table = pages if pages.stride(1) == 1 else pages.contiguous()

    block_d = max(triton.next_power_of_2(head_dim), 16)
    options = dict(tuning.config("attention", q.device, head_dim=head_dim, itemsize=q.element_size()))
    page = k.shape[2] if is_paged else 0
    if page % options["BLOCK_N"]:
        raise ValueError(f"the page size must be a multiple of {options['BLOCK_N']} tokens, the key tile, got {page}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    # [Hk, slots, D], whichever form they came in.
    if is_paged or not heads_first:
        k, v = (x.flatten(1, 2) if is_paged else x.transpose(0, 1) for x in (k, v))
    # Within a tile offsets are 32 bits wide.
    k, v = (x if x.stride(1) * options["BLOCK_N"] < 2**31 else x.contiguous() for x in (k, v))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    wide_load = 16 // q.element_size()
    unit = 1 if any(stride % wide_load for stride in strides) else wide_load
    descriptors = (k, v)
    if options.pop("TMA", False) and head_dim == block_d and unit > 1 and _bulk_copies(k, v):
        from triton.tools.tensor_descriptor import TensorDescriptor  # here, as Triton may be absent

        block = [1, options["BLOCK_N"], block_d]
        descriptors = tuple(TensorDescriptor.from_tensor(x, block) for x in (k, v))
    launch(
        _attention_kernel,
        (tokens // options["BLOCK_M"] + num_rows, num_heads),
        q,
        k,
        v,
        *descriptors,
        out,
        lse if with_lse else out,
        starts,
        starts if lengths is None else lengths,
        starts if table is None else table,
        tokens,
        num_rows,
        num_heads // num_kv_heads,
        *(stride // unit for stride in strides),
        row_slots if row_slots is not None else 0 if table is None else table.stride(0),
        0 if lengths is None else lengths.stride(0),
        scale * LOG2_E,
        window or 0,
        D=head_dim,
        PAGED=is_paged,
        PAGE=page,
        DENSE=row_slots is not None,
        WINDOWED=window is not None,
        TMA=descriptors[0] is not k,
        LSE=with_lse,
        UNIT=unit,
        BLOCK_D=block_d,
        **options,
    )
    return out, lse


def _bulk_copies(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can describe tensors whose strides are whole 16 bytes."""
    return all(x.numel() > 0 and x.data_ptr() % 16 == 0 for x in tensors)


def _gradient(inputs: Sequence[Any], needed: Sequence[bool], dout: Tensor) -> tuple[Tensor | None, ...]:
    from .attention_backward import gradient  # which stands on this file

    return gradient((*inputs, *torch.ops.tritium.attention_with_lse(*inputs)), needed, dout)


register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, int? window=None) -> Tensor",
    attention,
    attention_reference,
    lambda q, *rest: q.new_empty(q.shape),
    _gradient,
)
register(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor starts, Tensor lengths, "
    "float scale, int? window=None) -> Tensor",
    paged_attention,
    paged_attention_reference,
    lambda q, *rest: q.new_empty(q.shape),
)
