"""The linear layers of a decode step: every row of the tables, each form, each kind of weight, edges."""

from collections.abc import Callable

import torch
from tritium.kernels.decode_linear import decode_linear_residual, norm_head, norm_linear, norm_linear_swiglu

from .matrix import Case, meta


def weights(height: int, depth: int, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight and its scale."""
    if bits == 8:
        return meta(height, depth, dtype=torch.int8), meta(height, dtype=torch.float32)
    if bits == 4:
        blocks = -(-depth // 64)
        return meta(height, blocks * 32, dtype=torch.uint8), meta(height, blocks, dtype=dtype)
    return meta(height, depth, dtype=dtype), None


def call(
    form: str, rows: int, width: int, depth: int, bits: int = 16, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], object]:
    def run() -> object:
        x, norm = meta(rows, depth, dtype=dtype), meta(depth, dtype=dtype)
        out = meta(rows, width, dtype=dtype)  # as in a captured step, whose kernels start early
        weight, scale = weights(2 * width if form == "swiglu" else width, depth, bits, dtype)
        if form == "swiglu":
            return norm_linear_swiglu(x, norm, 1e-6, weight, None, scale, out=out)
        if form == "residual":
            return decode_linear_residual(x, weight, None, out, scale, out=out)
        if form == "head":
            return norm_head(x, norm, 1e-6, weight, scale, width - 7, out=out)
        return norm_linear(x, norm, 1e-6, weight, None, scale, out=out)

    return run


CASES = [
    *(
        Case(f"{form} {rows}x{width}x{depth} bfloat16", call(form, rows, width, depth), wide=True, dependent=True)
        for form, rows, width, depth in (
            ("plain", 1, 6144, 4096),
            ("residual", 1, 1024, 3072),
            ("swiglu", 1, 3072, 1024),
            ("head", 1, 151936, 1024),
            ("swiglu", 16, 3072, 1024),
            ("swiglu", 17, 3072, 1024),
        )
    ),
    Case("8 bits swiglu 8x3072x1024 bfloat16", call("swiglu", 8, 3072, 1024, 8), wide=True, dependent=True),
    Case("4 bits swiglu 8x3072x1024 bfloat16", call("swiglu", 8, 3072, 1024, 4), wide=True, dependent=True),
    Case("4 bits head 16x32000x576 float16", call("head", 16, 32000, 576, 4, torch.float16), wide=True, dependent=True),
    Case("unaligned swiglu 1x4097x1025 bfloat16", call("swiglu", 1, 4097, 1025), dependent=True),
    Case(
        "4 bits swiglu 1x3072x1024 float32", call("swiglu", 1, 3072, 1024, 4, torch.float32), wide=True, dependent=True
    ),
    Case("swiglu 1x3072x1024 float32", call("swiglu", 1, 3072, 1024, 32, torch.float32), wide=True, dependent=True),
]
