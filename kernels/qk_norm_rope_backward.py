"""The gradient of QK-norm and rotary position embedding.

Of qkv and of the QK-norm's weight, given those of q and k, from the inputs of the forward pass alone. For every token t
and every head h of q and k, with x = qkv[t, h], R the rotation by t and R^T its transpose, f the factor of q (1 for k),
s(x) = 1 / sqrt(mean(x^2) + eps), n = x s(x) and g = dy * weight (the chain rule on the formulas of qk_norm_rope.py):

    norm'(x, dy) = s (g - n mean(g n)),   dweight_h = sum over t of dy * n

    q, k = f R(norm(x)):   dx = norm'(x, R^T(f dout));         q, k = f norm(R(x)):   dx = R^T(norm'(R(x), f dout))

    R^T(y) = (y1 * cos_t + y2 * sin_t,  y2 * cos_t - y1 * sin_t)

v's part of dqkv is zero here: v is a view that is taken of qkv, and its gradient is added by whoever takes it. The
table and the factors are constants of a model: they have no gradient.

Shapes: as in qk_norm_rope.py; dq [T, Hq, D] and dk [T, Hk, D], dqkv [T, (Hq + 2 Hk) * D], dweight [Hq + Hk, D].
Rounding: in float32 (float64 stays), statistics computed anew; dqkv and dweight round once. cos, sin and f are what the
forward pass multiplied by, rounded where it rounds them; no other rounding of the forward pass is repeated, as a
rounding has no derivative. dweight is summed token by token in blocks of SPAN tokens (by table), the blocks by a fixed
tree: no atomics, and its bits depend on no number of programs.
Floor: (3 * numel(q, k) + numel(v)) * itemsize bytes (read dq, dk and their part of qkv, write dqkv; without a norm qkv
is not read, numel(q, k) less); about 20 operations an element.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .qk_norm_rope import ARGUMENTS, NO_POSITIONS, check, rope_rows, rotate_reference
from .rms_norm import add_partials, rms_norm_backward_reference, rows_of, wide, wide_dtype


def qk_norm_rope_backward_reference(
    dq: Tensor,
    dk: Tensor,
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
    wants_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The definition: dqkv, and dweight, empty, [0], where there is no weight or its gradient is not wanted."""
    rotated = num_heads + num_kv_heads
    x = wide(qkv.unflatten(1, (rotated + num_kv_heads, -1)))
    cos, sin, dq = None, None, wide(dq)
    if table is not None and positions is not None:
        rows = table[positions].to(rope_dtype).to(wide_dtype(qkv.dtype))
        cos, sin = rope_rows(*rows.unbind(1))
        if query_scale is not None:
            dq = dq * query_scale[positions].to(qkv.dtype).view(-1, 1, 1)
    elif query_scale is not None:
        raise ValueError(NO_POSITIONS)
    dy, dweight = torch.cat((dq, wide(dk)), 1), qkv.new_empty(0)
    qk = x[:, :rotated]
    if cos is not None and sin is not None and norm and not norm_first:
        qk = rotate_reference(qk, cos, sin)
    elif cos is not None and sin is not None:
        dy = rotate_reference(dy, cos, -sin)
    if norm:
        dy, found = rms_norm_backward_reference(dy, qk, weight, eps, wants_weight)
        dweight = found if found.numel() else dweight
    if cos is not None and sin is not None and norm and not norm_first:
        dy = rotate_reference(dy, cos, -sin)
    return torch.cat((dy, torch.zeros_like(x[:, rotated:])), 1).to(qkv.dtype).flatten(1), dweight


@triton.jit
def _turn(x1, x2, cos, sin):
    """The rotation of the two halves; with -sin, its gradient."""
    # Contractions are written out, here and below, so that every variant of the kernel gives the same bits.
    return tl.fma(-sin, x2, x1 * cos), tl.fma(sin, x1, x2 * cos)


