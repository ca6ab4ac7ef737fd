"""Does the gradient of the routing vanish beside the products? The shapes of Qwen3-30B-A3B."""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.routing_backward import route_backward_reference

from ..case import Case, Draw, kernel
from ..peers import compiled
from ..shapes import ITEM
from .routing import CHOSEN, EXPERTS
from .swiglu import differentiated


def chosen_weights(logits: Tensor, experts: Tensor, renormalise: bool) -> Tensor:
    """The usual way, of a choice that was made."""
    weights = torch.softmax(logits, -1, dtype=torch.float32).gather(-1, experts.long())
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights).to(logits.dtype)


def backward(tokens: int, experts: int, k: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        logits = draw.normal(tokens, experts, scale=2.0)
        return draw.normal(tokens, k), logits, logits.topk(k).indices.int(), True

    return Case(
        name=f"{tokens} to {k} of {experts}",
        make=make,
        ours=kernel("routing_backward", "route_backward"),
        definition=route_backward_reference,
        reads=(tokens * experts + tokens * k) * ITEM + 4 * tokens * k,
        writes=tokens * experts * ITEM,
        flop=(10 + 6 * k) * tokens * experts,
        peers={
            "torch": differentiated(chosen_weights, wanted=(0,)),
            "torch.compile": compiled(route_backward_reference),
        },
    )


CASES = [backward(tokens, EXPERTS, CHOSEN) for tokens in (2048, 16384)]
SMOKE = [backward(3, 12, 2)]
