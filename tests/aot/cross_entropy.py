"""Cross-entropy: every width bucket forward and backward, vocabularies with and without 128-bit loads, the mean."""

import torch
from tritium.kernels.cross_entropy import cross_entropy, cross_entropy_backward, cross_entropy_rows

from .matrix import Case, meta

KERNELS = ["cross_entropy", "cross_entropy_backward"]  # the tables, each row of which some case takes


def labels(rows: int) -> torch.Tensor:
    return meta(rows, dtype=torch.int64)


def forward(width: int, dtype: torch.dtype = torch.bfloat16, smoothing: float = 0.0) -> Case:
    def call() -> object:
        return cross_entropy_rows(meta(64, width, dtype=dtype), labels(64), -100, smoothing, smoothing / 1000)

    kind = "smoothed " if smoothing else ""
    return Case(f"{width} {kind}{str(dtype).removeprefix('torch.')}", call, wide=width % 8 == 0)


def backward(width: int, dtype: torch.dtype = torch.bfloat16, smoothing: float = 0.0) -> Case:
    def call() -> object:
        options = (-100, smoothing, smoothing / 1000, "sum")
        return cross_entropy_backward(meta(64, width, dtype=dtype), labels(64), meta(dtype=torch.float32), *options)

    kind = "smoothed " if smoothing else ""
    return Case(f"backward {width} {kind}{str(dtype).removeprefix('torch.')}", call, wide=width % 8 == 0)


CASES = [
    *(case(width) for width in (2048, 50257, 128256, 151936) for case in (forward, backward)),
    forward(151936, torch.float16, 0.1),
    backward(151936, torch.float16, 0.1),
    forward(128256, torch.float32),
    backward(128256, torch.float32),
    Case("mean 128256 bfloat16", lambda: cross_entropy(meta(64, 128256), labels(64))),
    Case("sum 128256 bfloat16", lambda: cross_entropy(meta(64, 128256), labels(64), reduction="sum")),
    Case(
        "backward of each 128256 bfloat16",
        lambda: cross_entropy_backward(meta(64, 128256), labels(64), meta(64, dtype=torch.float32), reduction="none"),
    ),
    Case(
        "mean backward 128256 bfloat16",
        lambda: cross_entropy_backward(meta(64, 128256), labels(64), meta(dtype=torch.float32)),
    ),
]
