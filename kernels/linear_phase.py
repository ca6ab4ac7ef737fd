"""The phase of a decode step that the linear layers of kernels/decode_linear.py are: device functions.

Not an operation. A program owns tiles of weight rows by rows of x, and takes each to its end over all of K. A step of
BLOCK_K columns is cut into SLICES, which are a batch of products: a warp has a slice of its own, so that few weight
rows keep all warps busy. Weight rows are the matrix instruction's left operand, rows of x its right one.
"""

from .launch import tl, triton
from .linear import _add_product, _finish
from .overlap import arrive, prefetch, start, wait
from .sampling import packed_keys


@triton.jit
def _weight_rows(weight_ptr, tile, blocks_m, N, stride_weight, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's weight rows, which of them are its own, and where they begin: [BLOCK_N] each."""
    local = tl.arange(0, BLOCK_N)
    o_n = tile // blocks_m * ROWS + local
    return o_n, (local < ROWS) & (o_n < N), weight_ptr + o_n.to(tl.int64) * stride_weight


@triton.jit
def _sliced(pointers, k, m_rows, end, EVEN: tl.constexpr, SLICES: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr):
    """[SLICES, rows, SIZE] at column k of the rows that begin at `pointers`, a slice every STEP; 0 from `end` on."""
    o_k = (tl.arange(0, SLICES) * STEP)[:, None, None] + tl.arange(0, SIZE)[None, None, :]
    mask = m_rows[None, :, None] if EVEN else m_rows[None, :, None] & (o_k < end - k)
    return tl.load(pointers[None, :, None] + (o_k + k), mask=mask, other=0)


@triton.jit
def _inverse_rms(x_rows, m_m, K, eps, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of the rows [BLOCK_M] that begin at `x_rows`: BLOCK_S running sums, then a tree."""
    o_k = tl.arange(0, BLOCK_S)
    squares = tl.zeros([BLOCK_M, BLOCK_S], dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_S, num_stages=3):
        mask = m_m[:, None] & (o_k < K - k)[None, :]
        x = tl.load(x_rows[:, None] + (o_k + k)[None, :], mask=mask, other=0.0).to(tl.float32)
        squares = tl.fma(x, x, squares)
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)


@triton.jit
def _operands(
    x_rows,
    norm_ptr,
    scale_rows,
    up_blocks,
    k,
    m_m,
    m_n,
    K,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    SLICES: tl.constexpr,
    STEP: tl.constexpr,
):
    """What a step multiplies its weights by: x [SLICES, BLOCK_M, STEP], the norm's weight, 4 bits' scales."""
    x = _sliced(x_rows, k, m_m, K, False, SLICES, STEP, STEP)
    gain, scale, up_scale = k, k, k  # whatever, where they are not used
    if HAS_NORM:
        one = tl.arange(0, 1)
        gain = _sliced(norm_ptr + one, k, one == 0, K, False, SLICES, STEP, STEP)
    if BITS == 4:
        block = k // 64
        blocks = tl.cdiv(K, 64)
        scale = _sliced(scale_rows, block, m_n, blocks, False, SLICES, 1, 1)
        if GATED:
            up_scale = _sliced(scale_rows + up_blocks, block, m_n, blocks, False, SLICES, 1, 1)
    return x, gain, scale, up_scale


@triton.jit
def _add_tile(acc, tile, low, high, scale, BITS: tl.constexpr):
    """acc + tile @ x, slice by slice; in float32 each block is summed by itself, as kernels/linear.py does."""
    if BITS == 4:
        part = tl.dot(((tile & 15).to(tl.int8) - 8).to(low.dtype), low, input_precision="ieee")
        part = tl.dot(((tile >> 4).to(tl.int8) - 8).to(low.dtype), high, part, input_precision="ieee")
        acc = tl.fma(part, tl.broadcast_to(scale.to(tl.float32), acc.shape), acc)
    else:
        acc = _add_product(acc, tile.to(low.dtype), low)
    return acc


@triton.jit
def _multiply(
    acc,
    up_acc,
    tile,
    up_tile,
    x,
    gain,
    scale,
    up_scale,
    inverse,
    HAS_NORM: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
):
    """Both sums with a step added: weight tiles [SLICES, BLOCK_N, columns] times x, normalised."""
    if HAS_NORM:
        x = (x.to(tl.float32) * inverse[None, :, None]).to(x.dtype)
        x = (x.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
    low = tl.permute(x, (0, 2, 1))
    high = low
    if BITS == 4:  # the halves of a block, which share its bytes
        halves = tl.reshape(x, [x.shape[0], x.shape[1], 2, 32])
        low, high = tl.split(tl.permute(halves, (0, 3, 1, 2)))
    acc = _add_tile(acc, tile, low, high, scale, BITS)
    if GATED:
        up_acc = _add_tile(up_acc, up_tile, low, high, up_scale, BITS)
    return acc, up_acc


@triton.jit
def _prefetch_rows(weight_ptr, rows_ptr, num_rows, stride, column, end, ROWS: tl.constexpr, LINES: tl.constexpr):
    """The cache lines of the first columns from `column` on of up to ROWS weight rows, LINES in all; of what is not
    there, the weight's first.
    """
    LINE: tl.constexpr = 128 // (rows_ptr.dtype.element_ty.primitive_bitwidth // 8)
    o_l = tl.arange(0, LINES)
    row = o_l % ROWS
    o_k = column + o_l // ROWS * LINE
    pointers = rows_ptr + row.to(tl.int64) * stride + o_k
    prefetch(tl.where((row < num_rows) & (o_k < end), pointers, weight_ptr), True)


@triton.jit
def linear_phase(
    y_ptr,  # [R, N], contiguous
    x_ptr,  # [R, K], rows `stride_x` apart
    norm_ptr,  # [K]
    weight_ptr,  # [N, K] (GATED: [2 N, K]; 4 bits: bytes), rows `stride_weight` apart
    scale_ptr,  # 8 bits: [N] float32; 4 bits: [N, cdiv(K, 64)], contiguous (GATED: 2 N)
    bias_ptr,  # [N] (GATED: [2 N])
    residual_ptr,  # [R, N], rows `stride_residual` apart; may be y_ptr
    best_ptr,  # [R] int64, `stride_best` apart
    num_rows,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    stride_best,
    limit,
    eps,
    arrivals_ptr,  # as kernels/overlap.py's `wait` takes them
    target,
    program,  # this one, of `programs`
    programs,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    BEST: tl.constexpr,
    BITS: tl.constexpr,  # of a weight: 8 and 4 come with a scale, others are x's
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,  # weight rows that a tile owns: the rest of its BLOCK_N are zero, and are not read
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # columns of x that a step takes; 4 bits: SLICES blocks
    SLICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LINES: tl.constexpr,  # of 128 bytes that are asked for ahead
    SYNC: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """The linear layer, by tiles of ROWS weight rows and BLOCK_M rows of x; those of the same weight rows adjoin."""
    STEP: tl.constexpr = BLOCK_K // SLICES
    SIZE: tl.constexpr = 32 if BITS == 4 else STEP  # elements of a weight row in a slice: of 4 bits, bytes
    start(SYNC)
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    end = tl.cdiv(K, 64) * 32 if BITS == 4 else K  # of a weight row
    up = tl.cast(N, tl.int64) * stride_weight
    up_blocks = tl.cast(N, tl.int64) * tl.cdiv(K, 64)
    _, m_n, rows = _weight_rows(weight_ptr, program, blocks_m, N, stride_weight, ROWS, BLOCK_N)
    tile = _sliced(rows, 0, m_n, end, EVEN_K, SLICES, SIZE, SIZE)
    up_tile = _sliced(rows + up, 0, m_n, end, EVEN_K, SLICES, SIZE, SIZE) if GATED else tile
    if PREFETCH:
        row = program // blocks_m * ROWS
        rows_ptr = weight_ptr + tl.cast(row, tl.int64) * stride_weight
        _prefetch_rows(weight_ptr, rows_ptr, N - row, stride_weight, SLICES * SIZE, end, ROWS, LINES)
        if GATED:
            _prefetch_rows(weight_ptr, rows_ptr + up, N - row, stride_weight, SLICES * SIZE, end, ROWS, LINES)
    wait(arrivals_ptr, target, SYNC)

    inverse = tl.zeros([BLOCK_M], dtype=tl.float32)
    normed = -1  # the block of rows that `inverse` is of
    for index in range(program, tl.cdiv(N, ROWS) * blocks_m, programs):
        o_n, m_n, rows = _weight_rows(weight_ptr, index, blocks_m, N, stride_weight, ROWS, BLOCK_N)
        block_m = index % blocks_m
        o_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < num_rows
        x_rows = x_ptr + o_m.to(tl.int64) * stride_x
        scale_rows = scale_ptr + o_n.to(tl.int64) * tl.cdiv(K, 64) if BITS == 4 else scale_ptr + o_n
        x, gain, scale, up_scale = _operands(
            x_rows, norm_ptr, scale_rows, up_blocks, 0, m_m, m_n, K, HAS_NORM, GATED, BITS, SLICES, STEP
        )
        if HAS_NORM and block_m != normed:
            inverse = _inverse_rms(x_rows, m_m, K, eps, BLOCK_M, BLOCK_S)
            normed = block_m
        # What a step multiplies by is small, and stays in registers: it is loaded a step before it is needed.
        next_x, next_gain, next_scale, next_up_scale = _operands(
            x_rows, norm_ptr, scale_rows, up_blocks, BLOCK_K, m_m, m_n, K, HAS_NORM, GATED, BITS, SLICES, STEP
        )
        acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], dtype=tl.float32)
        acc, up_acc = _multiply(acc, acc, tile, up_tile, x, gain, scale, up_scale, inverse, HAS_NORM, GATED, BITS)
        for k in range(BLOCK_K, K, BLOCK_K):
            x, gain, scale, up_scale = next_x, next_gain, next_scale, next_up_scale
            next_x, next_gain, next_scale, next_up_scale = _operands(
                x_rows, norm_ptr, scale_rows, up_blocks, k + BLOCK_K, m_m, m_n, K, HAS_NORM, GATED, BITS, SLICES, STEP
            )
            column = k // STEP * SIZE
            tile = _sliced(rows, column, m_n, end, EVEN_K, SLICES, SIZE, SIZE)
            up_tile = _sliced(rows + up, column, m_n, end, EVEN_K, SLICES, SIZE, SIZE) if GATED else tile
            acc, up_acc = _multiply(
                acc, up_acc, tile, up_tile, x, gain, scale, up_scale, inverse, HAS_NORM, GATED, BITS
            )

        # The next tile's first columns are on their way before this one is finished.
        _, m_next, rows = _weight_rows(weight_ptr, index + programs, blocks_m, N, stride_weight, ROWS, BLOCK_N)
        tile = _sliced(rows, 0, m_next, end, EVEN_K, SLICES, SIZE, SIZE)
        up_tile = _sliced(rows + up, 0, m_next, end, EVEN_K, SLICES, SIZE, SIZE) if GATED else tile
        y = tl.sum(acc, axis=0)
        y_up = tl.sum(up_acc, axis=0)
        if BITS == 8:
            # Rounded here, by name: whether a product and the sum behind it become one would be the layout's to say.
            none = tl.zeros(y.shape, dtype=tl.float32)
            y = tl.fma(y, none + tl.load(scale_rows, mask=m_n, other=0.0)[:, None], none)
            if GATED:
                y_up = tl.fma(y_up, none + tl.load(scale_rows + N, mask=m_n, other=0.0)[:, None], none)
        if HAS_BIAS:
            y += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
            if GATED:
                y_up += tl.load(bias_ptr + N + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        dtype = y_ptr.dtype.element_ty
        if GATED:
            gate = y.to(dtype).to(tl.float32)
            activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            y = activated * y_up.to(dtype).to(tl.float32)
        if BEST:
            y = tl.where((o_n < limit)[:, None], y, float("-inf"))
            packed = packed_keys(y.to(dtype), o_n[:, None], dtype.primitive_bitwidth)
            best = tl.max(tl.where(m_n[:, None], packed, 0), axis=0)
            tl.atomic_max(best_ptr + o_m * stride_best, best, mask=m_m, sem="relaxed")
        _finish(y, o_m, o_n, m_n, y_ptr, residual_ptr, num_rows, N, stride_residual, HAS_RESIDUAL)
    arrive(arrivals_ptr, SYNC)
