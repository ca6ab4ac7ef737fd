"""Decoding attention: every row of the tables, each head dim class, one split and many, with and without a window."""

from functools import partial

import torch
from tritium.kernels.decode_attention import decode_attention
from tritium.kernels.dense_attention import dense_attention

from .matrix import Case, meta

PAGE = 256


def call(
    heads: int,
    kv_heads: int,
    head_dim: int,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    longest: int | None = None,
) -> None:
    cache = meta(kv_heads, 64, PAGE, head_dim, dtype=dtype)
    table, lengths = meta(rows, 16, dtype=torch.int32), meta(rows, dtype=torch.int32)
    # q as the runtime has it: a slice of the packed projection.
    q = meta(rows, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    decode_attention(q, cache, cache, table, lengths, head_dim**-0.5, window, longest)


def dense(rows: int, room: int) -> None:
    """A static cache of `transformers`, with the rows' bounds as columns of one tensor."""
    cache, bounds = meta(rows, 8, room, 128, dtype=torch.bfloat16), meta(rows, 2, dtype=torch.int32)
    q = meta(rows, 32, 1, 128, dtype=torch.bfloat16).transpose(1, 2)
    dense_attention(q, cache, cache, bounds[:, 0], bounds[:, 1], 128**-0.5)


def case(name: str, *args: int, wide: bool = True, **options: object) -> Case:
    return Case(name, partial(call, *args, **options), wide=wide)  # type: ignore[arg-type]


F32 = torch.float32
CASES = [
    case("d16 group 1 bfloat16", 8, 8, 16, rows=32, wide=False),
    case("d56 group 3 bfloat16", 9, 3, 56, rows=32),
    case("d64 group 4 bfloat16", 32, 8, 64, rows=32),
    case("d64 group 1 few programs bfloat16", 4, 4, 64),
    case("d80 group 16 bfloat16", 16, 1, 80, rows=32),
    case("d96 group 6 window float16", 24, 4, 96, rows=32, dtype=torch.float16, window=1024),
    case("d128 group 8 few programs bfloat16", 32, 4, 128),
    case("d128 group 8 bfloat16", 32, 4, 128, rows=64),
    case("d128 group 8 one split bfloat16", 32, 4, 128, longest=PAGE),
    case("d128 group 8 window bfloat16", 32, 4, 128, rows=64, window=4096),
    case("d128 group 24 bfloat16", 24, 1, 128, rows=64),
    case("d128 group 64 bfloat16", 64, 1, 128, rows=64),
    case("d256 group 4 few programs bfloat16", 8, 2, 256),
    case("d256 group 4 bfloat16", 8, 2, 256, rows=64),
    case("d256 group 64 bfloat16", 64, 1, 256, rows=64),
    Case("dense d128 group 4 bfloat16", partial(dense, 4, 4096), wide=True),
    Case("dense d128 group 4 one split bfloat16", partial(dense, 4, PAGE), wide=True),
    case("d64 group 3 float32", 9, 3, 64, rows=32, dtype=F32),
    case("d64 group 64 float32", 64, 1, 64, rows=64, dtype=F32),
    case("d128 group 64 float32", 64, 1, 128, rows=64, dtype=F32),
    case("d128 group 8 float32", 32, 4, 128, dtype=F32),
    case("d128 group 8 one split float32", 32, 4, 128, dtype=F32, longest=PAGE),
    case("d256 group 4 float32", 8, 2, 256, rows=64, dtype=F32),
    case("d256 group 64 float32", 64, 1, 256, rows=64, dtype=F32),
]