@triton.jit(do_not_specialize=["num_tokens"])
def _qk_norm_rope_backward_kernel(
    dq_ptr,  # [T, HQ, D], tokens `stride_q` apart
    dk_ptr,  # [T, HK, D], tokens `stride_k` apart
    qkv_ptr,  # [T, (HQ + 2 HK) * D], rows `stride_x` apart
    table_ptr,  # float32 [context, 2, D/2]
    positions_ptr,  # [T]
    weight_ptr,  # [HQ + HK, D]
    scale_ptr,  # float32 [context]
    dqkv_ptr,  # [T, (HQ + 2 HK) * D], contiguous
    partials_ptr,  # [cdiv(T, SPAN), HQ + HK, D] float32
    num_tokens,
    stride_q,
    stride_k,
    stride_x,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,  # cos and sin, to x's dtype
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    SPAN: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,  # elements of half a head, padded
):
    """SPAN tokens, one after another, and HEADS of their heads; those of v are written as zeros."""
    COUNT: tl.constexpr = HQ + 2 * HK
    BLOCKS: tl.constexpr = (COUNT + HEADS - 1) // HEADS
    HALF: tl.constexpr = D // 2
    dtype: tl.constexpr = dqkv_ptr.dtype.element_ty
    program = tl.program_id(0)
    span = (program // BLOCKS).to(tl.int64)
    token = span * SPAN
    o_h = (program % BLOCKS) * HEADS + tl.arange(0, HEADS)[:, None]
    o_d = tl.arange(0, BLOCK_H)[None, :]
    o_x = o_h * D + o_d
    m_d = o_d < HALF
    m_q = (o_h < HQ) & m_d
    m_k = (o_h >= HQ) & (o_h < HQ + HK) & m_d
    m_x = (o_h < HQ + HK) & m_d
    m_out = (o_h < COUNT) & m_d
    if HAS_WEIGHT:
        w1 = tl.load(weight_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
        w2 = tl.load(weight_ptr + HALF + o_x, mask=m_x, other=0.0).to(tl.float32)
    total1 = tl.zeros([HEADS, BLOCK_H], dtype=tl.float32)
    total2 = tl.zeros([HEADS, BLOCK_H], dtype=tl.float32)
    for _ in range(0, tl.minimum(num_tokens - token, SPAN).to(tl.int32)):
        if HAS_ROPE:
            position = tl.load(positions_ptr + token).to(tl.int64)
        if HAS_NORM:
            x1 = tl.load(qkv_ptr + token * stride_x + o_x, mask=m_x, other=0.0).to(tl.float32)
            x2 = tl.load(qkv_ptr + token * stride_x + HALF + o_x, mask=m_x, other=0.0).to(tl.float32)
        # A head is of q or of k: one of the two is masked, hence 0, and the sum exact.
        o_k = token * stride_k + (o_x - HQ * D)
        dq1 = tl.load(dq_ptr + token * stride_q + o_x, mask=m_q, other=0.0).to(tl.float32)
        dq2 = tl.load(dq_ptr + token * stride_q + HALF + o_x, mask=m_q, other=0.0).to(tl.float32)
        dk1 = tl.load(dk_ptr + o_k, mask=m_k, other=0.0).to(tl.float32)
        dk2 = tl.load(dk_ptr + HALF + o_k, mask=m_k, other=0.0).to(tl.float32)
        if HAS_SCALE:
            factor = tl.load(scale_ptr + position).to(dtype).to(tl.float32)
            dq1, dq2 = dq1 * factor, dq2 * factor
        g1, g2 = dq1 + dk1, dq2 + dk2
        if HAS_ROPE:
            # Every head reads the row in its own layout: a broadcast of one copy would go through shared memory.
            row = tl.broadcast_to(table_ptr + position * D + o_d, (HEADS, BLOCK_H))
            m_row = tl.broadcast_to(m_d, (HEADS, BLOCK_H))
            cos = tl.load(row, mask=m_row, other=0.0)
            sin = tl.load(row + HALF, mask=m_row, other=0.0)
            if ROPE_ROUNDS:
                cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
            if HAS_NORM and not NORM_FIRST:
                x1, x2 = _turn(x1, x2, cos, sin)
            else:
                g1, g2 = _turn(g1, g2, cos, -sin)
        if HAS_NORM:
            mean_square = tl.sum(tl.fma(x1, x1, x2 * x2), axis=1, keep_dims=True) / D
            # v's heads are read as 0: with an eps of 0 their scale would be infinite, and their gradient NaN.
            scale = tl.where(o_h < HQ + HK, tl.rsqrt(mean_square + eps), 0.0)
            n1, n2 = x1 * scale, x2 * scale
            if WANTS_WEIGHT:
                total1 = tl.fma(g1, n1, total1)
                total2 = tl.fma(g2, n2, total2)
            if HAS_WEIGHT:
                g1, g2 = g1 * w1, g2 * w2
            mean_product = tl.sum(tl.fma(g1, n1, g2 * n2), axis=1, keep_dims=True) / D
            g1, g2 = scale * tl.fma(-n1, mean_product, g1), scale * tl.fma(-n2, mean_product, g2)
            if HAS_ROPE and not NORM_FIRST:
                g1, g2 = _turn(g1, g2, cos, -sin)
        o_out = token * (COUNT * D) + o_x
        tl.store(dqkv_ptr + o_out, g1.to(dtype), mask=m_out)
        tl.store(dqkv_ptr + o_out + HALF, g2.to(dtype), mask=m_out)
        token += 1
    if WANTS_WEIGHT:
        o_p = span * ((HQ + HK) * D) + o_x
        tl.store(partials_ptr + o_p, total1, mask=m_x)
        tl.store(partials_ptr + o_p + HALF, total2, mask=m_x)


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
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
    wants_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """The kernels: dqkv, contiguous, zero in v's part, and dweight like the weight, [0] where it is not wanted.

    dq [T, Hq, D] and dk [T, Hk, D] in qkv's dtype, their tokens strided or not; the rest as given to `qk_norm_rope`.
    Nothing that is given is overwritten. Raises what `qk_norm_rope` raises.
    """
    qkv = qkv if qkv.dim() != 2 or qkv.stride(1) == 1 else qkv.contiguous()
    head_dim = check(qkv, num_heads, num_kv_heads, table, positions, rope_dtype, norm, weight, query_scale)
    require(qkv, dq, dk)
    tokens, rotated = qkv.shape[0], num_heads + num_kv_heads
    for name, like, heads in (("dq", dq, num_heads), ("dk", dk, num_kv_heads)):
        if like.shape != (tokens, heads, head_dim) or like.dtype != qkv.dtype:
            wanted = f"{[tokens, heads, head_dim]} {qkv.dtype}"
            raise ValueError(f"{name} must be {wanted}, got {list(like.shape)} {like.dtype}")
    weighted = norm and weight is not None
    summed = weighted and wants_weight
    dqkv = qkv.new_empty(qkv.shape)
    dweight = qkv.new_empty((rotated, head_dim) if summed else (0,))
    if not tokens:
        return dqkv, dweight.zero_()
    dq = rows_of(dq.flatten(1))
    dk = rows_of(dk.flatten(1)) if num_kv_heads else dq  # which nothing reads
    options = dict(tuning.config("qk_norm_rope_backward", qkv.device, head_dim=head_dim))
    span = options.pop("SPAN")
    span = span if summed else 1  # nothing is summed over tokens: each may have its own program
    spans = triton.cdiv(tokens, span)
    partials = qkv.new_empty((1, spans, rotated * head_dim), dtype=torch.float32) if summed else None
    launch(
        _qk_norm_rope_backward_kernel,
        (spans * triton.cdiv(rotated + num_kv_heads, options["HEADS"]),),
        dq,
        dk,
        qkv,
        table if table is not None else qkv,
        positions if positions is not None else qkv,
        weight.contiguous() if weighted and weight is not None else qkv,
        query_scale,  # None is no parameter of the compiled code
        dqkv,
        partials if partials is not None else dqkv,
        tokens,
        *(dq.stride(0), dk.stride(0), qkv.stride(0)),
        eps,
        HQ=num_heads,
        HK=num_kv_heads,
        D=head_dim,
        HAS_ROPE=table is not None,
        ROPE_ROUNDS=table is not None and rope_dtype != torch.float32,
        HAS_NORM=norm,
        HAS_WEIGHT=weighted,
        NORM_FIRST=norm_first or table is None,
        HAS_SCALE=query_scale is not None,
        WANTS_WEIGHT=summed,
        SPAN=span,
        BLOCK_H=triton.next_power_of_2(head_dim // 2),
        **options,
    )
    if partials is not None:
        add_partials(partials, dweight)
    return dqkv, dweight


def gradient(
    inputs: Sequence[Any], needed: Sequence[bool], dq: Tensor | None, dk: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Of each of qk_norm_rope's inputs: of qkv and of the weight, where they are needed.

    Raises RuntimeError where the table or the factors want one.
    """
    qkv, heads, kv_heads, table, positions, rope_dtype, norm, weight, eps, first, *scale = inputs
    query_scale = scale[0] if scale else None
    for name, index in (("table", 3), ("query_scale", 10)):
        if any(needed[index : index + 1]):  # of arguments left out nothing is said
            raise RuntimeError(f"qk_norm_rope gives no gradient of {name}, a constant of the model: detach it")
    given: list[Tensor | None] = [None] * len(inputs)
    if dq is None and dk is None:
        return tuple(given)
    head_dim = qkv.shape[1] // (heads + 2 * kv_heads)
    dq = qkv.new_zeros(qkv.shape[0], heads, head_dim) if dq is None else dq
    dk = qkv.new_zeros(qkv.shape[0], kv_heads, head_dim) if dk is None else dk
    wants_weight = bool(norm and needed[7])
    rest = (table, positions, rope_dtype, norm, weight, eps, first, query_scale, wants_weight)
    dqkv, dweight = torch.ops.tritium.qk_norm_rope_backward(dq, dk, qkv, heads, kv_heads, *rest)
    given[0] = dqkv if needed[0] else None
    given[7] = dweight if wants_weight else None
    return tuple(given)


def _fake(dq: Tensor, dk: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    norm, weight, wants_weight = rest[5], rest[6], rest[10]
    summed = norm and weight is not None and wants_weight
    return qkv.new_empty(qkv.shape), qkv.new_empty((dq.shape[1] + dk.shape[1], dq.shape[2]) if summed else (0,))


register(
    f"qk_norm_rope_backward(Tensor dq, Tensor dk, {ARGUMENTS}, bool wants_weight) -> (Tensor, Tensor)",
    qk_norm_rope_backward,
    qk_norm_rope_backward_reference,
    _fake,
)
