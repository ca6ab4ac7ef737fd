"""What does it cost that the logits never stand whole? The heads of Qwen3; the peers let them stand."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tritium.kernels.linear_cross_entropy import (
    linear_cross_entropy_backward_reference,
    linear_cross_entropy_reference,
)

from ..case import Case, Draw, call, kernel
from ..peers import compiled
from ..shapes import ITEM, spec

TOKENS = 2048
NEAR = 1e-3  # of the loss: logits that are rounded, each to its dtype


def _make(tokens: int, width: int, vocabulary: int) -> Callable[[Draw], tuple[Any, ...]]:
    """x, a weight for which logits spread by 2, labels."""
    return lambda draw: (
        draw.normal(tokens, width),
        draw.normal(vocabulary, width, scale=2 * width**-0.5),
        draw.integers(vocabulary, tokens),
    )


def loss(tokens: int, width: int, vocabulary: int) -> Case:
    def check(out: Any, args: Sequence[Any]) -> str | None:
        truth = linear_cross_entropy_reference(args[0].double(), args[1].double(), args[2]).item()
        off = abs(out.item() - truth) / truth
        return None if off <= NEAR else f"the loss is off by {off:.2g}"

    return Case(
        name=f"{tokens} x {width} x {vocabulary}",
        make=_make(tokens, width, vocabulary),
        ours=kernel("linear_cross_entropy"),
        definition=linear_cross_entropy_reference,
        reads=(tokens + vocabulary) * width * ITEM + 8 * tokens,
        writes=4,
        flop=2 * tokens * width * vocabulary,
        peers={
            "torch": call(linear_cross_entropy_reference),
            "torch.compile": compiled(linear_cross_entropy_reference),
        },
        check=check,
    )


def backward(tokens: int, width: int, vocabulary: int) -> Case:
    inputs = _make(tokens, width, vocabulary)

    def make(draw: Draw) -> tuple[Any, ...]:
        return *inputs(draw), draw.uniform(1)[0] + 0.5

    def definition(*args: Any) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy_backward_reference(*args)

    return Case(
        name=f"backward {tokens} x {width} x {vocabulary}",
        make=make,
        ours=kernel("linear_cross_entropy", "linear_cross_entropy_backward"),
        definition=definition,
        reads=(tokens + vocabulary) * width * ITEM + 8 * tokens + 4,
        writes=(tokens + vocabulary) * width * ITEM,
        flop=6 * tokens * width * vocabulary,
        peers={"torch": call(definition), "torch.compile": compiled(definition)},
    )


HEADS = [(spec(name).embedding_dim, spec(name).vocab_size) for name in ("qwen3 0.6B", "qwen3 8B")]
CASES = [make(TOKENS, *head) for head in HEADS for make in (loss, backward)]
SMOKE = [loss(5, 32, 40), backward(5, 32, 40)]
