"""QK-norm and rotary position embedding over the packed QKV projection.

For every token t and every head h of q and k, with x = qkv[t, h] of D elements in two halves (x1, x2):

    norm(x)   = x / sqrt(mean(x^2) + eps) [* weight]              (arXiv:2010.04245; per head, v is never normalised)
    rotate(x) = (x1 * cos_t - x2 * sin_t,  x2 * cos_t + x1 * sin_t)          (RoPE, arXiv:2104.09864, half-split pairs)

    q, k = rotate(norm(x))   (norm_first: Qwen3)      or      norm(rotate(x))   (MobileLLM-R1)
    q'   = q * f_t           (log-n scaling by J. Su, as Qwen uses it: arXiv:2309.16609; k stays as it is)

Shapes: qkv [T, (Hq + 2 Hk) * D], heads in the order q, k, v (Hk = 0: a projection of its own); cos and sin [T, 1, D]
(see `rope_rows`), or the table [context, 2, D/2] of every position's (cos, sin) in float32 with positions [T], int32 or
int64; the factors f as [T], or as query_scale [context], one for each row of the table, in float32; weight [Hq + Hk, D]
(q's vector repeated for its heads, then k's) or None; q [T, Hq, D], k and v [T, Hk, D];
caches [Hk, pages, PAGE, D], a page of one head contiguous, slots [T] = page * PAGE + offset, or -1 to write nothing.
Rounding: the norm as in rms_norm.py. The rotation happens in cos's dtype, or `rope_dtype`: the model dtype for Qwen and
Llama (cos, sin, each product and the sum round), float32 for MobileLLM-R1 (one rounding, to the model dtype). What is
normalised after the rotation is the rounded rotation. f rounds to the model dtype, then its product with the finished,
rounded q: many factors just above 1 become 1 in bfloat16, as they do in Qwen.
Floor: 2 * numel(q, k) * itemsize bytes, and numel(v) * itemsize twice more when K and V go to the cache; about 10
operations an element. The table's row (and factor) of a token is read by each of its programs, all but once from L2.
One kernel for what are four otherwise (norm, rotation, two cache writes): vLLM and TensorRT-LLM fuse the first two.

Positions and slots are on the device, where nothing checks them: whoever makes them must see to 0 <= position < context
and -1 <= slot < pages * PAGE on the host, and give each slot to one token only.
"""

from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import Scaled, rms_norm_reference

