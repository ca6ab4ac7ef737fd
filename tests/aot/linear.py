"""The linear layer: every row of the tables, its epilogues, edges that are not whole blocks, views."""

from collections.abc import Callable

import torch
from tritium.kernels.linear import linear, linear_residual, linear_swiglu

from .matrix import Case, meta


def plain(tokens: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    return lambda: linear(meta(tokens, depth, dtype=dtype), meta(width, depth, dtype=dtype))


def residual(tokens: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    return lambda: linear_residual(
        meta(tokens, depth, dtype=dtype), meta(width, depth, dtype=dtype), None, meta(tokens, width, dtype=dtype)
    )


def gated(tokens: int, width: int, depth: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    return lambda: linear_swiglu(meta(tokens, depth, dtype=dtype), meta(2 * width, depth, dtype=dtype))


def biased() -> object:
    return linear(meta(1, 4096), meta(6144, 4096), meta(6144))


FORMS = {"plain": plain, "residual": residual, "swiglu": gated}
HALF = [  # tokens, width, depth
    ("plain", 1, 1024, 2048),
    ("residual", 1, 1024, 3072),
    ("plain", 1, 4096, 4096),
    ("residual", 1, 4096, 4096),
    ("swiglu", 1, 3072, 1024),
    ("plain", 16, 151936, 1024),
    ("swiglu", 1, 12288, 4096),
    ("plain", 17, 6144, 4096),
    ("swiglu", 17, 12288, 4096),
    ("plain", 64, 6144, 4096),
    ("residual", 64, 4096, 4096),
    ("swiglu", 64, 3072, 1024),
    ("plain", 512, 4096, 4096),
    ("residual", 512, 4096, 4096),
    ("swiglu", 4096, 12288, 4096),
    ("plain", 4096, 4096, 4096),
    ("residual", 4096, 4096, 4096),
]
CASES = [
    *(
        Case(f"{form} {tokens}x{width}x{depth} bfloat16", FORMS[form](tokens, width, depth), wgmma=True, wide=True)
        for form, tokens, width, depth in HALF
    ),
    Case("biased 1x6144x4096 bfloat16", biased, wgmma=True, wide=True),
    Case("plain 4096x4096x4096 float16", plain(4096, 4096, 4096, torch.float16), wgmma=True, wide=True),
    # Rows that begin anywhere, and depths that end within a block.
    Case("unaligned 1x4097x4100 bfloat16", plain(1, 4097, 4100), wgmma=True),
    Case("unaligned swiglu 1x4097x4097 bfloat16", gated(1, 4097, 4097), wgmma=True),
    Case("unaligned 4096x4096x4100 bfloat16", residual(4096, 4096, 4100), wgmma=True),
    Case("unaligned 4096x4097x4100 bfloat16", residual(4096, 4097, 4100), wgmma=True),
    Case("odd residual 4096x4097x4096 bfloat16", residual(4096, 4097, 4096), wgmma=True),
    Case("vocabulary 4096x50257x768 bfloat16", plain(4096, 50257, 768), wgmma=True, wide=True),
    Case("unaligned swiglu 4096x4096x4097 bfloat16", gated(4096, 4096, 4097), wgmma=True),
    Case("masked 1x4097x568 bfloat16", plain(1, 4097, 568), wgmma=True, wide=True),
    Case("masked 512x4097x568 bfloat16", plain(512, 4097, 568), wgmma=True, wide=True),
    Case("least 1x1x8 bfloat16", plain(1, 1, 8), wgmma=True),
    Case("least swiglu 1x1x1 bfloat16", gated(1, 1, 1), wgmma=True),
    *(
        Case(f"{form} {tokens}x{width}x{depth} float32", FORMS[form](tokens, width, depth, torch.float32), wide=True)
        for form, tokens, width, depth in (
            ("swiglu", 1, 3072, 1024),
            ("residual", 64, 4096, 4096),
            ("swiglu", 64, 3072, 1024),
        )
    ),
    Case("unaligned 64x4097x4097 float32", plain(64, 4097, 4097, torch.float32)),
]
