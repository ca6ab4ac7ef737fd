"""The kernel of kernels/decode_step.py: the phases of a decode step one after another, a barrier between two.

Not an operation. Every program runs through all of this; what a phase reads of the one before it reads behind `wait`,
which counts the programs that have arrived: phase n, from 0, may begin when n * programs have.
"""

from .launch import tl, triton
from .linear_phase import linear_phase
from .overlap import GRID, arrive
from .rope_decode_attention import rope_decode_attention_phase
from .step_tables import (
    ATTENTION_NORM,
    COLUMNS,
    DOWN,
    KEYS,
    MLP_NORM,
    OUT,
    QK_NORM,
    QKV,
    ROTATES,
    UP,
    VALUES,
    WINDOW,
)


@triton.jit
def embedding_phase(
    x_ptr,
    embedding_ptr,
    tokens_ptr,
    rows,
    E,
    arrivals_ptr,
    program,
    programs,
    BLOCK_E: tl.constexpr,
    SYNC: tl.constexpr,
):
    """The first phase, which waits for nothing: the tokens' rows of the embedding, copied."""
    for tile in range(program, rows * tl.cdiv(E, BLOCK_E), programs):
        row = tl.cast(tile % rows, tl.int64)
        o_e = tile // rows * BLOCK_E + tl.arange(0, BLOCK_E)
        token = tl.load(tokens_ptr + row)
        tl.store(x_ptr + row * E + o_e, tl.load(embedding_ptr + token * E + o_e, mask=o_e < E), mask=o_e < E)
    arrive(arrivals_ptr, SYNC)


