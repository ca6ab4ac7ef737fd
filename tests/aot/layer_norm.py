"""Layer norm and its gradient: every width bucket, with and without weight and bias."""

import torch
from tritium.kernels.layer_norm import layer_norm, layer_norm_backward

from .matrix import Case, meta

KERNELS = ["layer_norm", "layer_norm_backward"]  # the tables, each row of which some case takes
EPS = 1e-5


def case(width: int, dtype: torch.dtype = torch.bfloat16, weight: bool = True, bias: bool = True) -> Case:
    affine = "" if weight and bias else " weight alone" if weight else " bias alone" if bias else " plain"
    return Case(
        f"{width}{affine} {str(dtype).removeprefix('torch.')}",
        lambda: layer_norm(
            meta(64, width, dtype=dtype),
            meta(width, dtype=dtype) if weight else None,
            meta(width, dtype=dtype) if bias else None,
            EPS,
        ),
        wide=width >= 768 and width % 16 == 0,
    )


def backward(width: int, dtype: torch.dtype = torch.bfloat16, weight: bool = True, bias: bool = True) -> Case:
    affine = "" if weight and bias else " weight alone" if weight else " bias alone" if bias else " plain"
    rows, vector = meta(64, width, dtype=dtype), meta(width, dtype=dtype) if weight else None
    return Case(
        f"backward {width}{affine} {str(dtype).removeprefix('torch.')}",
        lambda: layer_norm_backward(rows, rows, vector, EPS, weight, bias),
        wide=width in (768, 4096, 8192),
    )


CASES = [
    *(case(width) for width in (64, 128, 768, 1600, 4096, 8192, 32768)),
    case(4097),
    case(768, torch.float16, bias=False),
    case(768, weight=False),
    case(768, weight=False, bias=False),
    case(1600, torch.float32),
    case(8192, torch.float32),
    case(32768, torch.float32),
    *(backward(width) for width in (64, 256, 768, 1600, 4096, 4097, 8192, 20000)),
    backward(768, torch.float16, bias=False),
    backward(768, weight=False),
    backward(768, weight=False, bias=False),
    *(backward(width, torch.float32) for width in (256, 1024, 1600, 4096, 8192, 20000)),
]
