"""Combining what experts gave, and its gradient: every row, widths with and without 128-bit loads, strided rows."""

import torch
from tritium.kernels.combine import combine, combine_backward

from .matrix import Case, meta

KERNELS = ["combine", "combine_backward"]  # the tables, each row of which some case takes


def case(tokens: int, k: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    args = (tokens * k, width), (tokens, k), (tokens, width)
    return Case(
        f"{tokens} x {k} x {width} {str(dtype)[6:]}",
        lambda: combine(*(meta(*shape, dtype=dtype) for shape in args)),
        wide=width % 16 == 0,
    )


def backward(tokens: int, k: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    args = (tokens, width), (tokens * k, width), (tokens, k)
    return Case(
        f"backward {tokens} x {k} x {width} {str(dtype)[6:]}",
        lambda: combine_backward(*(meta(*shape, dtype=dtype) for shape in args)),
        wide=width % 16 == 0,
    )


CASES = [
    case(1, 8, 2048),
    case(2048, 8, 2048),
    case(16, 8, 7168, torch.float16),
    case(4096, 1, 4096),
    case(4096, 16, 4096),
    case(65, 3, 1365),
    case(2048, 64, 2048),  # more experts than are unrolled: of all of them, the code would be pages long
    case(1, 8, 2048, torch.float32),
    case(2048, 8, 4096, torch.float32),
    Case(
        "strided bfloat16",
        lambda: combine(meta(2048 * 8, 4096)[:, :2048], meta(2048, 8), meta(2048, 4096)[:, 2048:]),
        wide=True,
    ),
    backward(2048, 8, 2048),
    backward(16, 8, 7168, torch.float16),
    backward(2048, 2, 768),
    backward(4096, 1, 512),
    backward(65, 3, 1365),
    backward(2048, 64, 200),
    backward(2048, 8, 4096, torch.float32),
    backward(2048, 8, 512, torch.float32),
    Case(
        "backward strided bfloat16",
        lambda: combine_backward(meta(2048, 4096)[:, 2048:], meta(2048 * 8, 4096)[:, :2048], meta(2048, 8)),
        wide=True,
    ),
]
