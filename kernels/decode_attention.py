"""Attention of one new query a sequence over its paged cache: the decoding step.

    out_r = sum_j softmax_j(q_r . k_j * scale) v_j        over the last keys of row r: all L, or a window of W
                                       (split over the keys as in Flash-Decoding, merged as in arXiv:2205.14135)

Query head h reads key/value head h // (Hq / Hk). A row's keys are split by pages, always: how many other rows there
are, and how long, changes neither the splits nor the order in which they are merged. The first kernel reads each page
of a key/value head once, for all query heads of its group; the second merges a row's splits in ascending order.

Shapes: q and out [R, Hq, D]; k_cache and v_cache [Hk, pages, page_size, D]; page_table [R, pages of the longest], which
names each row's pages in order; lengths [R], each with the new key counted.
Rounding: scores and softmax in float32; probabilities, relative to the largest score met so far, round to the input
dtype before the product with v, which accumulates in float32; their sum is of the unrounded ones; splits are merged in
float32; one rounding at the end.
Floor: 2 * L * Hk * D * itemsize bytes a row (read its keys and values) and 4 * L * Hq * D operations. The splits'
results add 8 * Hq * D bytes a page, written and read back.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .attention import paged_attention_reference
from .launch import launch, register, require, tl, triton
from .rms_norm import wide

WIDEST_GROUP = 64  # query heads of one key/value head that a program holds
WIDEST_HEAD = 256


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor | Sequence[int],
    scale: float,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """The definition. A row of length 0 gives 0. `longest` bounds the lengths, for launchers: it changes nothing."""
    counts: list[int] = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    starts = range(len(counts) + 1)
    return paged_attention_reference(q, k_cache, v_cache, page_table, starts, counts, scale, window)


def dense_decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The definition over dense keys, as a CPU likes them: q [R, Hq, D], k and v [Hk * R, L, D] -> [R, Hq, D].

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


@triton.jit
def seen(length, window, PAGE: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The first key that a row's query sees, and the pages of its keys: the first, and one past the last."""
    key = tl.maximum(length - window, 0) if HAS_WINDOW else length * 0
    return key, key // PAGE, (length + PAGE - 1) // PAGE


