"""The gradient of causal grouped-query attention over ragged batches, and the forward pass that keeps what it needs.

With s_ij = q_i . k_j * scale over the pairs (i, j) that attention.py lets query i see, and out = sum_j p_ij v_j
(Dao 2023, arXiv:2307.08691):

    lse_i = log2(sum_j exp(s_ij)),  p_ij = 2^(s_ij log2(e) - lse_i),  delta_i = dout_i . out_i
    dv_j = sum_i p_ij dout_i,   ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

where the sums of dk and dv go over all query heads of their key/value head.

Shapes: as in attention.py, packed; out and dout like q, lse and delta [Hq, T].
Rounding: lse and delta are float32 (float64 stays), as all of this is; p rounds to the input dtype before its product
with dout, and ds before those with k and q, which accumulate in float32; dq, dk and dv round once. out is what the
forward pass rounded it to.
Order: two kernels. The first owns a tile of queries of one head, finds delta, and goes through the keys in order; the
second owns a tile of keys of one key/value head, and goes through its query heads, and each one's queries, in order.
Tiles begin at multiples of their size from the sequence's first token: as in the forward pass a sequence's bits depend
on nothing but the sequence. No atomics.
Saved: q, k, v, out and lse: one number a query and head besides what the forward pass has anyway.
Floor: 10 * Hq * D operations for each visible (query, key) pair: q k^T and dout v^T anew in both kernels make 14 of it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .attention import LOG2_E, _ints, _run, attention_reference, find_tile, visible
from .launch import launch, register, require, tl, triton
from .linear import _add_product
from .rms_norm import wide, wide_dtype


def attention_with_lse_reference(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int] | Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: out, as `attention_reference` gives it, and lse [Hq, T], float32 or float64, in base 2.

    Tokens behind the last sequence, which are padding, have zeros.
    """
    bounds = list(_ints(starts))
    end = bounds[-1] if bounds else 0
    out, lse = torch.zeros_like(q), q.new_zeros((q.shape[1], q.shape[0]), dtype=wide_dtype(q.dtype))
    out[:end] = attention_reference(q[:end], k[:end], v[:end], bounds, scale, window)
    for first, last in pairwise(bounds):
        lse[:, first:last] = _scores(q[first:last], k[first:last], scale, window).logsumexp(-1).flatten(0, 1) * LOG2_E
    return out, lse


def attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Sequence[int] | Tensor,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: dq, dk and dv in q's dtype; zeros behind the last sequence."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = (k.shape[1], -1)
    for first, last in pairwise(_ints(starts)):
        row = slice(first, last)
        scores = _scores(q[row], k[row], scale, window)
        p = torch.exp2(scores * LOG2_E - lse[:, row].unflatten(0, groups).unsqueeze(-1))
        queries, upstream, found = (wide(x[row]).unflatten(1, groups) for x in (q, dout, out))
        dp = torch.einsum("shgd,lhd->hgsl", upstream, wide(v[row]))
        delta = (upstream * found).sum(-1).permute(1, 2, 0).unsqueeze(-1)
        ds = wide((p * (dp - delta)).masked_fill(scores == float("-inf"), 0.0).to(q.dtype))
        dv[row] = torch.einsum("hgsl,shgd->lhd", wide(p.to(v.dtype)), upstream).to(v.dtype)
        dk[row] = (torch.einsum("hgsl,shgd->lhd", ds, queries) * scale).to(k.dtype)
        dq[row] = (torch.einsum("hgsl,lhd->shgd", ds, wide(k[row])) * scale).flatten(1, 2).to(q.dtype)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """[Hk, Hq / Hk, S, S] of one sequence, -inf where a query does not see a key."""
    scores = torch.einsum("shgd,lhd->hgsl", wide(q).unflatten(1, (k.shape[1], -1)), wide(k)) * scale
    return scores.masked_fill(~visible(q.shape[0], k.shape[0], window, q.device), float("-inf"))


