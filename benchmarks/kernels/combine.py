"""Is what the experts gave summed at the speed of reading it, and its gradient had? The shapes of Qwen3-30B-A3B."""

from typing import Any

from torch import Tensor
from tritium.kernels.combine import combine_backward_reference, combine_reference

from ..case import Case, Draw, call, kernel
from ..peers import compiled
from ..shapes import ITEM
from .swiglu import differentiated

CHOSEN, HIDDEN = 8, 2048  # Qwen3-30B-A3B's
TOKENS = (1, 16, 2048)


def combine(tokens: int, k: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        weights = draw.normal(tokens, k).softmax(-1)
        return draw.normal(tokens * k, width), weights, draw.normal(tokens, width, scale=3.0)

    return Case(
        name=f"{tokens} x {k} x {width}",
        make=make,
        ours=kernel("combine"),
        definition=combine_reference,
        reads=(tokens * (k + 1) * width + tokens * k) * ITEM,
        writes=tokens * width * ITEM,
        flop=(2 * k + 1) * tokens * width,
        peers={"torch": call(combine_reference), "torch.compile": compiled(combine_reference)},
    )


def backward(tokens: int, k: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(tokens, width), draw.normal(tokens * k, width), draw.normal(tokens, k).softmax(-1)

    def alone(outputs: Tensor, weights: Tensor) -> Tensor:
        return combine_reference(outputs, weights, outputs.new_zeros(tokens, width))

    return Case(
        name=f"backward {tokens} x {k} x {width}",
        make=make,
        ours=kernel("combine", "combine_backward"),
        definition=combine_backward_reference,
        reads=(tokens * (k + 1) * width + tokens * k) * ITEM,
        writes=(tokens * k * width + tokens * k) * ITEM,
        flop=3 * k * tokens * width,
        peers={
            "torch": differentiated(alone, wanted=(0, 1)),
            "torch.compile": compiled(combine_backward_reference),
        },
    )


CASES = [*(combine(tokens, CHOSEN, HIDDEN) for tokens in TOKENS), backward(2048, CHOSEN, HIDDEN)]
SMOKE = [combine(3, 2, 24), backward(3, 2, 24)]
