"""Do the gated activation and its gradient move their bytes as fast as a copy does?

8192 x 32768 is the shape of a published figure; the others are the feed-forward widths of models.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.swiglu import silu_mul_reference, swiglu_backward_reference, swiglu_reference

from ..case import Call, Case, Draw, Prepare, call, kernel
from ..peers import compiled, flashinfer, liger
from ..shapes import ITEM, MODELS, spec


def _apart(gate_up: Tensor) -> tuple[Any, ...]:
    """What Liger-Kernel takes: gate and up as tensors of their own, made outside the timing."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.contiguous(), up.contiguous()


def swiglu(rows: int, width: int) -> Case:
    return Case(
        name=f"{rows} x {width}",
        make=lambda draw: (_make(draw, rows, width),),
        ours=kernel("swiglu"),
        definition=swiglu_reference,
        reads=2 * rows * width * ITEM,
        writes=rows * width * ITEM,
        flop=5 * rows * width,
        peers={
            "torch": call(swiglu_reference),
            "torch.compile": compiled(swiglu_reference),
            "liger": liger("swiglu", "LigerSiLUMulFunction", _apart),
            "flashinfer": flashinfer(lambda package, x: lambda: package.activation.silu_and_mul(x)),
        },
    )


def apart(rows: int, width: int) -> Case:
    """Of two projections, as models of `transformers` have them."""
    return Case(
        name=f"apart {rows} x {width}",
        make=lambda draw: (draw.normal(rows, width), draw.normal(rows, width)),
        ours=kernel("swiglu", "silu_mul"),
        definition=silu_mul_reference,
        reads=2 * rows * width * ITEM,
        writes=rows * width * ITEM,
        flop=5 * rows * width,
        peers={
            "torch": call(silu_mul_reference),
            "torch.compile": compiled(silu_mul_reference),
            "liger": liger("swiglu", "LigerSiLUMulFunction", lambda *pair: pair),
        },
    )


def _make(draw: Draw, rows: int, width: int) -> Tensor:
    return draw.normal(rows, 2 * width)


def differentiated(function: Callable[..., Any], wanted: Sequence[int], outputs: int = 1) -> Prepare:
    """Autograd's backward of `function` alone, a contender on (a gradient for each of the outputs, the arguments).

    The call gives the gradients of the arguments that `wanted` counts; the forward pass, and what it saves, come before
    the timing.
    """

    def prepare(*args: Any) -> Call:
        with torch.inference_mode(False), torch.enable_grad():
            given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]  # what is drawn is for inference
            upstream, rest = given[:outputs], given[outputs:]
            leaves = [rest[index].requires_grad_() for index in wanted]
            found = function(*rest)
        results = [found] if isinstance(found, Tensor) else list(found)

        def run() -> Any:
            with torch.inference_mode(False):
                return torch.autograd.grad(results, leaves, upstream, retain_graph=True)

        return run

    return prepare


def _liger_backward(dy: Tensor, gate_up: Tensor) -> Call:
    """Liger-Kernel writes the gradients over gate and up: right at the first call only, but as much work at each."""
    function = import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
    return differentiated(function, wanted=(0, 1))(dy, *_apart(gate_up))


def backward(rows: int, width: int) -> Case:
    def observe(out: Any, args: Sequence[Any]) -> list[Tensor]:
        return [out if isinstance(out, Tensor) else torch.cat(list(out), -1)]  # Liger-Kernel's are apart

    return Case(
        name=f"backward {rows} x {width}",
        make=lambda draw: (draw.normal(rows, width), _make(draw, rows, width)),
        ours=kernel("swiglu", "swiglu_backward"),
        definition=swiglu_backward_reference,
        observe=observe,
        reads=3 * rows * width * ITEM,
        writes=2 * rows * width * ITEM,
        flop=12 * rows * width,
        peers={
            "torch": differentiated(swiglu_reference, wanted=(0,)),
            "torch.compile": compiled(swiglu_backward_reference),
            "liger": _liger_backward,
        },
    )


CASES = [
    swiglu(8192, 32768),
    *(swiglu(rows, spec(model).hidden_dim) for model in MODELS for rows in (1, 4096)),
    *(apart(4096, spec(model).hidden_dim) for model in MODELS),
    backward(8192, 32768),
    *(backward(4096, spec(model).hidden_dim) for model in MODELS),
]
SMOKE = [swiglu(3, 48), apart(3, 48), backward(3, 48)]
