"""Routing's gradient: both rows of the table, counts of experts that are no powers of two, strided rows, the least."""

import torch
from tritium.kernels.routing_backward import route_backward

from .matrix import Case, meta


def of(tokens: int, experts: int, k: int, dtype: torch.dtype = torch.bfloat16, renormalise: bool = True) -> Case:
    name = f"{tokens} to {k} of {experts} {'renormalised ' * renormalise}{str(dtype)[6:]}"
    dweights, logits, chosen = meta(tokens, k, dtype=dtype), meta(tokens, experts, dtype=dtype), meta(tokens, k)
    return Case(name, lambda: route_backward(dweights, logits, chosen.to(torch.int32), renormalise))


CASES = [
    of(2048, 128, 8),
    of(2048, 128, 8, torch.float16, renormalise=False),
    of(16, 256, 8),
    of(2048, 60, 4, renormalise=False),
    of(1, 1, 1),
    of(2048, 1024, 10),
    of(4096, 1000, 1000, renormalise=False),
    of(2048, 128, 8, torch.float32),
    of(2048, 1024, 8, torch.float32, renormalise=False),
    Case(
        "strided bfloat16",
        lambda: route_backward(meta(2048, 16)[:, :8], meta(2048, 160)[:, :127], meta(2048, 8, dtype=torch.int32), True),
    ),
]
