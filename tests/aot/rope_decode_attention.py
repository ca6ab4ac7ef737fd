"""The fused decoding attention: every row of the tables, each norm and rotation, windows, factors, wide groups."""

from functools import partial

import torch
from tritium.kernels.rope_decode_attention import rope_decode_attention

from .matrix import Case, meta

CONTEXT, PAGES, PAGE, EPS = 4096, 64, 256, 1e-6


def call(
    heads: int,
    kv_heads: int,
    head_dim: int,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    rope: torch.dtype | None = None,
    norm: str = "weighted",
    first: bool = True,
    rotate: bool = True,
    scaled: bool = False,
    window: int | None = None,
) -> None:
    cache, whole = meta(kv_heads, PAGES, PAGE, head_dim, dtype=dtype), torch.int64
    rope_decode_attention(
        meta(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        heads,
        kv_heads,
        meta(CONTEXT, 2, head_dim // 2, dtype=torch.float32) if rotate else None,
        meta(rows, dtype=whole) if rotate else None,
        rope or dtype,
        norm != "none",
        meta(heads + kv_heads, head_dim, dtype=dtype) if norm == "weighted" else None,
        EPS,
        first,
        meta(CONTEXT, dtype=torch.float32) if scaled else None,
        cache,
        cache,
        meta(rows, dtype=whole),
        meta(rows, 16, dtype=torch.int32),
        meta(rows, dtype=torch.int32),
        head_dim**-0.5,
        window,
        out=meta(rows, heads, head_dim, dtype=dtype),
    )


def case(name: str, *args: int, **options: object) -> Case:
    return Case(name, partial(call, *args, **options), wide=args[2] > 16, dependent=True)  # type: ignore[arg-type]


F32 = torch.float32
CASES = [
    case("d16 group 2 bfloat16", 2, 1, 16),
    case("d56 group 3 no norm bfloat16", 9, 3, 56, rows=32, norm="none"),
    case("d64 group 4 unweighted after bfloat16", 24, 6, 64, rope=F32, norm="unweighted", first=False),
    case("d64 group 4 unweighted after many bfloat16", 24, 6, 64, rows=32, rope=F32, norm="unweighted", first=False),
    case("d64 group 4 no positions bfloat16", 24, 6, 64, norm="none", rotate=False),
    case("d80 group 16 window float16", 16, 1, 80, rows=32, dtype=torch.float16, norm="none", window=1024),
    case("d128 group 2 bfloat16", 16, 8, 128),
    case("d128 group 8 bfloat16", 32, 4, 128, rows=64),
    case("d128 group 1 scaled bfloat16", 32, 32, 128, rope=F32, norm="none", scaled=True),
    case("d128 group 64 bfloat16", 64, 1, 128, rows=64),
    case("d256 group 4 bfloat16", 8, 2, 256, rows=64),
    case("d256 group 32 bfloat16", 32, 1, 256, rows=64),
    case("d128 group 8 float32", 32, 4, 128, dtype=F32),
    case("d256 group 16 float32", 16, 1, 256, dtype=F32),
]
