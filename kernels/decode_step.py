"""A whole decode step of a dense, gated model in one launch: token ids to logits.

    x = embedding[tokens]
    for each layer:
        qkv = norm_linear(x)                        (decode_linear.py)
        a   = rope_decode_attention(qkv)            (rope_decode_attention.py)
        x   = x + linear(a)                         (decode_linear_residual)
        h   = norm_linear_swiglu(x)
        x   = x + linear(h)
    logits, best = norm_head(x)

One program a multiprocessor runs through all phases, whose tiles they share, and between two of them waits until all
programs have ended the first: a counter in memory (kernels/overlap.py's GRID), which is why all must be on the GPU at
one time, and are launched so. While it waits it asks for the weights that it needs next, so the memory is not idle
where a launch would end. Pointers of weights and caches come from a table, a row a layer (`step_tables`).

Shapes: embedding [V, E], tokens [R] int64; of each layer the weights of decode_linear.py, qkv [(Hq + 2 Hk) D, E], out
[E, Hq D], up [2 F, E], down [E, F], the norms' [E]; caches, slots, page_table, lengths, positions and table as in
rope_decode_attention.py; logits [R, V], best [R] int64.
Layers are alike but for what they hold, for their windows, and for two kinds of attention: those that rotate, and those
that do not, each kind with or without the norm of q and k.
Rounding: that of the phases; the embedding is copied.
Floor: the bytes of every weight once, and those of the rows' keys and values: sums of the phases' floors, one launch.

A row's bits do not depend on how many rows or programs there are: its phases' tiles do not. They need not be those of
the phases launched one by one, whose reductions may be spread over another number of warps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .decode_attention import check as check_attention
from .decode_attention import most_splits
from .decode_linear import (
    decode_linear_residual_reference,
    launch_row,
    norm_head_reference,
    norm_linear_reference,
    norm_linear_swiglu_reference,
)
from .launch import INTERPRETED, launch, register, require, triton
from .qk_norm_rope import check as check_rope
from .qk_norm_rope import check_cache
from .rope_decode_attention import launch_row as attention_row
from .rope_decode_attention import rope_decode_attention_reference
from .step_kernel import decode_step_kernel
from .step_tables import StepLayers, StepScratch, StepTables, Tensors, check_layers, step_scratch, step_tables


def decode_step_reference(
    embedding: Tensor,
    tokens: Tensor,
    layers: StepLayers,
    norm: Tensor,
    head: Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm_first: bool,
    query_scale: Tensor | None,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    longest: int | None = None,
    limit: int | None = None,
    head_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: the phases' definitions, one after another. (logits [R, V], best [R]); caches are written."""

    def of(tensors: Tensors | None) -> Tensor | None:
        return None if tensors is None else tensors[layer]

    x = F.embedding(tokens, embedding)
    for layer, rotates in enumerate(layers.rotates):
        qkv = norm_linear_reference(
            x, layers.attention_norms[layer], eps, layers.qkv_weights[layer], of(layers.qkv_biases),
            of(layers.qkv_scales),
        )  # fmt: skip
        attended = rope_decode_attention_reference(
            qkv, num_heads, num_kv_heads, table if rotates else None, positions if rotates else None, rope_dtype,
            layers.qk_norms[layer], of(layers.qk_norm_weights), eps, norm_first, query_scale if rotates else None,
            layers.k_caches[layer], layers.v_caches[layer], slots, page_table, lengths, scale,
            layers.windows[layer] or None, longest,
        ).flatten(1)  # fmt: skip
        x = decode_linear_residual_reference(
            attended, layers.out_weights[layer], of(layers.out_biases), x, of(layers.out_scales)
        )
        hidden = norm_linear_swiglu_reference(
            x, layers.mlp_norms[layer], eps, layers.up_weights[layer], of(layers.up_biases), of(layers.up_scales)
        )
        x = decode_linear_residual_reference(
            hidden, layers.down_weights[layer], of(layers.down_biases), x, of(layers.down_scales)
        )
    return norm_head_reference(x, norm, eps, head, head_scale, limit)


@functools.cache
def _multiprocessors(index: int) -> int:
    count: int = torch.cuda.get_device_properties(index).multi_processor_count
    return count


def _all_at_once(device: torch.device, a_multiprocessor: int) -> int:
    """How many programs a launch has: as many as the device runs at one time."""
    if INTERPRETED or device.type != "cuda":  # the interpreter runs one after another: a second would wait for ever
        return 1
    index = torch.cuda.current_device() if device.index is None else device.index
    return a_multiprocessor * _multiprocessors(index)


