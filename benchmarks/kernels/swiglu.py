"""Does the gated activation move its bytes as fast as a copy does?

8192 x 32768 is the shape of a published figure; the others are the feed-forward widths of models.
"""

from typing import Any

from torch import Tensor
from tritium.kernels.swiglu import swiglu_reference

from ..case import Case, Draw, call, kernel
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


def _make(draw: Draw, rows: int, width: int) -> Tensor:
    return draw.normal(rows, 2 * width)


CASES = [
    swiglu(8192, 32768),
    *(swiglu(rows, spec(model).hidden_dim) for model in MODELS for rows in (1, 4096)),
]
SMOKE = [swiglu(3, 48)]