@triton.jit
def attend(
    q,  # [G, BLOCK_D]
    k_ptr,  # [keys, D]
    v_ptr,
    begin,  # a multiple of BLOCK_N
    end,
    first,  # keys before it are not seen
    scale,  # times log2(e): scores are exponents of two
    largest,  # [G] float32
    sums,  # [G, BLOCK_N] float32
    acc,  # [G, BLOCK_D] float32
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Goes on with a running softmax over the keys from `begin` to `end`: its largest score, sums and weighted v."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        # Keys past the length or before the window are not read: a probability of 0 does not remove a NaN.
        m_n = (o_n < end) & (o_n >= first)
        o_kv = o_n[:, None] * D + o_d[None, :]
        k = tl.load(k_ptr + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        v = tl.load(v_ptr + o_kv, mask=m_n[:, None] & m_d, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(m_n[None, :], scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)  # scores that overflow to -inf: -inf - -inf is NaN
        shrink = tl.exp2(largest - finite)
        p = tl.exp2(scores - finite[:, None])
        sums = sums * shrink[:, None] + p
        if v.dtype == tl.float32:  # one chain of products over all keys would err more than sums by tiles do
            acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), tl.dot(p, v, input_precision="ieee"))
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        largest = new
    return largest, sums, acc


@triton.jit
def divided(acc, total):
    """acc [..., D] over its row's sum, total [...]; 0 where no key was seen."""
    total = tl.expand_dims(total, -1)
    return tl.where(total == 0.0, 0.0, tl.div_rn(acc, tl.zeros_like(acc) + total))


@triton.jit(do_not_specialize=["max_pages", "stride_table", "window"])
def _split_kernel(
    q_ptr,  # [R, Hq, D]
    k_ptr,  # [Hk, pages, PAGE, D]
    v_ptr,  # like k, strides too
    table_ptr,  # [R, max_pages]; where DENSE [R], the place of each row's first key among its own
    lengths_ptr,  # [R]
    out_ptr,  # [R, Hq, D], written where the grid has one split
    partial_ptr,  # [R, Hq, splits, D] float32, written where it has more: sums of exp2(score - largest) * v
    state_ptr,  # [R, Hq, 2, splits] float32: the largest score, and the sum of exp2(score - largest)
    max_pages,
    stride_q_row,
    stride_q_head,
    stride_head,
    stride_page,  # where DENSE, from a key to the next
    stride_table,  # where DENSE, the keys from one row's to the next's
    stride_row,  # of `lengths`, and of `table` where DENSE
    window,
    scale,  # times log2(e): scores are exponents of two
    D: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DENSE: tl.constexpr,  # a row's keys lie one after another, wherever they begin
    HAS_WINDOW: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + row * stride_row)
    first_key, first_page, end_page = seen(length, window, PAGE, HAS_WINDOW)
    index = first_page + split
    # What this program needs first is asked for before it knows whether it has anything to do.
    if DENSE:  # pages may begin at any key: they are counted in keys
        page = row * stride_table + tl.load(table_ptr + row * stride_row) + index * PAGE
    else:
        page = tl.load(table_ptr + row * stride_table + index, mask=index < max_pages, other=0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_h = kv_head * GROUP + o_g
    m_g = (o_g < GROUP)[:, None]
    m_d = (o_d < D)[None, :]
    q = tl.load(q_ptr + row * stride_q_row + o_h[:, None] * stride_q_head + o_d[None, :], mask=m_g & m_d, other=0.0)
    if not ONE_SPLIT:  # noqa: SIM102 (this is known at compile time, what follows is not)
        if index >= end_page:
            return

    base = index * PAGE  # the position of the page's first key
    begin = tl.maximum(first_key - base, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(length - base, PAGE)
    o_page = kv_head * stride_head + page * stride_page  # what may pass 2^31; within a page nothing does
    k_ptr += o_page
    v_ptr += o_page
    largest = tl.full([BLOCK_G], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)  # added up across columns once, at the end
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    largest, sums, acc = attend(
        q, k_ptr, v_ptr, begin, end, first_key - base, scale, largest, sums, acc, D, BLOCK_D, BLOCK_N
    )
    total = tl.sum(sums, 1)
    o_row = row * tl.num_programs(1) * GROUP + o_h
    if ONE_SPLIT:
        # What merging a single split gives, to the bit (a sum that begins with 0 has no -0).
        out = divided(acc + 0.0, total)
        out = tl.where((end_page > first_page + 1) | (end_page > max_pages), float("nan"), out)
        tl.store(out_ptr + o_row[:, None] * D + o_d[None, :], out.to(out_ptr.dtype.element_ty), mask=m_g & m_d)
    else:
        num_splits = tl.num_programs(2)
        o_state = o_row * 2 * num_splits + split
        tl.store(state_ptr + o_state, largest, mask=o_g < GROUP)
        tl.store(state_ptr + o_state + num_splits, total, mask=o_g < GROUP)
        o_partial = (o_row * num_splits + split)[:, None] * D + o_d[None, :]
        tl.store(partial_ptr + o_partial, acc, mask=m_g & m_d)


@triton.jit
def merge(
    partial_ptr,  # [rows, splits, D] float32
    state_ptr,  # [rows, 2, splits] float32
    o_row,  # [G]
    m_row,  # [G]
    count,
    num_splits,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose loads are in flight together, or None
):
    """Merges the first `count` splits of some rows, in ascending order: the weighted v [G, BLOCK_D] and its sum [G]."""
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    largest = tl.full([G], -float("inf"), tl.float32)
    total = tl.zeros([G], tl.float32)
    acc = tl.zeros([G, BLOCK_D], tl.float32)
    for start in tl.range(0, count, BLOCK_S, num_stages=STAGES):
        o_s = start + tl.arange(0, BLOCK_S)[None, :]
        m_s = m_row[:, None] & (o_s < count)
        o_state = o_row[:, None] * 2 * num_splits + o_s
        score = tl.load(state_ptr + o_state, mask=m_s, other=-float("inf"))
        part = tl.load(state_ptr + o_state + num_splits, mask=m_s, other=0.0)
        o_partial = (o_row[:, None] * num_splits + o_s)[:, :, None] * D + o_d
        partial = tl.load(partial_ptr + o_partial, mask=m_s[:, :, None] & (o_d < D), other=0.0)
        new = tl.maximum(largest, tl.max(score, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp2(largest - finite)
        weight = tl.exp2(score - finite[:, None])
        total = total * shrink + tl.sum(part * weight, 1)
        acc = acc * shrink[:, None] + tl.sum(partial * weight[:, :, None], 1)
        largest = new
    return acc, total


@triton.jit(do_not_specialize=["num_splits", "max_pages", "window"])
def _merge_kernel(
    partial_ptr,  # [R, Hq, splits, D] float32
    state_ptr,  # [R, Hq, 2, splits] float32
    lengths_ptr,  # [R]
    out_ptr,  # [R, Hq, D]
    num_splits,
    max_pages,
    stride_row,  # of `lengths`
    window,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_row = row * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + row * stride_row)
    _, first_page, end_page = seen(length, window, PAGE, HAS_WINDOW)
    count = tl.minimum(end_page - first_page, num_splits)  # the splits that were written; the others are not read
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    one = tl.arange(0, 1)
    acc, total = merge(partial_ptr, state_ptr, o_row + one, one == 0, count, num_splits, 1, D, BLOCK_D, BLOCK_S, None)
    out = divided(acc, total)
    # A row longer than the grid or the table was told of cannot be right: it must not look as if it were.
    out = tl.where((end_page - first_page > num_splits) | (end_page > max_pages), float("nan"), out)
    o_out = o_row * D + o_d
    tl.store(out_ptr + o_out[None, :], out.to(out_ptr.dtype.element_ty), mask=m_d[None, :])


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """The kernels: [R, Hq, D], contiguous. float32, bfloat16 or float16; `page_table` and `lengths` are int32.

    `longest` bounds the lengths (by default, as many keys as the table has room for) and with them the grid; results do
    not depend on it. A row whose visible keys lie on more pages than that becomes NaN. Raises RuntimeError where no
    kernel can run, TypeError and ValueError for what does not fit.
    """
    check(q, k_cache, v_cache, page_table, lengths, window)
    pages, page_size = k_cache.shape[1:3]
    if not pages or not page_table.shape[1]:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # nothing is cached
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    place = (k_cache.stride(0), k_cache.stride(1), page_table.stride(0))
    return split(
        q, k_cache, v_cache, page_table, lengths, place, page_table.shape[1], page_size, scale, window, longest
    )


def split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    place: tuple[int, int, int],
    max_pages: int,
    page_size: int,
    scale: float,
    window: int | None,
    longest: int | None = None,
    dense: bool = False,
) -> Tensor:
    """Launches both kernels over keys that lie by `place`, the kernel's strides of heads, of pages and of the table.

    Where `dense`, `table` [R] says where each row's first key lies among its own, and is strided like `lengths`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    if q.stride(2) != 1:
        q = q.contiguous()
    rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1 if dense else 0]
    splits = most_splits(max_pages, page_size, window, longest)
    group = num_heads // num_kv_heads
    key = {"head_dim": head_dim, "itemsize": q.element_size(), "group": group}
    options = dict(tuning.config("decode_attention", q.device, **key, programs=rows * num_kv_heads * splits))
    block_s = options.pop("BLOCK_S")
    options["BLOCK_N"] = min(options["BLOCK_N"], page_size)
    shape = {
        "D": head_dim,
        "PAGE": page_size,
        "HAS_WINDOW": window is not None,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }
    partial = state = out
    if splits > 1:
        partial = torch.empty((rows, num_heads, splits, head_dim), dtype=torch.float32, device=q.device)
        state = torch.empty((rows, num_heads, 2, splits), dtype=torch.float32, device=q.device)
    launch(
        _split_kernel,
        (rows, num_kv_heads, splits),
        q,
        k,
        v,
        table,
        lengths,
        out,
        partial,
        state,
        max_pages,
        q.stride(0),
        q.stride(1),
        *place,
        lengths.stride(0),
        window or 0,
        scale * math.log2(math.e),
        GROUP=group,
        DENSE=dense,
        ONE_SPLIT=splits == 1,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        **shape,
        **options,
    )
    if splits > 1:
        launch(
            _merge_kernel,
            (rows, num_heads),
            partial,
            state,
            lengths,
            out,
            splits,
            max_pages,
            lengths.stride(0),
            window or 0,
            BLOCK_S=block_s,
            num_warps=4,
            **shape,
        )
    return out


def most_splits(max_pages: int, page_size: int, window: int | None, longest: int | None) -> int:
    """How many pages the visible keys of a row can lie on; 1 at least."""
    splits = max_pages if longest is None else min(max_pages, triton.cdiv(longest, page_size))
    if window is not None:
        splits = min(splits, triton.cdiv(window - 1, page_size) + 1)  # a window of two keys may lie on two pages
    return max(splits, 1)


def check(q: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, lengths: Tensor, window: int | None) -> None:
    """Raises what a caller's mistake deserves."""
    require(q, k_cache, v_cache, page_table, lengths)
    if q.ndim != 3 or k_cache.ndim != 4:
        raise ValueError(
            f"q must be [rows, heads, head_dim] and k_cache [kv_heads, pages, page_size, head_dim], "
            f"got {list(q.shape)} and {list(k_cache.shape)}"
        )
    (rows, num_heads, head_dim), (num_kv_heads, _, page_size, cached_dim) = q.shape, k_cache.shape
    if v_cache.shape != k_cache.shape or v_cache.stride() != k_cache.stride():
        raise ValueError(
            f"v_cache must be laid out like k_cache, {list(k_cache.shape)}, got {list(v_cache.shape)} with strides "
            f"{list(v_cache.stride())} for {list(k_cache.stride())}"
        )
    if k_cache.dtype != q.dtype or v_cache.dtype != q.dtype:
        raise TypeError(f"q is {q.dtype}, the cache is {k_cache.dtype} and {v_cache.dtype}: they must be the same")
    if cached_dim != head_dim or head_dim > WIDEST_HEAD:
        raise ValueError(f"heads of {head_dim} over a cache of {cached_dim}: they must be equal, at most {WIDEST_HEAD}")
    if not num_kv_heads or num_heads % num_kv_heads or num_heads > WIDEST_GROUP * num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} key/value heads: "
            f"they must be a multiple, at most {WIDEST_GROUP} times as many"
        )
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"a page of {page_size} keys: its size must be a power of two, at least 16")
    if k_cache.stride(2) != head_dim or k_cache.stride(3) != 1:
        raise ValueError(f"keys must follow one another within a page, got strides {list(k_cache.stride())}")
    if page_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise TypeError(f"page_table and lengths must be torch.int32, got {page_table.dtype} and {lengths.dtype}")
    if page_table.ndim != 2 or len(page_table) != rows or lengths.shape != (rows,):
        raise ValueError(
            f"page_table must be [{rows}, pages] and lengths [{rows}], like q, "
            f"got {list(page_table.shape)} and {list(lengths.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: it must be at least 1, or None")


register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor lengths, float scale, "
    "int? window=None, int? longest=None) -> Tensor",
    decode_attention,
    decode_attention_reference,
    lambda q, *args, **kwargs: q.new_empty(q.shape),
)
