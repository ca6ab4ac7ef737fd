"""QK-norm, rotation, the write into the cache and attention of one new token a sequence, in one launch.

    q, k, v = qk_norm_rope(qkv)          (qk_norm_rope.py);   k and v go to the row's slot of the cache
    out_r   = decode_attention(q)_r      (decode_attention.py) over the row's keys, the new one included

A row without a slot (-1: padding, or a finished sequence) writes nothing, reads no key and gives 0.

A program takes one page of one key/value head, for the query heads of its group, which it rotates itself. The program
of the newest key's page rotates that key too, writes it and its value to the cache, and begins its running softmax with
both from registers: nothing is read after it was written. A row of several pages leaves a partial result for each, and
whichever program finishes last merges them in ascending order: the count of those that have finished is an integer, and
the order of the sums does not depend on who is last.

Shapes: qkv [R, (Hq + 2 Hk) * D], heads in the order q, k, v; table, positions, weight and query_scale as in
qk_norm_rope.py; k_cache and v_cache [Hk, pages, page_size, D]; slots [R] int64, that of the key lengths[r] - 1;
page_table [R, pages of the longest] and lengths [R] int32, each with the new key counted; out [R, Hq, D].
Rounding: q and k as in qk_norm_rope.py, attention as in decode_attention.py; the new key's probability is relative to
its own score, and so is 1.
Floor: 2 * L * Hk * D * itemsize bytes a row (read its keys and values) and 4 * L * Hq * D operations. A row of several
pages adds 8 * Hq * D bytes a page, written and read back from the L2.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .decode_attention import attend, decode_attention_reference, divided, merge, most_splits, seen
from .decode_attention import check as check_attention
from .launch import launch, register, tl, triton
from .overlap import arrive, dependent, prefetch, start, wait
from .qk_norm_rope import ARGUMENTS, check_cache, fake_q, norm_rope, qk_norm_rope_cache_reference
from .qk_norm_rope import check as check_rope

WIDEST_QUERIES = 16_384  # bytes of a key/value head's queries, which a program rotates in registers
LINE = tl.constexpr(128)  # bytes that a prefetch brings


class Scratch(NamedTuple):
    """What rows of several pages need beside the output. One call after another may use it, for fewer rows too."""

    partial: Tensor  # [R * Hq * splits * D] float32
    state: Tensor  # [R * Hq * 2 * splits] float32
    counts: Tensor  # [R * Hk] int32: 0 between calls


def holds(group: int, head_dim: int, itemsize: int) -> bool:
    """Whether a program has room for the queries of one key/value head."""
    return triton.next_power_of_2(group) * max(16, triton.next_power_of_2(head_dim)) * itemsize <= WIDEST_QUERIES


def rope_decode_attention_scratch(
    rows: int, num_heads: int, num_kv_heads: int, head_dim: int, splits: int, device: torch.device
) -> Scratch:
    """Scratch for at most so many rows and splits, a split being a page."""
    return Scratch(
        torch.empty(rows * num_heads * splits * head_dim, dtype=torch.float32, device=device),
        torch.empty(rows * num_heads * splits * 2, dtype=torch.float32, device=device),
        torch.zeros(rows * num_kv_heads, dtype=torch.int32, device=device),
    )


def rope_decode_attention_reference(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm: bool,
    weight: Tensor | None,
    eps: float,
    norm_first: bool,
    query_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """The definition: the one operation, then the other; k and v go to the caches in place."""
    q = qk_norm_rope_cache_reference(
        qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale,
        k_cache, v_cache, slots,
    )  # fmt: skip
    lengths = torch.where(slots < 0, 0, lengths)
    return decode_attention_reference(q, k_cache, v_cache, page_table, lengths, scale, window, longest)


@triton.jit
def _pairs(pointer, o_head, m_head, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements of some heads [G, BLOCK_D], and beside each the one that it is rotated with."""
    HALF: tl.constexpr = D // 2
    WHOLE: tl.constexpr = HALF & -HALF  # elements that stay together when the halves change places
    o_d = tl.arange(0, BLOCK_D)
    m_d = m_head[:, None] & (o_d < D)[None, :]
    o_other = tl.where(o_d < HALF, o_d + HALF, o_d - HALF)
    o_other = tl.max_contiguous(tl.multiple_of(o_other, WHOLE), WHOLE)
    heads = pointer + o_head[:, None] * D
    x = tl.load(heads + o_d[None, :], mask=m_d, other=0.0)
    return x, tl.load(heads + o_other[None, :], mask=m_d, other=0.0)


