"""What do weights of 8 and 4 bits save where weights are what is read, and what do they cost where arithmetic is?

Each weight matrix of a layer: for one token against its floor, the bytes of values and scales; for many tokens against
cuBLAS on the same weight in bfloat16, which reads two to four times as much and has nothing to convert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from tritium.kernels.quantised_linear import BLOCK, dequantise_reference, quantise, quantised_linear_reference

from ..case import Call, Case, Draw, kernel
from ..shapes import ITEM, projections


def unquantised(x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> Call:
    """The vendor's product with the weight in x's dtype."""
    weight = dequantise_reference(values, scale)[:, : x.shape[1]].to(x.dtype)
    return lambda: F.linear(x, weight)


def quantised(name: str, bits: int, tokens: int, features: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(features, width, scale=width**-0.5)
        return draw.normal(tokens, width), *quantise(weight, bits)

    scales = 4 * features if bits == 8 else features * -(-width // BLOCK) * ITEM
    return Case(
        name=f"{name} {bits} bits {tokens} x {features} x {width}",
        make=make,
        ours=kernel("quantised_linear"),
        definition=quantised_linear_reference,
        reads=features * width * bits // 8 + scales + tokens * width * ITEM,
        writes=tokens * features * ITEM,
        flop=2 * tokens * features * width,
        peers={"F.linear": unquantised},
    )


CASES = [
    *(
        quantised(f"{model} {name}", bits, tokens, *projections(model)[name])
        for model, name, tokens in (
            ("qwen3 8B", "gate_up", 1),
            ("qwen3 8B", "gate_up", 2048),
            ("mobilellm 950m", "down", 1),
        )
        for bits in (8, 4)
    ),
    quantised("qwen3 8B head", 8, 1, *projections("qwen3 8B")["head"]),
]
SMOKE = [quantised("tiny", 8, 3, 48, 32), quantised("tiny", 4, 2, 32, 144)]
