"""SwiGLU and its gradient: few and many rows, widths with and without 128-bit loads, strided rows."""

import torch
from tritium.kernels.swiglu import silu_mul, silu_mul_backward, swiglu, swiglu_backward

from .matrix import Case, meta

KERNELS = ["swiglu", "swiglu_backward"]  # the tables, each row of which some case takes


def backward(
    rows: int, width: int, dtype: torch.dtype = torch.bfloat16, wide: bool = True, strided: bool = False
) -> Case:
    def call() -> object:
        if not strided:
            return swiglu_backward(meta(rows, width, dtype=dtype), meta(rows, 2 * width, dtype=dtype))
        dy, gate_up = meta(rows, width + 1024, dtype=dtype), meta(rows, 2 * width + 2048, dtype=dtype)
        return swiglu_backward(dy[:, :width], gate_up[:, : 2 * width])

    kind = "strided " if strided else ""
    return Case(f"backward {rows} x {width} {kind}{str(dtype).removeprefix('torch.')}", call, wide=wide)


CASES = [
    Case("1 x 3072 bfloat16", lambda: swiglu(meta(1, 2 * 3072)), wide=True),
    Case("4096 x 3072 bfloat16", lambda: swiglu(meta(4096, 2 * 3072)), wide=True),
    Case("4096 x 576 float16", lambda: swiglu(meta(4096, 2 * 576, dtype=torch.float16)), wide=True),
    Case("4096 x 3072 strided bfloat16", lambda: swiglu(meta(4096, 8192)[:, : 2 * 3072]), wide=True),
    Case("64 x 1365 bfloat16", lambda: swiglu(meta(64, 2 * 1365))),
    Case("1 x 3072 float32", lambda: swiglu(meta(1, 2 * 3072, dtype=torch.float32)), wide=True),
    Case("4096 x 3072 float32", lambda: swiglu(meta(4096, 2 * 3072, dtype=torch.float32)), wide=True),
    Case("apart 4096 x 3072 bfloat16", lambda: silu_mul(meta(4096, 3072), meta(4096, 3072)), wide=True),
    Case("apart 64 x 1365 bfloat16", lambda: silu_mul(meta(64, 1365), meta(64, 1365))),
    backward(1, 3072),
    backward(4096, 3072),
    Case(
        "backward apart 4096 x 3072 bfloat16",
        lambda: silu_mul_backward(meta(4096, 3072), meta(4096, 3072), meta(4096, 3072)),
        wide=True,
    ),
    backward(4096, 576, torch.float16),
    backward(4096, 3072, strided=True),
    backward(64, 1365, wide=False),
    backward(1, 3072, torch.float32),
    backward(4096, 3072, torch.float32),
]