@triton.jit
def _tile(
    tile,
    waits,  # for the phase before, once what does not depend on it was asked for
    qkv_ptr,  # [R, (HQ + 2 HK) * D], rows `stride_x` apart
    table_ptr,  # float32 [context, 2, D/2]
    positions_ptr,  # [R]
    weight_ptr,  # [HQ + HK, D]
    factor_ptr,  # float32 [context]
    k_ptr,  # [HK, pages, PAGE, D], heads `stride_head` apart
    v_ptr,  # like k, strides too
    slots_ptr,  # [R]
    pages_ptr,  # [R, max_pages], rows `stride_pages` apart
    lengths_ptr,  # [R]
    out_ptr,  # [R, HQ, D]
    partial_ptr,  # [R, HQ, splits, D] float32: sums of exp2(score - largest) * v
    state_ptr,  # [R, HQ, 2, splits] float32: the largest score, and the sum of exp2(score - largest)
    counts_ptr,  # [R, HK]
    arrivals_ptr,
    target,
    rows,
    splits,
    max_pages,
    stride_x,
    stride_head,
    stride_pages,
    eps,
    window,
    scale,  # times log2(e): scores are exponents of two
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGED_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SYNC: tl.constexpr,
    PREFETCH: tl.constexpr,
    MERGE_STAGES: tl.constexpr,  # steps of the merge whose loads are in flight together
):
    """One (row, key/value head, page)."""
    GROUP: tl.constexpr = HQ // HK
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    one = tl.arange(0, 1)
    # Up to `wait` nothing is read that the phase before may write. The slots, lengths, positions and pages of this
    # step, and the keys of earlier ones, were written before the step began, and a step begins with a launch that
    # waits for all before it.
    row = tl.cast(tile % rows, tl.int64)
    kv_head = tl.cast(tile // rows % HK, tl.int64)
    split = tile // (rows * HK)
    slot = tl.load(slots_ptr + row)
    length = tl.where(slot < 0, 0, tl.load(lengths_ptr + row))
    first_key, first_page, end_page = seen(length, window, PAGE, HAS_WINDOW)
    existing = tl.maximum(end_page - first_page, 1)  # a row without keys has a split too, which gives 0
    count = tl.minimum(existing, splits)
    newest = (split == existing - 1) & (length > 0)
    index = first_page + split
    page = tl.load(pages_ptr + row * stride_pages + index, mask=index < max_pages, other=0)
    # An entry that is not the row's may be no page's number, and even asking for it must not leave the cache.
    page = tl.where((split < count) & (length > 0), page, 0).to(tl.int64)
    base = index * PAGE  # the position of the page's first key
    begin = tl.maximum(first_key - base, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(length - 1 - base, PAGE)  # of the older keys
    o_page = kv_head * stride_head + page * (PAGE * D)  # what may pass 2^31; within a page nothing does
    if PREFETCH:
        WIDE: tl.constexpr = LINE * 8 // dtype.primitive_bitwidth
        o_line = begin * D + tl.arange(0, PAGE * BLOCK_D // WIDE) * WIDE
        o_line = o_page + tl.maximum(tl.minimum(o_line, end * D - 1), 0)
        prefetch(k_ptr + o_line, PREFETCH)
        prefetch(v_ptr + o_line, PREFETCH)
    o_q = kv_head * GROUP + o_g
    o_k = kv_head + HQ + one
    q_weight, q_weight2 = o_g, o_g
    k_weight, k_weight2 = one, one
    if HAS_WEIGHT:
        q_weight, q_weight2 = _pairs(weight_ptr, o_q, m_g, D, BLOCK_D)
        k_weight, k_weight2 = _pairs(weight_ptr, o_k, one == 0, D, BLOCK_D)
    cos, sin, factor = 1.0, 1.0, 1.0
    if HAS_ROPE:
        position = tl.load(positions_ptr + row).to(tl.int64)
        o_half = tl.where(o_d < HALF, o_d, o_d - HALF)[None, :]
        cos = tl.load(table_ptr + position * D + o_half, mask=m_d[None, :], other=0.0)
        sin = tl.load(table_ptr + position * D + HALF + o_half, mask=m_d[None, :], other=0.0)
        sin = tl.where((o_d < HALF)[None, :], sin, -sin)
        if HAS_SCALE:
            factor = tl.load(factor_ptr + position)
    if waits:
        wait(arrivals_ptr, target, SYNC)

    if split < count:
        x_ptr = qkv_ptr + row * stride_x
        q, q2 = _pairs(x_ptr, o_q, m_g, D, BLOCK_D)
        k, k2 = _pairs(x_ptr, o_k, (one == 0) & newest, D, BLOCK_D)
        m_new = newest & m_d[None, :]
        v = tl.load(x_ptr + (kv_head + HQ + HK) * D + o_d[None, :], mask=m_new, other=0.0)
        # Each pair is there twice, once in either order: twice the elements of a head.
        q, _ = norm_rope(
            q.to(tl.float32), q2.to(tl.float32), q_weight.to(tl.float32), q_weight2.to(tl.float32),
            cos, sin, factor, eps, 2 * D,
            HAS_ROPE, ROPE_ROUNDS, HAS_NORM, HAS_WEIGHT, NORM_FIRST, HAS_SCALE, dtype,
        )  # fmt: skip
        k, _ = norm_rope(
            k.to(tl.float32), k2.to(tl.float32), k_weight.to(tl.float32), k_weight2.to(tl.float32),
            cos, sin, factor, eps, 2 * D,
            HAS_ROPE, ROPE_ROUNDS, HAS_NORM, HAS_WEIGHT, NORM_FIRST, False, dtype,
        )  # fmt: skip
        o_new = kv_head * stride_head + slot * D + o_d[None, :]
        tl.store(k_ptr + o_new, k, mask=m_new)
        tl.store(v_ptr + o_new, v, mask=m_new)

        score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        finite = tl.where(score == -float("inf"), 0.0, score)
        weight = tl.where(newest, tl.exp2(score - finite), 0.0)  # 1, but 0 of a score of -inf and NaN of a NaN
        largest = tl.where(newest, score, -float("inf"))
        sums = tl.where((tl.arange(0, BLOCK_N) == 0)[None, :], weight[:, None], 0.0)
        acc = weight[:, None] * v.to(tl.float32)
        largest, sums, acc = attend(
            q, k_ptr + o_page, v_ptr + o_page, begin, end, first_key - base, scale, largest, sums, acc,
            D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        total = tl.sum(sums, 1)
        o_row = row * HQ + o_q
        m_row = m_g[:, None] & m_d[None, :]
        # A row longer than the grid or the table was told of cannot be right: it must not look as if it were.
        wrong = (existing > splits) | (end_page > max_pages)
        if count == 1:
            out = tl.where(wrong, float("nan"), divided(acc, total))
            tl.store(out_ptr + o_row[:, None] * D + o_d[None, :], out.to(dtype), mask=m_row)
        else:
            o_state = o_row * 2 * splits + split
            tl.store(state_ptr + o_state, largest, mask=m_g)
            tl.store(state_ptr + o_state + splits, total, mask=m_g)
            o_partial = (o_row * splits + split)[:, None] * D + o_d[None, :]
            tl.store(partial_ptr + o_partial, acc, mask=m_row)
            tl.debug_barrier()  # all of the program's threads have stored before one of them says so
            finished = tl.atomic_add(counts_ptr + row * HK + kv_head, 1, sem="acq_rel", scope="gpu")
            if finished == count - 1:
                for first in range(0, GROUP, MERGED_G):
                    o_m = first + tl.arange(0, MERGED_G)
                    o_out = row * HQ + kv_head * GROUP + o_m
                    merged, merged_total = merge(
                        partial_ptr, state_ptr, o_out, o_m < GROUP, count, splits,
                        MERGED_G, D, BLOCK_D, BLOCK_S, MERGE_STAGES,
                    )  # fmt: skip
                    merged = tl.where(wrong, float("nan"), divided(merged, merged_total))
                    m_out = (o_m < GROUP)[:, None] & m_d[None, :]
                    tl.store(out_ptr + o_out[:, None] * D + o_d[None, :], merged.to(dtype), mask=m_out)
                tl.store(counts_ptr + row * HK + kv_head, 0)


@triton.jit
def rope_decode_attention_phase(
    program, programs,
    qkv_ptr, table_ptr, positions_ptr, weight_ptr, factor_ptr, k_ptr, v_ptr, slots_ptr, pages_ptr, lengths_ptr,
    out_ptr, partial_ptr, state_ptr, counts_ptr, arrivals_ptr, target, rows, splits, max_pages,
    stride_x, stride_head, stride_pages, eps, window, scale,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    HAS_ROPE: tl.constexpr, ROPE_ROUNDS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MERGED_G: tl.constexpr, BLOCK_S: tl.constexpr,
    SYNC: tl.constexpr, PREFETCH: tl.constexpr, MERGE_STAGES: tl.constexpr = 2,
):  # fmt: skip
    """Of all (row, key/value head, page) those that are `program` modulo `programs`. Parameters as of `_tile`."""
    start(SYNC)
    tiles = rows * HK * splits
    for tile in tl.range(program, tiles, programs, disable_licm=True):  # what is moved out of it fills the registers
        _tile(
            tile, tile == program,
            qkv_ptr, table_ptr, positions_ptr, weight_ptr, factor_ptr, k_ptr, v_ptr, slots_ptr, pages_ptr, lengths_ptr,
            out_ptr, partial_ptr, state_ptr, counts_ptr, arrivals_ptr, target,
            rows, splits, max_pages, stride_x, stride_head, stride_pages, eps, window, scale,
            HQ, HK, D, PAGE, HAS_ROPE, ROPE_ROUNDS, HAS_NORM, HAS_WEIGHT, NORM_FIRST, HAS_SCALE, HAS_WINDOW,
            BLOCK_G, BLOCK_D, BLOCK_N, MERGED_G, BLOCK_S, SYNC, PREFETCH, MERGE_STAGES,
        )  # fmt: skip
    if program >= tiles:
        wait(arrivals_ptr, target, SYNC)  # to arrive before it would count for the phase before
    arrive(arrivals_ptr, SYNC)


@triton.jit(do_not_specialize=["rows", "splits", "max_pages", "stride_pages", "window"])
def _rope_decode_attention_kernel(
    qkv_ptr, table_ptr, positions_ptr, weight_ptr, factor_ptr, k_ptr, v_ptr, slots_ptr, pages_ptr, lengths_ptr,
    out_ptr, partial_ptr, state_ptr, counts_ptr, rows, splits, max_pages,
    stride_x, stride_head, stride_pages, eps, window, scale,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    HAS_ROPE: tl.constexpr, ROPE_ROUNDS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MERGED_G: tl.constexpr, BLOCK_S: tl.constexpr,
    SYNC: tl.constexpr, PREFETCH: tl.constexpr, MERGE_STAGES: tl.constexpr,
):  # fmt: skip
    """The phase with a program for each tile."""
    start(SYNC)
    _tile(
        tl.program_id(0), True,
        qkv_ptr, table_ptr, positions_ptr, weight_ptr, factor_ptr, k_ptr, v_ptr, slots_ptr, pages_ptr, lengths_ptr,
        out_ptr, partial_ptr, state_ptr, counts_ptr, counts_ptr, 0,
        rows, splits, max_pages, stride_x, stride_head, stride_pages, eps, window, scale,
        HQ, HK, D, PAGE, HAS_ROPE, ROPE_ROUNDS, HAS_NORM, HAS_WEIGHT, NORM_FIRST, HAS_SCALE, HAS_WINDOW,
        BLOCK_G, BLOCK_D, BLOCK_N, MERGED_G, BLOCK_S, SYNC, PREFETCH, MERGE_STAGES,
    )  # fmt: skip


def rope_decode_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm: bool,
    weight: Tensor | None,
    eps: float,
    norm_first: bool,
    query_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None = None,
    longest: int | None = None,
    *,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
) -> Tensor:
    """The kernel: [R, Hq, D], written to `out` where that is given (contiguous). The caches are written in place.

    Arguments as of `qk_norm_rope_cache` and `decode_attention`; `longest` bounds the lengths and with them the grid:
    a row whose visible keys lie on more pages than that becomes NaN, and is not cached. `scratch`, from
    `rope_decode_attention_scratch`, is for at least as many rows and pages; without it, it is allocated.
    With `out` it is one of a chain of launches: on a GPU all but `qkv` may be read before the launch in front of this
    one has ended, which must write none of it.
    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    qkv = qkv if qkv.dim() != 2 or qkv.stride(1) == 1 else qkv.contiguous()
    head_dim = check_rope(qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, query_scale)
    check_cache(qkv, num_kv_heads, head_dim, k_cache, v_cache, slots)
    heads = qkv.unflatten(1, (-1, head_dim))[:, :num_heads]
    check_attention(heads, k_cache, v_cache, page_table, lengths, window)
    group = num_heads // num_kv_heads
    if not holds(group, head_dim, qkv.element_size()):
        raise ValueError(
            f"{group} query heads of {head_dim} {qkv.dtype} share a key/value head: padded to powers of two they must "
            f"fit in {WIDEST_QUERIES} bytes"
        )
    rows, (page_size, max_pages) = len(qkv), (k_cache.shape[2], page_table.shape[1])
    given = out is not None
    if out is None:
        out = qkv.new_empty(rows, num_heads, head_dim)
    elif out.shape != heads.shape or out.dtype != qkv.dtype or not out.is_contiguous():
        wanted = f"contiguous {qkv.dtype} {list(heads.shape)}"
        raise ValueError(f"out must be {wanted}, got {list(out.shape)} {out.dtype} with strides {list(out.stride())}")
    if not rows:
        return out
    if not k_cache.shape[1] or not max_pages:
        return out.zero_()  # there is nowhere to cache anything
    splits = most_splits(max_pages, page_size, window, longest)
    if scratch is None:
        scratch = rope_decode_attention_scratch(rows, num_heads, num_kv_heads, head_dim, splits, qkv.device)
    elif min(scratch.partial.numel() // (num_heads * splits * head_dim), scratch.counts.numel() // num_kv_heads) < rows:
        raise ValueError(f"scratch is for less than {rows} rows of {splits} pages of {page_size} keys")
    # A copy made here would be the launch in front.
    chained = given and page_table.stride(1) == 1 and lengths.is_contiguous()
    chained = chained and (weight is None or weight.is_contiguous())
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    lengths = lengths.contiguous()
    weight = weight.contiguous() if norm and weight is not None else None
    programs = rows * num_kv_heads * splits
    options = launch_row(qkv, group, head_dim, page_size, programs)
    launch(
        _rope_decode_attention_kernel,
        (programs,),
        qkv,
        table,  # None is no parameter of the compiled code
        positions,
        weight,
        query_scale,
        k_cache,
        v_cache,
        slots,
        page_table,
        lengths,
        out,
        *scratch,
        rows,
        splits,
        max_pages,
        qkv.stride(0),
        k_cache.stride(0),
        page_table.stride(0),
        eps,
        window or 0,
        scale * math.log2(math.e),
        HQ=num_heads,
        HK=num_kv_heads,
        D=head_dim,
        PAGE=page_size,
        HAS_ROPE=table is not None,
        ROPE_ROUNDS=table is not None and rope_dtype != torch.float32,
        HAS_NORM=norm,
        HAS_WEIGHT=weight is not None,
        NORM_FIRST=norm_first or table is None,
        HAS_SCALE=query_scale is not None,
        HAS_WINDOW=window is not None,
        **dependent(qkv.device, chained),
        **options,
    )
    return out


def launch_row(like: Tensor, group: int, head_dim: int, page_size: int, programs: int) -> dict[str, Any]:
    """What the tables say of such a shape, and the blocks that follow from it: launch arguments."""
    key = {"head_dim": head_dim, "itemsize": like.element_size(), "group": group, "programs": programs}
    options = dict(tuning.config("rope_decode_attention", like.device, **key))
    block_d, padded = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    merged = options.pop("MERGED") // block_d  # heads times splits that are merged at a time
    blocks = {"BLOCK_G": max(16, padded), "BLOCK_D": block_d, "BLOCK_N": min(options["BLOCK_N"], page_size)}
    merged_g = min(merged, padded)
    return {**options, **blocks, "MERGED_G": merged_g, "BLOCK_S": merged // merged_g}


register(
    f"rope_decode_attention({ARGUMENTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    "Tensor page_table, Tensor lengths, float scale, int? window=None, int? longest=None) -> Tensor",
    rope_decode_attention,
    rope_decode_attention_reference,
    fake_q,
)