WIDEST = 256  # elements of a head
NO_POSITIONS = "query_scale holds a factor for each row of table: it needs table and positions"


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
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: packed QKV -> (q, k, v). `cos=None` leaves positions out, `norm=False` the QK-norm.

    scale [T] multiplies the query of each token.
    """
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
    if scale is not None:
        q = q * scale.to(q.dtype).view(-1, 1, 1)
    return q, k, v


def cache_write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Stores k and v [T, Hk, D] at `slots` [T] (page * page_size + offset) of the caches, in place.

    The caches are seen token by token, [all slots, Hk, D]; in memory a page of one head is contiguous.
    """
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def qk_norm_rope_at_reference(
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
    query_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition by position: (q, k, v). `table=None` leaves the rotation out, and takes no `query_scale`."""
    cos, sin, scale = None, None, None
    if table is not None and positions is not None:
        cos, sin = rope_rows(*table[positions].to(rope_dtype).unbind(1))
        scale = None if query_scale is None else query_scale[positions]
    elif query_scale is not None:
        raise ValueError(NO_POSITIONS)
    return qk_norm_rope_reference(qkv, num_heads, num_kv_heads, cos, sin, norm, weight, eps, norm_first, scale)


def qk_norm_rope_cache_reference(
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
) -> Tensor:
    """The definition with the cache write: q; k and v go to `slots` of the caches in place, -1 writes nothing."""
    q, k, v = qk_norm_rope_at_reference(
        qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale
    )
    kept = slots >= 0
    keys, values = (cache.flatten(1, 2).transpose(0, 1) for cache in (k_cache, v_cache))
    cache_write_reference(k[kept], v[kept], keys, values, slots[kept])
    return q


@triton.jit
def _normalise(x1, x2, w1, w2, eps, D: tl.constexpr, HAS_WEIGHT: tl.constexpr, dtype: tl.constexpr):
    """The norm of the two halves [heads, D/2], float32 in and out, rounded where `dtype` rounds."""
    # The contractions are written out, so that every variant of the kernel gives the same bits.
    mean_square = tl.sum(tl.fma(x1, x1, x2 * x2), axis=1, keep_dims=True) / D
    scale = tl.rsqrt(mean_square + eps)
    x1 = (x1 * scale).to(dtype).to(tl.float32)
    x2 = (x2 * scale).to(dtype).to(tl.float32)
    if HAS_WEIGHT:
        x1 = (x1 * w1).to(dtype).to(tl.float32)
        x2 = (x2 * w2).to(dtype).to(tl.float32)
    return x1, x2


@triton.jit
def norm_rope(
    x1,  # a half of each head, float32
    x2,  # the other half
    w1,  # the weight of either, float32
    w2,
    cos,  # float32
    sin,
    factor,
    eps,
    D: tl.constexpr,  # elements that x1 and x2 have together
    HAS_ROPE: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    dtype: tl.constexpr,
):
    """Both halves, normalised, rotated and multiplied by the factor, in `dtype`. What is not asked for is not read."""
    if HAS_NORM and NORM_FIRST:
        x1, x2 = _normalise(x1, x2, w1, w2, eps, D, HAS_WEIGHT, dtype)
    if HAS_ROPE:
        if ROPE_ROUNDS:
            cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
            left1, left2 = (x1 * cos).to(dtype).to(tl.float32), (x2 * cos).to(dtype).to(tl.float32)
            right1, right2 = (x2 * sin).to(dtype).to(tl.float32), (x1 * sin).to(dtype).to(tl.float32)
            x1, x2 = left1 - right1, left2 + right2
        else:
            x1, x2 = tl.fma(-sin, x2, x1 * cos), tl.fma(sin, x1, x2 * cos)
        x1, x2 = x1.to(dtype).to(tl.float32), x2.to(dtype).to(tl.float32)
    if HAS_NORM and not NORM_FIRST:
        x1, x2 = _normalise(x1, x2, w1, w2, eps, D, HAS_WEIGHT, dtype)
    if HAS_SCALE:
        factor = factor.to(dtype).to(tl.float32)
        x1, x2 = x1 * factor, x2 * factor
    return x1.to(dtype), x2.to(dtype)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,  # [T, (HQ + 2 HK) * D], rows `stride_x` apart
    table_ptr,  # float32 [context, 2, D/2]
    positions_ptr,  # [T]
    weight_ptr,  # [HQ + HK, D]
    scale_ptr,  # float32 [context]
    q_ptr,  # [T, HQ, D]
    k_ptr,  # [T, HK, D], or the cache [HK, slots, D] with heads `stride_k` apart
    v_ptr,  # the cache likewise
    slots_ptr,  # [T]
    stride_x,
    stride_k,
    stride_v,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,  # in x's dtype instead of float32
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    CACHE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,  # elements of half a head, padded
):
    """One token and HEADS of its heads: of q and k, and of v where that is copied to the cache."""
    COUNT: tl.constexpr = HQ + 2 * HK if CACHE else HQ + HK
    BLOCKS: tl.constexpr = (COUNT + HEADS - 1) // HEADS
    HALF: tl.constexpr = D // 2
    program = tl.program_id(0)
    token = (program // BLOCKS).to(tl.int64)
    o_h = (program % BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
    o_d = tl.arange(0, BLOCK_H)[None, :]
    m_d = o_d < HALF
    mask = (o_h < COUNT) & m_d
    # All loads come first: those that follow a store, or a sum, would wait for it.
    if HAS_ROPE:
        position = tl.load(positions_ptr + token).to(tl.int64)
    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale_ptr + position)
    if CACHE:
        slot = tl.load(slots_ptr + token)
    o_x = o_h * D + o_d
    raw1 = tl.load(qkv_ptr + token * stride_x + o_x, mask=mask, other=0.0)
    raw2 = tl.load(qkv_ptr + token * stride_x + HALF + o_x, mask=mask, other=0.0)
    dtype: tl.constexpr = raw1.dtype
    x1, x2 = raw1.to(tl.float32), raw2.to(tl.float32)
    w1, w2, cos, sin = x1, x2, x1, x2
    if HAS_WEIGHT:
        m_w = (o_h < HQ + HK) & m_d
        w1 = tl.load(weight_ptr + o_x, mask=m_w, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + HALF + o_x, mask=m_w, other=0.0).to(tl.float32)
    if HAS_ROPE:
        # Every head reads the row in its own layout: a broadcast of one copy would go through shared memory.
        row = tl.broadcast_to(table_ptr + position * D + o_d, (HEADS, BLOCK_H))
        m_row = tl.broadcast_to(m_d, (HEADS, BLOCK_H))
        cos = tl.load(row, mask=m_row, other=0.0)
        sin = tl.load(row + HALF, mask=m_row, other=0.0)

    if HAS_SCALE:
        factor = tl.where(o_h < HQ, factor, 1.0)
    y1, y2 = norm_rope(
        x1, x2, w1, w2, cos, sin, factor, eps, D,
        HAS_ROPE, ROPE_ROUNDS, HAS_NORM, HAS_WEIGHT, NORM_FIRST, HAS_SCALE, dtype,
    )  # fmt: skip

    m_q = (o_h < HQ) & m_d
    o_q = token * (HQ * D) + o_x
    tl.store(q_ptr + o_q, y1, mask=m_q)
    tl.store(q_ptr + o_q + HALF, y2, mask=m_q)
    m_k = (o_h >= HQ) & (o_h < HQ + HK) & m_d
    if CACHE:
        m_k = m_k & (slot >= 0)
        o_k = slot * D + (o_h - HQ).to(tl.int64) * stride_k + o_d
        m_v = (o_h >= HQ + HK) & mask & (slot >= 0)
        o_v = slot * D + (o_h - (HQ + HK)).to(tl.int64) * stride_v + o_d
        tl.store(v_ptr + o_v, raw1, mask=m_v)
        tl.store(v_ptr + o_v + HALF, raw2, mask=m_v)
    else:
        o_k = token * (HK * D) + (o_h - HQ) * D + o_d
    tl.store(k_ptr + o_k, y1, mask=m_k)
    tl.store(k_ptr + o_k + HALF, y2, mask=m_k)


def qk_norm_rope(
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
    query_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel: (q, k, v), q and k contiguous, v a view of qkv (of its copy, where its columns are strided).

    float32, bfloat16 or float16, the weight like qkv; `rope_dtype` is float32 or qkv's dtype. `table=None` leaves the
    rotation out, `norm=False` the norm, `query_scale=None` the factor of q. Positions outside the table are not seen
    here: refuse them on the host.
    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    qkv = qkv if qkv.dim() != 2 or qkv.stride(1) == 1 else qkv.contiguous()
    head_dim = check(qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, query_scale)
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    k = qkv.new_empty(qkv.shape[0], num_kv_heads, head_dim)
    v = qkv.unflatten(1, (-1, head_dim))[:, num_heads + num_kv_heads :]
    _run(qkv, q, k, None, None, table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale)
    return q, k, v


def qk_norm_rope_cache(
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
) -> Tensor:
    """The kernel with the cache write: q; the rotated k and the plain v go to `slots` of the caches, in place.

    As `qk_norm_rope`. Nothing but the slots is written; a slot of -1 (a padding token of a captured batch) writes
    nothing. Slots outside the cache are not seen here: refuse them on the host.
    """
    qkv = qkv if qkv.dim() != 2 or qkv.stride(1) == 1 else qkv.contiguous()
    head_dim = check(qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, query_scale)
    check_cache(qkv, num_kv_heads, head_dim, k_cache, v_cache, slots)
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    _run(qkv, q, k_cache, v_cache, slots, table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale)
    return q


def check(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm: bool,
    weight: Tensor | None,
    query_scale: Tensor | None,
) -> int:
    """Raises what a caller's mistake deserves, of this operation or of its gradient; the head's width."""
    require(qkv, table, positions, weight, query_scale)
    count = num_heads + 2 * num_kv_heads
    if num_heads < 1 or num_kv_heads < 0:
        raise ValueError(f"there must be heads, got {num_heads} of q and {num_kv_heads} of k and v")
    if qkv.dim() != 2 or qkv.shape[1] % (2 * count):
        raise ValueError(f"qkv must be [T, {count} heads of an even width], got {list(qkv.shape)}")
    head_dim = qkv.shape[1] // count
    if not 0 < head_dim <= WIDEST:
        raise ValueError(f"heads must have 2 to {WIDEST} elements, got {head_dim}")
    if (table is None) != (positions is None):
        raise ValueError("table and positions come together, or neither does")
    if table is not None and positions is not None:
        if table.dtype != torch.float32 or table.shape[1:] != (2, head_dim // 2) or not table.is_contiguous():
            wanted = f"contiguous float32 [context, 2, {head_dim // 2}]"
            raise ValueError(f"table must be {wanted}, got {list(table.shape)} {table.dtype}")
        whole = positions.dtype in (torch.int32, torch.int64)
        if not whole or positions.shape != qkv.shape[:1] or not positions.is_contiguous():
            wanted = f"contiguous int32 or int64 [{qkv.shape[0]}]"
            raise ValueError(f"positions must be {wanted}, got {list(positions.shape)} {positions.dtype}")
        if rope_dtype not in (torch.float32, qkv.dtype):
            raise TypeError(f"rope_dtype must be torch.float32 or {qkv.dtype} like qkv, got {rope_dtype}")
    if query_scale is not None:
        if table is None:
            raise ValueError(NO_POSITIONS)
        fits = query_scale.dtype == torch.float32 and query_scale.shape == table.shape[:1]
        if not fits or not query_scale.is_contiguous():
            wanted = f"contiguous float32 [{table.shape[0]}], a factor for each row of table"
            raise ValueError(f"query_scale must be {wanted}, got {list(query_scale.shape)} {query_scale.dtype}")
    if norm and weight is not None:
        shape = (num_heads + num_kv_heads, head_dim)
        if weight.shape != shape or weight.dtype != qkv.dtype:
            wanted = f"{list(shape)} {qkv.dtype} like qkv"
            raise ValueError(f"weight must be {wanted}, got {list(weight.shape)} {weight.dtype}")
    return head_dim


def check_cache(qkv: Tensor, num_kv_heads: int, head_dim: int, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Raises what a caller's mistake deserves in the tensors that say where k and v go."""
    require(qkv, k_cache, v_cache, slots)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or (cache.shape[0], cache.shape[3], cache.dtype) != (num_kv_heads, head_dim, qkv.dtype):
            wanted = f"[{num_kv_heads}, pages, page size, {head_dim}] {qkv.dtype}"
            raise ValueError(f"{name} must be {wanted}, got {list(cache.shape)} {cache.dtype}")
        if cache.numel() and not cache[0].is_contiguous():
            raise ValueError(f"{name}: the pages of one head must be contiguous, got strides {list(cache.stride())}")
    if slots.dtype != torch.int64 or slots.shape != qkv.shape[:1] or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous int64 [{qkv.shape[0]}], got {list(slots.shape)} {slots.dtype}")


def _run(
    qkv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    slots: Tensor | None,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm: bool,
    weight: Tensor | None,
    eps: float,
    norm_first: bool,
    query_scale: Tensor | None,
) -> None:
    """Launches over checked tensors; k and v are the caches where there are slots."""
    tokens, heads, head_dim = q.shape
    if not tokens:
        return
    cache = slots is not None
    kv_heads = k.shape[0] if cache else k.shape[1]
    count = heads + (2 if cache else 1) * kv_heads
    weight = weight.contiguous() if norm and weight is not None else None
    options = tuning.config("qk_norm_rope", qkv.device, head_dim=head_dim)
    launch(
        _qk_norm_rope_kernel,
        (tokens * triton.cdiv(count, options["HEADS"]),),
        qkv,
        table if table is not None else qkv,
        positions if positions is not None else qkv,
        weight if weight is not None else qkv,
        query_scale,  # None is no parameter of the compiled code
        q,
        k,
        v if v is not None else k,
        slots if slots is not None else qkv,
        qkv.stride(0),
        k.stride(0) if cache else head_dim,
        v.stride(0) if v is not None else head_dim,
        eps,
        HQ=heads,
        HK=kv_heads,
        D=head_dim,
        HAS_ROPE=table is not None,
        ROPE_ROUNDS=table is not None and rope_dtype != torch.float32,
        HAS_NORM=norm,
        HAS_WEIGHT=weight is not None,
        NORM_FIRST=norm_first or table is None,
        HAS_SCALE=query_scale is not None,
        CACHE=cache,
        BLOCK_H=triton.next_power_of_2(head_dim // 2),
        **options,
    )


def _qk_launch(*args: Any) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(*args)[:2]


def _qk_definition(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, _ = qk_norm_rope_at_reference(*args)
    return q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)


def _cache_definition(*args: Any) -> Tensor:
    return qk_norm_rope_cache_reference(*args).clone(memory_format=torch.contiguous_format)


def fake_q(qkv: Tensor, num_heads: int, num_kv_heads: int, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads, qkv.shape[1] // (num_heads + 2 * num_kv_heads))


def _fake_qk(qkv: Tensor, num_heads: int, num_kv_heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    q = fake_q(qkv, num_heads, num_kv_heads)
    return q, q.new_empty(q.shape[0], num_kv_heads, q.shape[2])


def _gradient(*args: Any) -> tuple[Any, ...]:
    from .qk_norm_rope_backward import gradient  # which stands on this file

    return gradient(*args)


# An operation may not return its input or a view of it: v is left out, and what the definitions give is copied.
ARGUMENTS = (
    "Tensor qkv, int num_heads, int num_kv_heads, Tensor? table, Tensor? positions, ScalarType rope_dtype, bool norm, "
    "Tensor? weight, float eps, bool norm_first, Tensor? query_scale"
)
register(f"qk_norm_rope({ARGUMENTS}=None) -> (Tensor, Tensor)", _qk_launch, _qk_definition, _fake_qk, _gradient)
register(
    f"qk_norm_rope_cache({ARGUMENTS}, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
    qk_norm_rope_cache,
    _cache_definition,
    fake_q,
)
