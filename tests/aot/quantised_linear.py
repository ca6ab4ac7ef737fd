"""The linear layer of quantised weights: every row of the tables, both formats, edges that are not whole blocks."""

from collections.abc import Callable

import torch
from tritium.kernels.quantised_linear import BLOCK, quantised_linear

from .matrix import Case, meta


def call(
    bits: int, tokens: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False
) -> Callable[[], object]:
    blocks = -(-depth // BLOCK)
    values = meta(width, depth, dtype=torch.int8) if bits == 8 else meta(width, blocks * BLOCK // 2, dtype=torch.uint8)
    scale = meta(width, dtype=torch.float32) if bits == 8 else meta(width, blocks, dtype=dtype)
    bias = meta(width, dtype=dtype) if biased else None
    return lambda: quantised_linear(meta(tokens, depth, dtype=dtype), values, scale, bias)


CASES = [
    *(
        Case(f"{bits} bits {tokens}x{width}x{depth} bfloat16", call(bits, tokens, width, depth), wgmma=True, wide=wide)
        for bits, tokens, width, depth, wide in (
            (8, 1, 4096, 4096, True),
            (8, 64, 3072, 1024, True),
            (8, 4096, 6144, 4096, True),
            (4, 1, 4096, 4096, False),  # for wgmma's left operand, Triton brings bytes in by eights
            (4, 64, 3072, 1024, True),
            (4, 4096, 6144, 4096, True),
        )
    ),
    Case("8 bits biased 17x6144x4096 float16", call(8, 17, 6144, 4096, torch.float16, True), wgmma=True, wide=True),
    Case("8 bits unaligned 4096x4097x4100 bfloat16", call(8, 4096, 4097, 4100), wgmma=True),
    Case("4 bits unaligned 1x4097x4100 bfloat16", call(4, 1, 4097, 4100, biased=True), wgmma=True),
    Case("4 bits masked 64x1536x560 bfloat16", call(4, 64, 1536, 560), wgmma=True, wide=True),
    Case("8 bits 64x4096x4096 float32", call(8, 64, 4096, 4096, torch.float32)),
    Case("4 bits 64x4096x4096 float32", call(4, 64, 4096, 4096, torch.float32)),
]
