"""RMSNorm: every width bucket, with and without weight and residual."""

import torch
from tritium.kernels.rms_norm import add_rms_norm, rms_norm

from .matrix import Case, meta

EPS = 1e-6
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
]
