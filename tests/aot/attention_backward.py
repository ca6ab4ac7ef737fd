"""The gradient of attention: each head dimension class, windows, every dtype class; and the forward that keeps lse."""

import torch
from tritium.kernels.attention_backward import attention_backward, attention_with_lse

from .matrix import Case, meta

INT = torch.int32


def backward(head_dim: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None, wgmma: bool = True) -> Case:
    def call() -> object:
        """v is a slice of the packed projection, as the runtime has it."""
        v = meta(4096, 32, head_dim, dtype=dtype)[:, 24:]
        q, k = meta(4096, 16, head_dim, dtype=dtype), meta(4096, 8, head_dim, dtype=dtype)
        lse = meta(16, 4096, dtype=torch.float32)
        return attention_backward(q, q, k, v, q, lse, meta(3, dtype=INT), head_dim**-0.5, window)

    half = dtype != torch.float32
    name = f"backward d{head_dim} {'windowed ' * (window is not None)}{str(dtype)[6:]}"
    return Case(name, call, wgmma=half and wgmma, wide=half and head_dim >= 56)


def forward() -> object:
    q, k = meta(4096, 16, 128), meta(4096, 8, 128)
    return attention_with_lse(q, k, k, meta(3, dtype=INT), 128**-0.5)


CASES = [
    backward(128),
    backward(128, window=1024),
    backward(64, torch.float16),
    backward(80),
    backward(96, window=1024),
    backward(56),
    backward(16),
    backward(256, wgmma=False),
    backward(256, window=1024, wgmma=False),
    backward(128, torch.float32),
    backward(64, torch.float32, window=1024),
    backward(256, torch.float32),
    Case("with lse d128 bfloat16", forward, wgmma=True, wide=True),
]
