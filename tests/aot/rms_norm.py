"""RMSNorm and its gradient: every width bucket, with and without weight and residual."""

from dataclasses import replace

import torch
from tritium.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_backward

from .matrix import Case, meta

KERNELS = ["rms_norm", "rms_norm_backward"]  # the tables, each row of which some case takes
EPS = 1e-6


def backward(width: int, dtype: torch.dtype = torch.bfloat16, weight: bool = True) -> Case:
    kind = f"{'' if weight else 'unweighted '}{str(dtype).removeprefix('torch.')}"
    rows, vector = meta(64, width, dtype=dtype), meta(width, dtype=dtype) if weight else None
    return Case(
        f"backward {width} {kind}", lambda: rms_norm_backward(rows, rows, vector, EPS), wide=width in (1024, 4096, 8192)
    )


def add_backward(width: int, dtype: torch.dtype = torch.bfloat16, stream: bool = True) -> Case:
    kind = f"{'' if stream else 'without the stream '}{str(dtype).removeprefix('torch.')}"
    rows, vector = meta(64, width, dtype=dtype), meta(width, dtype=dtype)
    return Case(
        f"backward residual {width} {kind}",
        lambda: rms_norm_backward(rows, rows, vector, EPS, True, rows, rows if stream else None),
    )


CASES = [
    *(
        Case(f"{width} bfloat16", lambda width=width: rms_norm(meta(64, width), meta(width), EPS), wide=width >= 1024)
        for width in (64, 128, 1024, 2048, 4096, 8192, 32768)
    ),
    Case("4097 bfloat16", lambda: rms_norm(meta(64, 4097), meta(4097), EPS)),
    Case("128 unweighted float16", lambda: rms_norm(meta(64, 128, dtype=torch.float16), None, EPS)),
    Case("4096 residual bfloat16", lambda: add_rms_norm(meta(64, 4096), meta(64, 4096), meta(4096), EPS), wide=True),
    Case(
        "8192 float32",
        lambda: rms_norm(meta(64, 8192, dtype=torch.float32), meta(8192, dtype=torch.float32), EPS),
        wide=True,
    ),
    *(backward(width) for width in (64, 256, 1024, 1536, 4096, 4097, 20000)),
    backward(128, torch.float16, weight=False),
    *(backward(width, torch.float32) for width in (256, 1024, 4096, 8192)),
    *(add_backward(width) for width in (1024, 4096, 8192, 20000)),
    *(add_backward(width, torch.float32) for width in (256, 2048, 4096, 8192)),
    add_backward(4096, stream=False),
    replace(backward(16384), only=("gfx942",)),  # whose programs have registers for it
]
