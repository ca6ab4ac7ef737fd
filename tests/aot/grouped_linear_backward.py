"""The gradients of a mixture of experts' products: every row of the tables, edges that are not whole blocks."""

import torch
from tritium.kernels.grouped_linear_backward import grouped_linear_dweight, grouped_linear_dx

from .matrix import Case, meta

# Tokens, experts, k, width, depth: Qwen3-30B-A3B's gate_up and down, Qwen3-235B-A22B's, few tokens, masks.
SHAPES = [
    (2048, 128, 8, 1536, 2048),
    (16384, 128, 1, 2048, 768),
    (65536, 128, 1, 2048, 768),
    (8192, 128, 8, 3072, 4096),
    (16, 128, 8, 1536, 2048),
    (512, 60, 4, 72, 568),
    (64, 1, 1, 768, 2048),
]
UNALIGNED = [(4096, 128, 8, 771, 2049), (1, 1, 1, 1, 8)]


def both(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, wide: bool = True) -> list[Case]:
    tokens, experts, k, width, depth = shape
    order, starts = meta(tokens * k, dtype=torch.int32), meta(experts + 1, dtype=torch.int32)
    dy, x = meta(tokens * k, width, dtype=dtype), meta(tokens, depth, dtype=dtype)
    weight = meta(experts, width, depth, dtype=dtype)
    name = f"{tokens}x{width}x{depth} {k} of {experts} {str(dtype)[6:]}"
    # k = 1 for dx: a token's rows by themselves: their sum is combine's kernel, which has no matrix product
    return [
        Case(f"dx {name}", lambda: grouped_linear_dx(dy, weight, order, starts, 1), wgmma=True, wide=wide),
        Case(f"dweight {name}", lambda: grouped_linear_dweight(dy, x, order, starts, k), wgmma=True, wide=wide),
    ]


CASES = [
    *(case for shape in SHAPES for case in both(shape)),
    *both(SHAPES[0], torch.float16),
    *(case for shape in UNALIGNED for case in both(shape, wide=False)),
    *both(SHAPES[0], torch.float32),
    *both(UNALIGNED[0], torch.float32, wide=False),
]
