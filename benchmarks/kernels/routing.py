"""Does choosing and sorting experts vanish beside the products that it is for?

The shapes of Qwen3-30B-A3B: a decode step of one sequence and of 16, and a prompt. Between equal logits a peer may
choose either.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.routing import group_reference, route_reference

from ..case import Case, Draw, call, kernel
from ..peers import compiled
from ..shapes import ITEM

EXPERTS, CHOSEN = 128, 8  # Qwen3-30B-A3B's
TOKENS = (1, 16, 2048)


def misrouted(out: Sequence[Tensor], logits: Tensor, k: int, renormalise: bool) -> str | None:
    """What is wrong with (experts, weights) of logits [T, E]; None where they are right."""
    experts, weights = out[0].long(), out[1]
    if experts.shape != (len(logits), k) or weights.shape != experts.shape or weights.dtype != logits.dtype:
        return f"experts are {list(experts.shape)}, weights {list(weights.shape)} {weights.dtype}"
    if experts.min() < 0 or experts.max() >= logits.shape[1] or (experts.sort(-1).values.diff(dim=-1) == 0).any():
        return "an expert does not exist, or was chosen twice"
    if not torch.equal(logits.gather(1, experts), logits.sort(-1, descending=True).values[:, :k]):
        return "the experts are not the likeliest, likeliest first"
    exact = logits.double().softmax(-1).gather(1, experts)
    if renormalise:
        exact = exact / exact.sum(-1, keepdim=True)
    off = ((weights.double() - exact).abs() / exact).max().item()
    # One rounding, and before it a few of float32.
    return None if off <= max(0.6 * torch.finfo(weights.dtype).eps, 3e-6) else f"a weight is off by {off:.2g} of itself"


def top_k(logits: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The usual way, as transformers' Qwen3 has it."""
    weights, experts = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights.to(logits.dtype)


def route(tokens: int, experts: int, k: int) -> Case:
    return Case(
        name=f"route {tokens} to {k} of {experts}",
        make=lambda draw: (draw.normal(tokens, experts, scale=2.0), k, True),
        ours=kernel("routing", "route"),
        definition=route_reference,
        reads=tokens * experts * ITEM,
        writes=tokens * k * (4 + ITEM),
        flop=(8 + 5 * k) * tokens * experts,
        peers={"torch": call(top_k), "torch.compile": compiled(top_k)},
        check=lambda out, args: misrouted(out, *args),
    )


def misgrouped(out: Sequence[Tensor], experts: Tensor, num_experts: int) -> str | None:
    """What is wrong with (order, starts); None where they are right."""
    for name, got, expected in zip(("order", "starts"), out, group_reference(experts, num_experts), strict=True):
        if not torch.equal(got, expected.to(got.dtype)):
            return f"{name} is not the definition's"
    return None


def sort_and_count(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The usual way: a stable sort, and a count."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0)
    return order, torch.cat((ends.new_zeros(1), ends))


def group(tokens: int, k: int, experts: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.uniform(tokens, experts).topk(k).indices.int(), experts

    return Case(
        name=f"group {tokens} x {k} by {experts}",
        make=make,
        ours=kernel("routing", "group"),
        definition=group_reference,
        reads=4 * tokens * k,
        writes=4 * (tokens * k + experts + 1),
        flop=2 * tokens * k,
        peers={"torch": call(group_reference), "sort and bincount": call(sort_and_count)},
        check=lambda out, args: misgrouped(out, *args),
    )


CASES = [
    *(route(tokens, EXPERTS, CHOSEN) for tokens in TOKENS),
    *(group(tokens, CHOSEN, EXPERTS) for tokens in TOKENS),
]
SMOKE = [route(3, 12, 2), group(3, 2, 5)]
