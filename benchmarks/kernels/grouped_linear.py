"""Do the products of a mixture of experts read the weights of those experts that have tokens at the speed of memory?

Both products of a layer, gated up and plain down, from one token, of whose k experts each has one row, to a prompt that
touches all experts. Each token's experts are drawn alike likely: a trained router is less even, and touches fewer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.grouped_linear import grouped_linear_reference, grouped_swiglu_reference
from tritium.kernels.swiglu import swiglu_reference

from ..case import Call, Case, Draw, Prepare, call, kernel
from ..shapes import ITEM

SEED = 30  # of the routings: floors count the experts that they touch, so they do not change from run to run


@dataclass(frozen=True)
class Layer:
    """The shape of a mixture of experts."""

    name: str
    hidden: int
    experts: int
    k: int
    width: int


def grouped_mm(gated: bool) -> Prepare:
    """PyTorch's grouped product on the rows of x in the experts' order, which it needs, and its result put back."""

    def prepare(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Call:
        product: Any = torch._grouped_mm
        places, ends, turned = order.long(), starts[1:].clone(), weight.transpose(1, 2)
        rows = places // k

        def run() -> Tensor:
            y = product(x[rows], turned, offs=ends)
            y = swiglu_reference(y) if gated else y
            return torch.empty_like(y).index_copy_(0, places, y)

        return run

    return prepare


def routed(layer: Layer, tokens: int) -> tuple[list[int], list[int], int]:
    """`order` and `starts`, and how many experts they touch."""
    chosen = Draw(torch.device("cpu"), SEED).uniform(tokens, layer.experts).argsort(dim=1)[:, : layer.k].flatten()
    counts = torch.bincount(chosen, minlength=layer.experts)
    starts = [0, *counts.cumsum(0).tolist()]
    return chosen.argsort(stable=True).tolist(), starts, int(counts.count_nonzero())


def grouped(layer: Layer, tokens: int, gated: bool) -> Case:
    """The gated product of `tokens` rows, or the plain one of a row for each assignment."""
    count, k = tokens * layer.k, layer.k if gated else 1
    outputs, depth = (layer.width, layer.hidden) if gated else (layer.hidden, layer.width)
    features, rows = 2 * outputs if gated else outputs, tokens if gated else count
    order, starts, touched = routed(layer, tokens)

    def make(draw: Draw) -> tuple[Any, ...]:
        weight = draw.normal(layer.experts, features, depth, scale=depth**-0.5)
        return draw.normal(rows, depth), weight, draw.whole(order), draw.whole(starts), k

    definition = grouped_swiglu_reference if gated else grouped_linear_reference
    return Case(
        name=f"{layer.name} {'gate_up' if gated else 'down'} {tokens} x {features} x {depth}",
        make=make,
        ours=kernel("grouped_linear", "grouped_swiglu" if gated else "grouped_linear"),
        definition=definition,
        reads=(touched * features * depth + rows * depth) * ITEM,
        writes=count * outputs * ITEM,
        flop=2 * count * features * depth,
        peers={"torch": call(definition), "torch._grouped_mm": grouped_mm(gated)},
    )


SMALLER, LARGER = Layer("qwen3 30B-A3B", 2048, 128, 8, 768), Layer("qwen3 235B-A22B", 4096, 128, 8, 1536)
TINY = Layer("tiny", 32, 5, 2, 24)
CASES = [
    *(grouped(SMALLER, tokens, gated) for tokens in (1, 16, 64, 2048) for gated in (True, False)),
    *(grouped(LARGER, 1, gated) for gated in (True, False)),
]
SMOKE = [grouped(TINY, tokens, gated) for tokens in (1, 9) for gated in (True, False)]
