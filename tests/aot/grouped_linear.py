"""The products of a mixture of experts: every row of the tables, edges that are not whole blocks, odd experts."""

from collections.abc import Callable

import torch
from tritium.kernels.grouped_linear import grouped_linear, grouped_swiglu

from .matrix import Case, meta


def product(
    form: str, tokens: int, experts: int, k: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    """The gated product of `tokens` rows, k assignments each; the plain one of a row for each assignment."""

    def call() -> object:
        count = tokens * k
        order, starts = meta(count, dtype=torch.int32), meta(experts + 1, dtype=torch.int32)
        if form == "swiglu":
            weight = meta(experts, 2 * width, depth, dtype=dtype)
            return grouped_swiglu(meta(tokens, depth, dtype=dtype), weight, order, starts, k)
        weight = meta(experts, width, depth, dtype=dtype)
        return grouped_linear(meta(count, depth, dtype=dtype), weight, order, starts, 1)

    return call


HALF = [  # tokens, experts, k, width, depth
    ("swiglu", 1, 60, 4, 704, 2048),
    ("swiglu", 1, 128, 8, 768, 2048),  # Qwen3-30B-A3B
    ("plain", 1, 128, 8, 2048, 768),
    ("swiglu", 1, 128, 8, 1536, 4096),  # Qwen3-235B-A22B
    ("plain", 1, 128, 8, 4096, 1536),
    ("swiglu", 16, 128, 8, 768, 2048),
    ("plain", 16, 128, 8, 2048, 768),
    ("swiglu", 512, 128, 8, 768, 2048),
    ("plain", 512, 128, 8, 2048, 768),
    ("swiglu", 2048, 128, 8, 768, 2048),
    ("plain", 2048, 128, 8, 2048, 768),
    ("swiglu", 8192, 128, 8, 768, 2048),
    ("plain", 8192, 128, 8, 2048, 768),
    ("swiglu", 8192, 256, 8, 2048, 7168),  # the widest of MobileLLM's specifications
    ("swiglu", 100, 4, 2, 1024, 512),
    ("plain", 100, 4, 2, 512, 1024),
]
CASES = [
    *(
        Case(f"{form} {tokens}x{width}x{depth} {k} of {experts} bfloat16", call, wgmma=True, wide=True)
        for form, tokens, experts, k, width, depth in HALF
        for call in [product(form, tokens, experts, k, width, depth)]
    ),
    Case(
        "swiglu 2048x768x2048 8 of 128 float16", product("swiglu", 2048, 128, 8, 768, 2048, torch.float16), True, True
    ),
    # Widths that end within a block, experts that are no power of two, one expert, one a token, all of them.
    Case("masked swiglu 1x72x568 2 of 5 bfloat16", product("swiglu", 1, 5, 2, 72, 568), wgmma=True, wide=True),
    Case("masked 512x72x568 4 of 60 bfloat16", product("plain", 512, 60, 4, 72, 568), wgmma=True, wide=True),
    Case("one expert 64x768x2048 bfloat16", product("swiglu", 64, 1, 1, 768, 2048), wgmma=True, wide=True),
    Case("all experts 4096x1024x512 bfloat16", product("plain", 4096, 6, 6, 1024, 512), wgmma=True, wide=True),
    # Rows that begin anywhere.
    Case("unaligned swiglu 1x768x2049 8 of 128 bfloat16", product("swiglu", 1, 128, 8, 768, 2049), wgmma=True),
    Case("unaligned 4096x2049x769 8 of 128 bfloat16", product("plain", 4096, 128, 8, 2049, 769), wgmma=True),
    Case("unaligned swiglu 4096x771x2049 8 of 128 bfloat16", product("swiglu", 4096, 128, 8, 771, 2049), wgmma=True),
    Case("least 1x1x8 bfloat16", product("plain", 1, 1, 1, 1, 8), wgmma=True),
    Case("least swiglu 1x1x1 bfloat16", product("swiglu", 1, 1, 1, 1, 1), wgmma=True),
    *(
        Case(f"{form} {tokens}x{width}x{depth} 8 of 128 float32", call, wide=True)
        for form, tokens, width, depth in (
            ("swiglu", 1, 768, 2048),
            ("plain", 512, 2048, 768),
            ("swiglu", 512, 768, 2048),
        )
        for call in [product(form, tokens, 128, 8, width, depth, torch.float32)]
    ),
    Case("unaligned 512x771x2049 8 of 128 float32", product("plain", 512, 128, 8, 771, 2049, torch.float32)),
]