@triton.jit
def _pointer(layer_ptr, COLUMN: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(layer_ptr + COLUMN).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _weight(layer_ptr, FIRST: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """The projection's weight and scale, each of the type that its bits have."""
    if BITS == 8:
        return _pointer(layer_ptr, FIRST, tl.int8), _pointer(layer_ptr, FIRST + 2, tl.float32)
    elif BITS == 4:
        return _pointer(layer_ptr, FIRST, tl.uint8), _pointer(layer_ptr, FIRST + 2, dtype)
    else:
        weight_ptr = _pointer(layer_ptr, FIRST, dtype)
        return weight_ptr, weight_ptr


@triton.jit
def _stride(K, BITS: tl.constexpr):
    """Elements of a weight row."""
    return tl.cdiv(K, 64) * 32 if BITS == 4 else K


@triton.jit
def _project(
    y_ptr,
    x_ptr,
    layer_ptr,  # this layer's row of the table
    rows,
    N,
    K,
    eps,
    arrivals_ptr,
    target,
    FIRST: tl.constexpr,  # the projection's first column
    NORM: tl.constexpr,  # the norm's; -1: none, and y is added to
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """One projection of a layer."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    HAS_NORM: tl.constexpr = NORM >= 0
    norm_ptr = _pointer(layer_ptr, NORM, dtype) if HAS_NORM else x_ptr
    bias_ptr = _pointer(layer_ptr, FIRST + 1, dtype) if HAS_BIAS else y_ptr
    weight_ptr, scale_ptr = _weight(layer_ptr, FIRST, BITS, dtype)
    linear_phase(
        y_ptr, x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, arrivals_ptr,
        rows, N, K, K, _stride(K, BITS), N, 0, 0, eps, arrivals_ptr, target,
        tl.program_id(0), tl.num_programs(0),
        HAS_NORM=HAS_NORM, HAS_BIAS=HAS_BIAS, HAS_RESIDUAL=not HAS_NORM, GATED=FIRST == UP, BEST=False, BITS=BITS,
        EVEN_K=TILE[0], ROWS=TILE[1], BLOCK_N=TILE[2], BLOCK_M=TILE[3], BLOCK_K=TILE[4], SLICES=TILE[5],
        BLOCK_S=TILE[6], LINES=TILE[7], SYNC=GRID, PREFETCH=PREFETCH,
    )  # fmt: skip


@triton.jit
def _attend(
    layer_ptr,
    qkv_ptr,
    table_ptr,
    positions_ptr,
    factor_ptr,
    slots_ptr,
    pages_ptr,
    lengths_ptr,
    out_ptr,
    partial_ptr,
    state_ptr,
    counts_ptr,
    arrivals_ptr,
    target,
    rows,
    splits,
    max_pages,
    stride_x,
    stride_head,
    stride_pages,
    eps,
    scale,
    HAS_ROPE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,
    HEADS: tl.constexpr,  # (HQ, HK, D, PAGE)
    BLOCKS: tl.constexpr,  # (BLOCK_G, BLOCK_D, BLOCK_N, MERGED_G, BLOCK_S)
    PREFETCH: tl.constexpr,
):
    """The attention of a layer, of one of the two kinds."""
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    weight_ptr = _pointer(layer_ptr, QK_NORM, dtype) if HAS_WEIGHT and HAS_NORM else qkv_ptr
    window = tl.load(layer_ptr + WINDOW).to(tl.int32) if HAS_WINDOW else 0
    rope_decode_attention_phase(
        tl.program_id(0), tl.num_programs(0),
        qkv_ptr, table_ptr, positions_ptr, weight_ptr, factor_ptr,
        _pointer(layer_ptr, KEYS, dtype), _pointer(layer_ptr, VALUES, dtype),
        slots_ptr, pages_ptr, lengths_ptr, out_ptr, partial_ptr, state_ptr, counts_ptr, arrivals_ptr, target,
        rows, splits, max_pages, stride_x, stride_head, stride_pages, eps, window,
        scale,
        HQ=HEADS[0], HK=HEADS[1], D=HEADS[2], PAGE=HEADS[3],
        HAS_ROPE=HAS_ROPE, ROPE_ROUNDS=HAS_ROPE and ROPE_ROUNDS,
        HAS_NORM=HAS_NORM, HAS_WEIGHT=HAS_WEIGHT and HAS_NORM, NORM_FIRST=NORM_FIRST or not HAS_ROPE,
        HAS_SCALE=HAS_SCALE and HAS_ROPE, HAS_WINDOW=HAS_WINDOW,
        BLOCK_G=BLOCKS[0], BLOCK_D=BLOCKS[1], BLOCK_N=BLOCKS[2], MERGED_G=BLOCKS[3], BLOCK_S=BLOCKS[4],
        SYNC=GRID, PREFETCH=PREFETCH,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "layers", "splits", "max_pages", "stride_pages", "stride_best", "limit"])
def decode_step_kernel(
    embedding_ptr,  # [V, E]
    tokens_ptr,  # [R]
    pointers_ptr,  # [layers, COLUMNS] int64
    norm_ptr,
    head_ptr,
    head_scale_ptr,
    table_ptr,
    positions_ptr,
    factor_ptr,
    slots_ptr,
    pages_ptr,
    lengths_ptr,
    logits_ptr,  # [R, V]
    best_ptr,  # [R], zeroed
    stream_ptr,
    qkv_ptr,
    attended_ptr,
    hidden_ptr,
    partial_ptr,
    state_ptr,
    counts_ptr,
    arrivals_ptr,  # zeroed
    rows,
    layers,
    E,
    F,
    V,
    splits,
    max_pages,
    stride_head,
    stride_pages,
    stride_best,
    limit,
    eps,
    scale,
    HAS_QKV_BIAS: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_DOWN_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    HEAD_BITS: tl.constexpr,
    KINDS: tl.constexpr,  # of attention in the model: 1 rotates, 2 does not, 3 both are there
    NORM_ROTATED: tl.constexpr,
    NORM_PLAIN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    ROPE_ROUNDS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    QKV_TILE: tl.constexpr,  # what `linear_phase` takes from EVEN_K to LINES
    OUT_TILE: tl.constexpr,
    UP_TILE: tl.constexpr,
    DOWN_TILE: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    programs = tl.num_programs(0)
    A: tl.constexpr = HEADS[0] * HEADS[2]
    P: tl.constexpr = A + 2 * HEADS[1] * HEADS[2]
    embedding_phase(
        stream_ptr, embedding_ptr, tokens_ptr, rows, E, arrivals_ptr, tl.program_id(0), programs, BLOCK_E, GRID
    )
    target = programs  # arrivals when all programs have ended the phases so far
    # What all phases could compute of their sizes once, before the loop, would fill the registers throughout.
    for layer in tl.range(0, layers, disable_licm=True):
        layer_ptr = pointers_ptr + layer * COLUMNS
        _project(
            qkv_ptr, stream_ptr, layer_ptr, rows, P, E, eps, arrivals_ptr, target,
            QKV, ATTENTION_NORM, HAS_QKV_BIAS, BITS, QKV_TILE, PREFETCH,
        )  # fmt: skip
        rotates = tl.load(layer_ptr + ROTATES) != 0 if KINDS == 3 else KINDS == 1
        if rotates:
            _attend(
                layer_ptr, qkv_ptr, table_ptr, positions_ptr, factor_ptr, slots_ptr, pages_ptr, lengths_ptr,
                attended_ptr, partial_ptr, state_ptr, counts_ptr, arrivals_ptr, target + programs,
                rows, splits, max_pages, P, stride_head, stride_pages, eps, scale,
                True, NORM_ROTATED, HAS_SCALE, HAS_WEIGHT, HAS_WINDOW, NORM_FIRST, ROPE_ROUNDS,
                HEADS, BLOCKS, PREFETCH,
            )  # fmt: skip
        else:
            _attend(
                layer_ptr, qkv_ptr, table_ptr, positions_ptr, factor_ptr, slots_ptr, pages_ptr, lengths_ptr,
                attended_ptr, partial_ptr, state_ptr, counts_ptr, arrivals_ptr, target + programs,
                rows, splits, max_pages, P, stride_head, stride_pages, eps, scale,
                False, NORM_PLAIN, HAS_SCALE, HAS_WEIGHT, HAS_WINDOW, NORM_FIRST, ROPE_ROUNDS,
                HEADS, BLOCKS, PREFETCH,
            )  # fmt: skip
        _project(
            stream_ptr, attended_ptr, layer_ptr, rows, E, A, eps, arrivals_ptr, target + 2 * programs,
            OUT, -1, HAS_OUT_BIAS, BITS, OUT_TILE, PREFETCH,
        )  # fmt: skip
        _project(
            hidden_ptr, stream_ptr, layer_ptr, rows, F, E, eps, arrivals_ptr, target + 3 * programs,
            UP, MLP_NORM, HAS_UP_BIAS, BITS, UP_TILE, PREFETCH,
        )  # fmt: skip
        _project(
            stream_ptr, hidden_ptr, layer_ptr, rows, E, F, eps, arrivals_ptr, target + 4 * programs,
            DOWN, -1, HAS_DOWN_BIAS, BITS, DOWN_TILE, PREFETCH,
        )  # fmt: skip
        target += 5 * programs
    linear_phase(
        logits_ptr, stream_ptr, norm_ptr, head_ptr, head_scale_ptr, logits_ptr, logits_ptr, best_ptr,
        rows, V, E, E, _stride(E, HEAD_BITS), V, stride_best, limit, eps, arrivals_ptr, target,
        tl.program_id(0), programs,
        HAS_NORM=True, HAS_BIAS=False, HAS_RESIDUAL=False, GATED=False, BEST=True, BITS=HEAD_BITS,
        EVEN_K=HEAD_TILE[0], ROWS=HEAD_TILE[1], BLOCK_N=HEAD_TILE[2], BLOCK_M=HEAD_TILE[3], BLOCK_K=HEAD_TILE[4],
        SLICES=HEAD_TILE[5], BLOCK_S=HEAD_TILE[6], LINES=HEAD_TILE[7], SYNC=GRID, PREFETCH=PREFETCH,
    )  # fmt: skip
