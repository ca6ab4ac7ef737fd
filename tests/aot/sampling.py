"""Sampling: greedy, u's cut alone, and all three cuts; both rows of the table; 16-bit and 32-bit keys."""

import torch
from tritium.kernels.sampling import sample

from .matrix import Case, meta

VOCABULARY = 151936


def call(
    rows: int,
    temperature: float,
    top_k: int,
    top_p: float,
    dtype: torch.dtype = torch.bfloat16,
    width: int = VOCABULARY,
) -> object:
    return sample(meta(rows, width, dtype=dtype), temperature, top_k, top_p, meta(rows, dtype=torch.float32))


CASES = [
    Case("greedy bfloat16", lambda: call(8, 0, 0, 1.0)),
    Case("all cuts bfloat16", lambda: call(8, 0.6, 20, 0.95), wide=True),
    Case("all cuts many rows bfloat16", lambda: call(64, 0.6, 20, 0.95), wide=True),
    Case("top_p float16", lambda: call(8, 0.6, 0, 0.95, torch.float16), wide=True),
    Case("u odd vocabulary bfloat16", lambda: call(8, 0.6, 0, 1.0, width=50257)),
    Case("top_k float32", lambda: call(64, 0.6, 20, 1.0, torch.float32), wide=True),
]