def decode_step(
    embedding: Tensor,
    tokens: Tensor,
    layers: StepLayers,
    norm: Tensor,
    head: Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    rope_dtype: torch.dtype,
    norm_first: bool,
    query_scale: Tensor | None,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    longest: int | None = None,
    limit: int | None = None,
    head_scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
    best: Tensor | None = None,
    tables: StepTables | None = None,
    scratch: StepScratch | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel: logits [R, V] in `out` and packed keys [R] in `best` where those are given (as `norm_head` takes
    them: `best` zeroed). The caches are written in place.

    With `tables` of `step_tables(layers)` and `scratch` of `step_scratch`, and with out and best, nothing is allocated.
    `programs` must be able to run at one time; without it there is one a multiprocessor, or what the table says. What
    `longest` bounds, and what must not be written by the launch in front, is as in kernels/rope_decode_attention.py.
    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    require(embedding, tokens, norm, head, head_scale, slots, page_table, lengths, out, best)
    if embedding.dim() != 2 or tokens.shape != slots.shape or tokens.dtype != torch.int64 or not tokens.is_contiguous():
        raise ValueError(
            f"embedding must be [V, E] and tokens contiguous int64 [R] like slots, got {list(embedding.shape)}, "
            f"{list(tokens.shape)} {tokens.dtype} and {list(slots.shape)}"
        )
    bits = check_layers(layers, embedding, num_heads, num_kv_heads)
    rows, width, dtype = tokens.shape[0], embedding.shape[1], embedding.dtype
    vocabulary, hidden, head_dim = head.shape[0], layers.up_weights[0].shape[0] // 2, layers.k_caches[0].shape[3]
    page_size, max_pages = layers.k_caches[0].shape[2], page_table.shape[1]
    head_bits = 8 * dtype.itemsize if head_scale is None else 8
    for name, tensor, shape, wanted in (
        ("embedding", embedding, tuple(embedding.shape), dtype),
        ("norm", norm, (width,), dtype),
        ("head", head, (vocabulary, width), dtype if head_scale is None else torch.int8),
        ("head_scale", head_scale, (vocabulary,), torch.float32),
        ("out", out, (rows, vocabulary), dtype),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != wanted or not tensor.is_contiguous()):
            found = f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
            raise ValueError(f"{name} must be contiguous {list(shape)} {wanted}, got {found}")
    if best is not None and (best.shape != (rows,) or best.dtype != torch.int64):
        raise ValueError(f"best must be [{rows}] torch.int64, got {list(best.shape)} {best.dtype}")
    windows = [window for window in layers.windows if window]
    widest = max(windows) if len(windows) == len(layers.windows) else None
    splits = most_splits(max_pages, page_size, widest, longest)
    if tables is None:
        tables = step_tables(layers)
    if scratch is None:
        scratch = step_scratch(embedding, layers, rows, num_heads, num_kv_heads, splits)
    if scratch.stream.shape != (rows, width) or scratch.attention.partial.numel() < scratch.attended.numel() * splits:
        raise ValueError(f"scratch is for {list(scratch.stream.shape)}, not for {[rows, width]} of {splits} pages")
    for rotates in set(layers.rotates):
        first = list(layers.rotates).index(rotates)
        weight = None if layers.qk_norm_weights is None else layers.qk_norm_weights[first]
        how = (table, positions) if rotates else (None, None)
        check_rope(
            scratch.qkv, num_heads, num_kv_heads, *how, rope_dtype, layers.qk_norms[first], weight,
            query_scale if rotates else None,
        )  # fmt: skip
    k_cache = layers.k_caches[0]
    check_cache(scratch.qkv, num_kv_heads, head_dim, k_cache, layers.v_caches[0], slots)
    check_attention(scratch.attended, k_cache, layers.v_caches[0], page_table, lengths, None)
    if page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    if out is None:
        out = embedding.new_empty((rows, vocabulary))
    if best is None:
        best = torch.zeros(rows, dtype=torch.int64, device=embedding.device)
    if not out.numel():
        return out, best

    options = launch_options(embedding, rows)
    a_multiprocessor = options.pop("PROGRAMS")
    norms = dict(zip(layers.rotates, layers.qk_norms, strict=True))
    launch(
        decode_step_kernel,
        (programs or _all_at_once(embedding.device, a_multiprocessor),),
        embedding,
        tokens,
        tables.pointers,
        norm,
        head,
        head_scale if head_scale is not None else head,
        table,  # None is no parameter of the compiled code
        positions,
        query_scale,
        slots,
        page_table,
        lengths.contiguous(),
        out,
        best,
        scratch.stream,
        scratch.qkv,
        scratch.attended,
        scratch.hidden,
        *scratch.attention,
        scratch.arrivals.zero_(),
        rows,
        len(layers.rotates),
        width,
        hidden,
        vocabulary,
        splits,
        max_pages,
        k_cache.stride(0),
        page_table.stride(0),
        best.stride(0),
        vocabulary if limit is None else limit,
        eps,
        scale * math.log2(math.e),
        HAS_QKV_BIAS=layers.qkv_biases is not None,
        HAS_OUT_BIAS=layers.out_biases is not None,
        HAS_UP_BIAS=layers.up_biases is not None,
        HAS_DOWN_BIAS=layers.down_biases is not None,
        BITS=bits,
        HEAD_BITS=head_bits,
        KINDS=(1 if True in norms else 0) + (2 if False in norms else 0),
        NORM_ROTATED=norms.get(True, False),
        NORM_PLAIN=norms.get(False, False),
        HAS_WEIGHT=layers.qk_norm_weights is not None,
        NORM_FIRST=norm_first,
        ROPE_ROUNDS=rope_dtype != torch.float32,
        HAS_SCALE=query_scale is not None,
        HAS_WINDOW=bool(windows),
        HEADS=(num_heads, num_kv_heads, head_dim, page_size),
        BLOCKS=_blocks(embedding, num_heads // num_kv_heads, head_dim, page_size),
        QKV_TILE=_tile(scratch.stream, layers.qkv_weights[0], bits),
        OUT_TILE=_tile(scratch.attended.flatten(1), layers.out_weights[0], bits),
        UP_TILE=_tile(scratch.stream, layers.up_weights[0], bits, gated=True),
        DOWN_TILE=_tile(scratch.hidden, layers.down_weights[0], bits),
        HEAD_TILE=_tile(scratch.stream, head, head_bits),
        BLOCK_E=min(triton.next_power_of_2(width), 1024),
        PREFETCH=not INTERPRETED and tuning.architecture(embedding.device).startswith("sm_"),
        **({} if INTERPRETED else {"launch_cooperative_grid": True}),
        **options,
    )
    return out, best


def launch_options(embedding: Tensor, rows: int) -> dict[str, Any]:
    """The tables' row for a model, and PROGRAMS. Raises RuntimeError where a GPU's have none."""
    options = dict(tuning.config("decode_step", embedding.device, itemsize=embedding.itemsize, rows=rows))
    if not options:
        raise RuntimeError(
            f"the tables of {tuning.architecture(embedding.device)} have no row for a step in one launch"
        )
    return options


def _tile(x: Tensor, weight: Tensor, bits: int, gated: bool = False) -> tuple[Any, ...]:
    """What `linear_phase` takes from EVEN_K to LINES: of decode_linear's rows."""
    row = launch_row(x, weight, bits, gated)
    return tuple(
        row[name] for name in ("EVEN_K", "ROWS", "BLOCK_N", "BLOCK_M", "BLOCK_K", "SLICES", "BLOCK_S", "LINES")
    )


def _blocks(like: Tensor, group: int, head_dim: int, page_size: int) -> tuple[int, ...]:
    """What `rope_decode_attention_phase` takes from BLOCK_G to BLOCK_S: of its own rows."""
    row = attention_row(like, group, head_dim, page_size, programs=1)
    return tuple(row[name] for name in ("BLOCK_G", "BLOCK_D", "BLOCK_N", "MERGED_G", "BLOCK_S"))


def _flat(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same of arguments that torch.library can name: the layers' lists one by one."""
    number = len(StepLayers._fields)

    def run(embedding: Tensor, tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return function(embedding, tokens, StepLayers(*rest[:number]), *rest[number:])

    return run


def _fake(embedding: Tensor, tokens: Tensor, layers: StepLayers, norm: Tensor, head: Tensor, *_: Any) -> Any:
    rows = tokens.shape[0]
    return embedding.new_empty((rows, head.shape[0])), embedding.new_empty((rows,), dtype=torch.int64)


register(
    "decode_step(Tensor embedding, Tensor tokens, Tensor[] attention_norms, Tensor[] qkv_weights, "
    "Tensor[] out_weights, Tensor[] mlp_norms, Tensor[] up_weights, Tensor[] down_weights, Tensor(a!)[] k_caches, "
    "Tensor(b!)[] v_caches, bool[] rotates, bool[] qk_norms, int[] windows, Tensor[]? qk_norm_weights, "
    "Tensor[]? qkv_biases, Tensor[]? out_biases, Tensor[]? up_biases, Tensor[]? down_biases, Tensor[]? qkv_scales, "
    "Tensor[]? out_scales, Tensor[]? up_scales, Tensor[]? down_scales, Tensor norm, Tensor head, float eps, "
    "int num_heads, int num_kv_heads, Tensor? table, Tensor? positions, ScalarType rope_dtype, bool norm_first, "
    "Tensor? query_scale, Tensor slots, Tensor page_table, Tensor lengths, float scale, int? longest=None, "
    "int? limit=None, Tensor? head_scale=None) -> (Tensor, Tensor)",
    _flat(decode_step),
    _flat(decode_step_reference),
    _flat(_fake),
)
