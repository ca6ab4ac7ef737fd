"""Routing: every row of the tables, counts of experts that are no powers of two, strided logits, the least there is."""

import torch
from tritium.kernels.routing import group, route

from .matrix import Case, meta


def to(tokens: int, experts: int, k: int, dtype: torch.dtype = torch.bfloat16, renormalise: bool = True) -> Case:
    name = f"route {tokens} to {k} of {experts} {'renormalised ' * renormalise}{str(dtype)[6:]}"
    return Case(name, lambda: route(meta(tokens, experts, dtype=dtype), k, renormalise))


def grouped(tokens: int, k: int, experts: int) -> Case:
    ids = meta(tokens, k, dtype=torch.int32)
    return Case(f"group {tokens} x {k} by {experts}", lambda: group(ids, experts), wide=tokens * k % 4 == 0)


CASES = [
    to(1, 128, 8),
    to(16, 128, 8, torch.float16, renormalise=False),
    to(2048, 128, 8),
    to(65536, 256, 8),
    to(1, 256, 8),
    to(2048, 60, 4, renormalise=False),
    to(1, 1, 1),
    to(1, 1024, 10),
    to(4096, 1000, 1000),
    to(1, 128, 8, torch.float32),
    to(2048, 128, 8, torch.float32),
    to(2048, 1024, 8, torch.float32, renormalise=False),
    Case("route strided bfloat16", lambda: route(meta(2048, 160)[:, :127], 8, True)),
    grouped(1, 8, 128),
    grouped(1, 1, 1),
    grouped(64, 8, 128),
    grouped(511, 3, 60),
    grouped(2048, 8, 128),
    grouped(8192, 8, 1024),
]
