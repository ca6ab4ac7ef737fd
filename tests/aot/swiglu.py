"""SwiGLU: few and many rows, widths with and without 128-bit loads, strided rows."""

import torch
from tritium.kernels.swiglu import swiglu

from .matrix import Case, meta

CASES = [
    Case("1 x 3072 bfloat16", lambda: swiglu(meta(1, 2 * 3072)), wide=True),
    Case("4096 x 3072 bfloat16", lambda: swiglu(meta(4096, 2 * 3072)), wide=True),
    Case("4096 x 576 float16", lambda: swiglu(meta(4096, 2 * 576, dtype=torch.float16)), wide=True),
    Case("4096 x 3072 strided bfloat16", lambda: swiglu(meta(4096, 8192)[:, : 2 * 3072]), wide=True),
    Case("64 x 1365 bfloat16", lambda: swiglu(meta(64, 2 * 1365))),
    Case("1 x 3072 float32", lambda: swiglu(meta(1, 2 * 3072, dtype=torch.float32)), wide=True),
    Case("4096 x 3072 float32", lambda: swiglu(meta(4096, 2 * 3072, dtype=torch.float32)), wide=True),
]
