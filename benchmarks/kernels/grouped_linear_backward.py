"""Do the gradients of a mixture's products come near the speed of a dense product, or of writing the weights' gradient?

Of both products of a layer: by its assignments' rows, and by the weights of all experts. The routings are those of
grouped_linear's benchmark; with few tokens an expert, writing dweight is the floor.
"""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.grouped_linear_backward import grouped_linear_dweight_reference, grouped_linear_dx_reference

from ..case import Call, Case, Draw, call, kernel
from ..shapes import ITEM
from .grouped_linear import SMALLER, TINY, Layer, routed


def _sorted_dx(dy: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Call:
    """PyTorch's grouped product on the rows of dy in the experts' order, which it needs; put back, and summed."""
    product: Any = torch._grouped_mm
    places, ends = order.long(), starts[1:].clone()

    def run() -> Tensor:
        rows = product(dy[places], weight, offs=ends)
        rows = torch.empty_like(rows).index_copy_(0, places, rows)
        return rows if k == 1 else rows.unflatten(0, (-1, k)).sum(1)

    return run


def _sorted_dweight(dy: Tensor, x: Tensor, order: Tensor, starts: Tensor, k: int) -> Call:
    """The same product, ragged where it sums."""
    product: Any = torch._grouped_mm
    places, ends = order.long(), starts[1:].clone()
    rows = places // k
    return lambda: product(dy[places].t(), x[rows], offs=ends)


def backward(layer: Layer, tokens: int, gated: bool, by_weight: bool) -> Case:
    """Of the packed gate_up product of `tokens` rows, or the down product of a row for each assignment."""
    count, k = tokens * layer.k, layer.k if gated else 1
    width, depth = (2 * layer.width, layer.hidden) if gated else (layer.hidden, layer.width)
    rows, (order, starts, touched) = count // k, routed(layer, tokens)

    def make(draw: Draw) -> tuple[Any, ...]:
        dy = draw.normal(count, width)
        given = draw.normal(rows, depth) if by_weight else draw.normal(layer.experts, width, depth, scale=width**-0.5)
        return dy, given, draw.whole(order), draw.whole(starts), k

    name, definition = (
        ("dweight", grouped_linear_dweight_reference) if by_weight else ("dx", grouped_linear_dx_reference)
    )
    weights = (layer.experts if by_weight else touched) * width * depth
    return Case(
        name=f"{layer.name} {'gate_up' if gated else 'down'} {name} {tokens} x {width} x {depth}",
        make=make,
        ours=kernel("grouped_linear_backward", f"grouped_linear_{name}"),
        definition=definition,
        reads=(count * width + (rows * depth if by_weight else weights)) * ITEM,
        writes=(weights if by_weight else rows * depth) * ITEM,
        flop=2 * count * width * depth,
        peers={
            "torch": call(definition),
            "torch._grouped_mm": _sorted_dweight if by_weight else _sorted_dx,
        },
    )


BOTH = (True, False)
CASES = [
    backward(SMALLER, tokens, gated, by_weight) for tokens in (2048, 16384) for gated in BOTH for by_weight in BOTH
]
SMOKE = [backward(TINY, 9, gated, by_weight) for gated in BOTH for by_weight in BOTH]
