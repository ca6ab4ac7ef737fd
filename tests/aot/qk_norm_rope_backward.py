"""The gradient of QK-norm and RoPE: each class of head width, rounding, order and kind of norm; frozen weights."""

import torch
from tritium.kernels.qk_norm_rope_backward import qk_norm_rope_backward

from .matrix import Case, meta

CONTEXT, EPS = 4096, 1e-6


def case(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    rope: torch.dtype | None = None,
    norm: str = "weighted",
    first: bool = True,
    tokens: int = 64,
    rotate: bool = True,
    scaled: bool = False,
    frozen: bool = False,
) -> Case:
    width = (heads + 2 * kv_heads) * head_dim
    rope = rope or dtype
    order, positions = "first" if first else "after", f"rope {rope}" if rotate else "no rope"
    extra = " scaled" * scaled + " frozen" * frozen
    name = f"{heads}/{kv_heads}x{head_dim} {norm} {order} {positions}{extra} {tokens} tokens {dtype}"

    def call() -> object:
        return qk_norm_rope_backward(
            meta(tokens, heads, head_dim, dtype=dtype),
            meta(tokens, kv_heads, head_dim, dtype=dtype),
            meta(tokens, width, dtype=dtype),
            heads,
            kv_heads,
            meta(CONTEXT, 2, head_dim // 2, dtype=torch.float32) if rotate else None,
            meta(tokens, dtype=torch.int64) if rotate else None,
            rope,
            norm != "none",
            meta(heads + kv_heads, head_dim, dtype=dtype) if norm == "weighted" else None,
            EPS,
            first,
            meta(CONTEXT, dtype=torch.float32) if scaled else None,
            wants_weight=not frozen,
        )

    return Case(name.replace("torch.", ""), call, wide=head_dim % 16 == 0)


HALF, FULL = torch.float16, torch.float32
CASES = [
    case(16, 8, 128),
    case(16, 8, 128, tokens=4096),
    case(16, 0, 128, tokens=4096),
    case(16, 8, 128, tokens=1),
    case(16, 8, 128, frozen=True),
    case(16, 8, 128, first=False),
    case(16, 8, 128, first=False, scaled=True),
    case(24, 6, 64, rope=FULL, norm="unweighted", first=False),
    case(24, 6, 64, rotate=False, norm="none"),
    case(24, 6, 64, rotate=False),
    case(24, 6, 64, norm="none"),
    case(12, 12, 64, HALF, rope=FULL, first=False),
    case(2, 1, 16),
    case(8, 2, 56, norm="none", first=False),
    case(32, 32, 80, HALF),
    case(32, 8, 96, rope=FULL),
    case(16, 1, 256),
    case(16, 1, 256, rope=FULL, first=False),
    case(16, 8, 128, FULL),
    case(16, 8, 128, FULL, first=False, scaled=True),
    case(16, 1, 256, FULL, first=False),
    case(16, 1, 256, FULL, scaled=True),
    case(4, 2, 16, FULL, norm="unweighted"),
    case(32, 32, 128, rope=FULL, norm="none", scaled=True),
    case(32, 32, 128, HALF, rope=FULL, norm="none", scaled=True),
]
