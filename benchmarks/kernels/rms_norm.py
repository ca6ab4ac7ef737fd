"""Do the RMSNorm kernels move their bytes as fast as a copy does, for one token and many, with and without a residual?

8192 x 8192, 131072 x 128 (QK-norm) and the backward's 16384 x 4096 are shapes of published figures; the others are the
streams of models. A peer's backward is timed alone, its forward being preparation.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tritium.kernels.rms_norm import add_rms_norm_reference, rms_norm_backward_reference, rms_norm_reference

from ..case import Call, Case, Draw, Prepare, call, kernel, launcher
from ..peers import compiled, flashinfer, liger
from ..shapes import ITEM, MODELS, spec

EPS = 1e-6


def norm(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(width)

    def definition(x, weight):  # type: ignore[no-untyped-def]
        return rms_norm_reference(x, weight, EPS)

    return Case(
        name=f"{rows} x {width}",
        make=make,
        ours=kernel("rms_norm", None, EPS),
        definition=definition,
        reads=(rows * width + width) * ITEM,
        writes=rows * width * ITEM,
        flop=4 * rows * width,
        peers={
            "torch": call(definition),
            "torch.compile": compiled(definition),
            "F.rms_norm": call(lambda x, weight: F.rms_norm(x, (width,), weight, EPS)),
            "liger": liger("rms_norm", "LigerRMSNormFunction", lambda x, weight: (x, weight, EPS, 0.0, "llama", False)),
            "flashinfer": flashinfer(lambda package, x, weight: lambda: package.norm.rmsnorm(x, weight, EPS)),
        },
    )


def add_norm(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(rows, width), draw.normal(width)

    def definition(x, residual, weight):  # type: ignore[no-untyped-def]
        return add_rms_norm_reference(x, residual, weight, EPS)

    return Case(
        name=f"residual {rows} x {width}",
        make=make,
        ours=kernel("rms_norm", "add_rms_norm", EPS),
        definition=definition,
        reads=(2 * rows * width + width) * ITEM,
        writes=2 * rows * width * ITEM,
        flop=5 * rows * width,
        peers={"torch": call(definition), "torch.compile": compiled(definition)},
    )


def differentiated(forward: Callable[..., Tensor]) -> Prepare:
    """Autograd through `forward(*inputs)` as a contender, called with (dy, *inputs): the gradient of each input."""

    def prepare(dy: Tensor, *inputs: Tensor) -> Call:
        with torch.inference_mode(False), torch.enable_grad():
            given = dy.clone()
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            out = forward(*leaves)

        def run() -> Any:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(out, leaves, given, retain_graph=True)

        return run

    return prepare


def liger_forward(module: str, name: str, *rest: Any) -> Callable[..., Tensor]:
    """Liger-Kernel's autograd function, on the inputs and `rest`."""

    def forward(*inputs: Tensor) -> Tensor:
        found: Tensor = getattr(import_module(f"liger_kernel.ops.{module}"), name).apply(*inputs, *rest)
        return found

    return forward


def backward(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(rows, width), draw.normal(width)

    def definition(dy, x, weight):  # type: ignore[no-untyped-def]
        return rms_norm_backward_reference(dy, x, weight, EPS)

    return Case(
        name=f"backward {rows} x {width}",
        make=make,
        ours=kernel("rms_norm", "rms_norm_backward", EPS),
        definition=definition,
        reads=(2 * rows * width + width) * ITEM,
        writes=(rows * width + width) * ITEM,
        flop=9 * rows * width,
        peers={
            "torch": differentiated(lambda x, weight: rms_norm_reference(x, weight, EPS)),
            "torch.compile": compiled(definition),
            "F.rms_norm": differentiated(lambda x, weight: F.rms_norm(x, (width,), weight, EPS)),
            "liger": differentiated(liger_forward("rms_norm", "LigerRMSNormFunction", EPS, 0.0, "llama", False)),
        },
    )


def add_backward(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return *(draw.normal(rows, width) for _ in range(4)), draw.normal(width)

    def definition(dy, dstream, x, residual, weight):  # type: ignore[no-untyped-def]
        return rms_norm_backward_reference(dy, x, weight, EPS, True, residual, dstream)

    def ours(dy: Tensor, dstream: Tensor, x: Tensor, residual: Tensor, weight: Tensor) -> Call:
        function = launcher("rms_norm", "rms_norm_backward")
        return lambda: function(dy, x, weight, EPS, True, residual, dstream)

    return Case(
        name=f"backward residual {rows} x {width}",
        make=make,
        ours=ours,
        definition=definition,
        reads=(4 * rows * width + width) * ITEM,
        writes=(rows * width + width) * ITEM,
        flop=11 * rows * width,
        peers={"torch": call(definition), "torch.compile": compiled(definition)},
    )


WIDTHS = [spec(model).embedding_dim for model in MODELS]
CASES = [
    norm(8192, 8192),
    norm(131072, 128),
    *(norm(rows, width) for width in WIDTHS for rows in (1, 4096)),
    add_norm(8192, 8192),
    *(add_norm(rows, width) for width in WIDTHS[1:2] for rows in (1, 4096)),
    backward(16384, 4096),
    backward(131072, 128),
    *(backward(4096, width) for width in (*WIDTHS, 8192)),
    *(add_backward(rows, width) for width in WIDTHS[1:2] for rows in (4096, 16384)),
]
SMOKE = [norm(3, 64), add_norm(2, 48), backward(3, 64), add_backward(2, 48)]