@triton.jit
def _rows(ptr, o_i, first, limit, stride, o_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens o_i of one head's sequence, which begins at `first` and has `limit`; beyond, where others lie, zeros."""
    p = ptr + (first + o_i).to(tl.int64)[:, None] * stride + o_d[None, :]
    if D == BLOCK_D:
        tile = tl.load(p, mask=(o_i < limit)[:, None], other=0.0)
    else:
        tile = tl.load(p, mask=(o_i < limit)[:, None] & (o_d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _product(a, b):
    """a @ b^T. Without matrix instructions turned over: the other way round compiles to what no registers hold."""
    turned = a.dtype == tl.float32
    return tl.trans(tl.dot(b, tl.trans(a), input_precision="ieee")) if turned else tl.dot(a, tl.trans(b))


@triton.jit
def _seen(o_m, o_n, window, WINDOWED: tl.constexpr):
    """Whether queries o_m, of whichever shape, see keys o_n."""
    seen = o_n <= o_m
    if WINDOWED:
        seen &= o_n > o_m - window
    return seen


@triton.jit
def _add_keys(
    dq, q, dout, lse, delta, o_m, first, last, k_ptr, v_ptr, start, length, stride_kt, stride_vt, scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq [BLOCK_M, BLOCK_D] / scale of a tile of queries, with the share of the keys first:last."""
    o_d = tl.arange(0, BLOCK_D)
    for n in tl.range(first, last, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, o_n, start, length, stride_kt, o_d, D, BLOCK_D)
        v = _rows(v_ptr, o_n, start, length, stride_vt, o_d, D, BLOCK_D)
        scores = _product(q, k)
        p = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
        ds = p * (_product(dout, v) - delta[:, None])
        if MASKED:
            ds = tl.where(_seen(o_m[:, None], o_n[None, :], window, WINDOWED), ds, 0.0)
        dq = _add_product(dq, ds.to(k.dtype), k)
    return dq


@triton.jit(do_not_specialize=["stride_lse", "num_rows", "groups", "window"])
def _attention_dq_kernel(
    dq_ptr,  # [T, Hq, D], contiguous
    delta_ptr,  # float32 [Hq, T], written for the other kernel
    dout_ptr,  # [T, Hq, D], tokens `stride_dt` units apart, heads `stride_dh`
    q_ptr,  # [T, Hq, D] by `stride_qt` and `stride_qh`
    k_ptr,  # [T, Hk, D] by `stride_kt` and `stride_kh`
    v_ptr,  # [T, Hk, D]
    out_ptr,  # [T, Hq, D], contiguous
    lse_ptr,  # float32 [Hq, T]
    starts_ptr,  # [rows + 1]
    stride_lse,
    num_rows,
    groups,  # query heads of a key/value head
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    log_scale,  # the same times log2(e)
    window,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    UNIT: tl.constexpr,  # elements that the strides count in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The last tiles, which see the most keys, are launched first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    _, start, length, begin = find_tile(tile, starts_ptr, num_rows, BLOCK_M)
    if begin >= length:
        return
    head = tl.program_id(1)
    kv_head = (head // groups).to(tl.int64)
    o_m = begin + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    wide_head = head.to(tl.int64)
    q = _rows(q_ptr + wide_head * stride_qh * UNIT, o_m, start, length, stride_qt * UNIT, o_d, D, BLOCK_D)
    dout = _rows(dout_ptr + wide_head * stride_dh * UNIT, o_m, start, length, stride_dt * UNIT, o_d, D, BLOCK_D)
    width = tl.num_programs(1) * D
    out = _rows(out_ptr + wide_head * D, o_m, start, length, width, o_d, D, BLOCK_D)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    o_lse = wide_head * stride_lse + start + o_m
    tl.store(delta_ptr + o_lse, delta, mask=o_m < length)
    lse = tl.load(lse_ptr + o_lse, mask=o_m < length, other=0.0)
    k_ptr += kv_head * stride_kh * UNIT
    v_ptr += kv_head * stride_vh * UNIT
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    last = tl.minimum(begin + BLOCK_M, length)
    if WINDOWED:
        whole = tl.maximum(begin - window + 1, 0) // BLOCK_N * BLOCK_N
    else:
        whole = begin // BLOCK_N * BLOCK_N  # up to here every query of the tile sees every key
        dq = _add_keys(
            dq, q, dout, lse, delta, o_m, 0, whole, k_ptr, v_ptr, start, length, stride_kt * UNIT, stride_vt * UNIT,
            log_scale, window, False, WINDOWED, D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _add_keys(
        dq, q, dout, lse, delta, o_m, whole, last, k_ptr, v_ptr, start, length, stride_kt * UNIT, stride_vt * UNIT,
        log_scale, window, True, WINDOWED, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    p_dq = dq_ptr + (start + o_m).to(tl.int64)[:, None] * width + wide_head * D + o_d[None, :]
    tl.store(p_dq, (dq * scale).to(q.dtype), mask=(o_m < length)[:, None] & (o_d < D)[None, :])


@triton.jit
def _add_queries(
    dk, dv, k, v, o_n, first, last, q_ptr, dout_ptr, lse_ptr, delta_ptr, start, length, stride_qt, stride_dt, scale,
    window, WINDOWED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv [BLOCK_N, BLOCK_D] of a tile of keys, with the share of one head's queries first:last."""
    o_d = tl.arange(0, BLOCK_D)
    for m in tl.range(first, last, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        # Of a query that is not there all of this is zero: it adds nothing.
        q = _rows(q_ptr, o_m, start, length, stride_qt, o_d, D, BLOCK_D)
        dout = _rows(dout_ptr, o_m, start, length, stride_dt, o_d, D, BLOCK_D)
        lse = tl.load(lse_ptr + start + o_m, mask=o_m < length, other=0.0)
        delta = tl.load(delta_ptr + start + o_m, mask=o_m < length, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(tl.fma(scores, scale, -lse[None, :]))
        # Tiles that need no mask in a loop of their own would cost more registers than there are.
        seen = _seen(o_m[None, :], o_n[:, None], window, WINDOWED)
        p = tl.where(seen, p, 0.0)
        dv = _add_product(dv, p.to(dout.dtype), dout)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision="ieee") - delta[None, :])
        ds = tl.where(seen, ds, 0.0)
        dk = _add_product(dk, ds.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=["stride_lse", "num_rows", "groups", "window"])
def _attention_dkdv_kernel(
    dk_ptr,  # [T, Hk, D], contiguous
    dv_ptr,  # [T, Hk, D], contiguous
    dout_ptr,  # [T, Hq, D], tokens `stride_dt` units apart, heads `stride_dh`
    q_ptr,  # [T, Hq, D] by `stride_qt` and `stride_qh`
    k_ptr,  # [T, Hk, D] by `stride_kt` and `stride_kh`
    v_ptr,  # [T, Hk, D]
    lse_ptr,  # float32 [Hq, T]
    delta_ptr,  # float32 [Hq, T]
    starts_ptr,  # [rows + 1]
    stride_lse,
    num_rows,
    groups,  # query heads of a key/value head
    stride_dt,
    stride_dh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    scale,
    log_scale,  # the same times log2(e)
    window,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    UNIT: tl.constexpr,  # elements that the strides count in
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # The first tiles, which are seen by the most queries, are launched first.
    _, start, length, begin = find_tile(tl.program_id(0), starts_ptr, num_rows, BLOCK_N)
    if begin >= length:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    o_n = begin + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    k = _rows(k_ptr + kv_head * stride_kh * UNIT, o_n, start, length, stride_kt * UNIT, o_d, D, BLOCK_D)
    v = _rows(v_ptr + kv_head * stride_vh * UNIT, o_n, start, length, stride_vt * UNIT, o_d, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = begin // BLOCK_M * BLOCK_M
    last = length
    if WINDOWED:
        last = tl.minimum(begin + BLOCK_N - 1 + window, length)
    for group in range(groups):
        head = kv_head * groups + group
        q_head = q_ptr + head * stride_qh * UNIT
        dout_head = dout_ptr + head * stride_dh * UNIT
        lse_head = lse_ptr + head * stride_lse
        delta_head = delta_ptr + head * stride_lse
        dk, dv = _add_queries(
            dk, dv, k, v, o_n, first, last, q_head, dout_head, lse_head, delta_head, start, length, stride_qt * UNIT,
            stride_dt * UNIT, log_scale, window, WINDOWED, D, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    o_out = (start + o_n).to(tl.int64)[:, None] * tl.num_programs(1) * D + kv_head * D + o_d[None, :]
    m_out = (o_n < length)[:, None] & (o_d < D)[None, :]
    tl.store(dk_ptr + o_out, (dk * scale).to(k.dtype), mask=m_out)
    tl.store(dv_ptr + o_out, dv.to(v.dtype), mask=m_out)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel of attention.py: out, to the bit what `attention` gives, and lse, float32 [Hq, T], in base 2.

    Both are zero in the tokens behind the last sequence. Raises what `attention` raises.
    """
    return _run(q, k, v, starts, None, None, scale, window, with_lse=True)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    scale: float,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels: dq, dk and dv, contiguous, of what `attention_with_lse` was given and gave; zeros behind the last
    sequence. Nothing that is given is overwritten.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(q, dout, k, v, out, lse, starts)
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ValueError(f"q, k and v do not fit: {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if not num_kv_heads or num_heads % num_kv_heads or not 1 <= head_dim <= 256:
        raise ValueError(
            f"head_dim must be in 1..256 and the query heads a multiple of the key/value heads, got head_dim "
            f"{head_dim}, heads {num_heads} and {num_kv_heads}"
        )
    for name, tensor, shape, dtype in (
        ("dout", dout, q.shape, q.dtype),
        ("out", out, q.shape, q.dtype),
        ("k", k, k.shape, q.dtype),
        ("v", v, v.shape, q.dtype),
        ("lse", lse, (num_heads, tokens), torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}")
    if not scale > 0 or (window is not None and window < 1):
        raise ValueError(f"scale must be positive and window at least 1 or None, got {scale} and {window}")
    num_rows = starts.numel() - 1
    if starts.dim() != 1 or starts.dtype != torch.int32 or num_rows < (1 if tokens else 0):
        expected = f"[rows + 1] int32 from 0 to at most {tokens}"
        raise ValueError(f"starts must be {expected}, got {list(starts.shape)} {starts.dtype}")
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel() or not num_rows:
        return dq, dk, dv
    starts, out, lse = starts.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    # Strides are multiplied by their unit as 32-bit numbers.
    plain = [x.stride(-1) == 1 and max(x.stride()) < 2**31 for x in (dout, q, k, v)]
    dout, q, k, v = (x if fits else x.contiguous() for x, fits in zip((dout, q, k, v), plain, strict=True))
    strides = [stride for x in (dout, q, k, v) for stride in x.stride()[:2]]
    unit = 16 // q.element_size()
    if any(stride % unit for stride in strides):
        unit = 1
    block_d = max(triton.next_power_of_2(head_dim), 16)
    shared = (tokens, num_rows, num_heads // num_kv_heads, *(stride // unit for stride in strides))
    scales = (scale, scale * LOG2_E, window or 0)
    fixed = {"D": head_dim, "WINDOWED": window is not None, "UNIT": unit, "BLOCK_D": block_d}
    key = {"head_dim": head_dim, "itemsize": q.element_size()}
    by_query = tuning.config("attention_backward", q.device, part="dq", **key)
    grid = (tokens // by_query["BLOCK_M"] + num_rows, num_heads)
    launch(
        _attention_dq_kernel, grid, dq, delta, dout, q, k, v, out, lse, starts, *shared, *scales, **fixed, **by_query
    )
    by_key = tuning.config("attention_backward", q.device, part="dkdv", **key)
    grid = (tokens // by_key["BLOCK_N"] + num_rows, num_kv_heads)
    launch(_attention_dkdv_kernel, grid, dk, dv, dout, q, k, v, lse, delta, starts, *shared, *scales, **fixed, **by_key)
    return dq, dk, dv


def gradient(
    inputs: Sequence[Any], needed: Sequence[bool], dout: Tensor | None, dlse: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Of (q, k, v, starts, scale, window), which `out` and `lse` follow in `inputs`."""
    if dlse is not None:
        raise RuntimeError("attention_with_lse: lse has no gradient: detach it")
    q, k, v, starts, scale, window, out, lse = inputs
    if dout is None or not any(needed[:3]):
        return (None,) * 6
    found = torch.ops.tritium.attention_backward(dout, q, k, v, out, lse, starts, scale, window)
    return (*(tensor if want else None for tensor, want in zip(found, needed, strict=False)), None, None, None)


_INPUTS = "Tensor q, Tensor k, Tensor v"
register(
    f"attention_with_lse({_INPUTS}, Tensor starts, float scale, int? window=None) -> (Tensor, Tensor)",
    attention_with_lse,
    attention_with_lse_reference,
    lambda q, *rest: (q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide_dtype(q.dtype))),
    gradient,
    keep_outputs=True,
)
register(
    f"attention_backward(Tensor dout, {_INPUTS}, Tensor out, Tensor lse, Tensor starts, float scale, int? window=None)"
    " -> (Tensor, Tensor, Tensor)",
    attention_backward,
    attention_backward_reference,
    lambda dout, q, k, v, *rest: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
