"""Attention at prefill: each head dimension class, both forms, windows, every dtype class."""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.attention import attention, paged_attention
from tritium.kernels.dense_attention import dense_attention

from .matrix import Case, meta

INT = torch.int32


def packed(head_dim: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None) -> Tensor:
    """v is a slice of the packed projection, as the runtime has it."""
    v = meta(4096, 32, head_dim, dtype=dtype)[:, 24:]
    q, k = meta(4096, 16, head_dim, dtype=dtype), meta(4096, 8, head_dim, dtype=dtype)
    return attention(q, k, v, meta(3, dtype=INT), head_dim**-0.5, window)


def paged(head_dim: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None) -> Tensor:
    cache = meta(8, 64, 256, head_dim, dtype=dtype)
    q, table = meta(4096, 16, head_dim, dtype=dtype), meta(2, 32, dtype=INT)
    return paged_attention(q, cache, cache, table, meta(3, dtype=INT), meta(2, dtype=INT), head_dim**-0.5, window)


def dense(head_dim: int, dtype: torch.dtype = torch.bfloat16, window: int | None = None) -> Tensor:
    """A static cache of `transformers`, with the rows' bounds as columns of one tensor."""
    cache, bounds = meta(2, 8, 4096, head_dim, dtype=dtype), meta(2, 2, dtype=INT)
    q = meta(2, 16, 100, head_dim, dtype=dtype).transpose(1, 2)
    return dense_attention(q, cache, cache, bounds[:, 0], bounds[:, 1], head_dim**-0.5, window)


def case(name: str, form: Any, head_dim: int, dtype: torch.dtype, window: int | None = None) -> Case:
    return Case(
        f"{name} d{head_dim} {'windowed ' * (window is not None)}{str(dtype)[6:]}",
        lambda: form(head_dim, dtype, window),
        wgmma=head_dim in (64, 128) and dtype != torch.float32,
        wide=head_dim >= 56 and dtype != torch.float32,
        bulk=head_dim in (64, 128) and dtype != torch.float32,
    )


CASES = [
    case("packed", packed, 128, torch.bfloat16),
    case("paged", paged, 128, torch.bfloat16),
    case("paged", paged, 128, torch.float16, window=1024),
    case("packed", packed, 64, torch.bfloat16),
    case("paged", paged, 64, torch.bfloat16, window=1024),
    case("packed", packed, 80, torch.bfloat16),
    case("paged", paged, 96, torch.bfloat16, window=1024),
    case("packed", packed, 56, torch.float16),
    case("paged", paged, 256, torch.bfloat16, window=1024),
    case("packed", packed, 16, torch.bfloat16),
    case("packed", packed, 128, torch.bfloat16, window=1024),
    case("dense", dense, 128, torch.bfloat16),
    case("dense", dense, 80, torch.bfloat16, window=1024),
    case("packed", packed, 128, torch.float32),
    case("packed", packed, 64, torch.float32),
    case("paged", paged, 256, torch.float32, window=1024),
]
