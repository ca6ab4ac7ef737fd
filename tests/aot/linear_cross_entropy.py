"""The projected loss: the kernels of cross_entropy.py as its chunks launch them, over the logits themselves."""

import torch
from tritium.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_backward

from .matrix import Case, meta

KERNELS: list[str] = []  # no tables of its own


def given(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return meta(1030, 64, dtype=dtype), meta(128256, 64, dtype=dtype), meta(1030, dtype=torch.int64)


CASES = [
    Case("128256 bfloat16", lambda: linear_cross_entropy(*given())),
    Case("backward 128256 bfloat16", lambda: linear_cross_entropy_backward(*given(), meta(dtype=torch.float32))),
    Case(
        "backward 128256 float32",
        lambda: linear_cross_entropy_backward(*given(torch.float32), meta(dtype=torch.float32)),
    ),
]
