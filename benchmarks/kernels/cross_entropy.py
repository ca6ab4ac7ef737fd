"""Does the loss cost one reading of the logits, and its gradient one more and a writing? Vocabularies of GPT and Qwen3.

As contenders of the backward, autograd and torch.compile start from what their forward saved; ours starts from the
logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.cross_entropy import cross_entropy_backward_reference, cross_entropy_reference

from ..case import Call, Case, Draw, call, kernel
from ..peers import compiled, liger
from ..shapes import ITEM, spec

TOKENS = 2048
NEAR = 2e-6  # of the loss: float32 sums of as many rows
IGNORED = 8  # one row in so many


def _labels(draw: Draw, tokens: int, vocabulary: int) -> Tensor:
    labels = draw.integers(vocabulary, tokens)
    return labels.masked_fill(draw.integers(IGNORED, tokens) == 0, -100)


def loss(tokens: int, vocabulary: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(tokens, vocabulary, scale=2.0), _labels(draw, tokens, vocabulary)

    def check(out: Any, args: Sequence[Any]) -> str | None:
        """One number has no largest error of many: it is held to the truth by itself."""
        found = out[0] if isinstance(out, tuple) else out
        if found.dtype != torch.float32 or found.shape != ():
            return f"the loss is {found.dtype} {list(found.shape)}"
        truth = cross_entropy_reference(args[0].double(), args[1]).item()
        off = abs(found.item() - truth) / truth
        return None if off <= NEAR else f"the loss is off by {off:.2g}"

    return Case(
        name=f"{tokens} x {vocabulary}",
        make=make,
        ours=kernel("cross_entropy"),
        definition=cross_entropy_reference,
        reads=tokens * (vocabulary * ITEM + 8),
        writes=4,
        flop=5 * tokens * vocabulary,
        peers={
            "torch": call(cross_entropy_reference),
            "torch.compile": compiled(cross_entropy_reference),
            "liger": liger("cross_entropy", "LigerCrossEntropyFunction", lambda *args: args),
        },
        check=check,
    )


def _autograd(logits: Tensor, labels: Tensor, gradient: Tensor) -> Call:
    """The gradient by autograd; the forward is not timed."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf, label, share = logits.clone().requires_grad_(), labels.clone(), gradient.clone()
        value = cross_entropy_reference(leaf, label)

    def run() -> Tensor:
        with torch.inference_mode(False):
            return torch.autograd.grad(value, leaf, share, retain_graph=True)[0]

    return run


def backward(tokens: int, vocabulary: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        share = draw.uniform(1)[0] + 0.5
        return draw.normal(tokens, vocabulary, scale=2.0), _labels(draw, tokens, vocabulary), share

    return Case(
        name=f"backward {tokens} x {vocabulary}",
        make=make,
        ours=kernel("cross_entropy", "cross_entropy_backward"),
        definition=cross_entropy_backward_reference,
        reads=tokens * (vocabulary * ITEM + 8) + 4,
        writes=tokens * vocabulary * ITEM,
        flop=11 * tokens * vocabulary,
        peers={
            "torch": call(cross_entropy_backward_reference),
            "torch autograd": _autograd,
            "torch.compile": compiled(cross_entropy_backward_reference),
        },
    )


VOCABULARIES = (50257, 128256, spec("qwen3 8B").vocab_size)
CASES = [make(TOKENS, vocabulary) for vocabulary in VOCABULARIES for make in (loss, backward)]
SMOKE = [loss(5, 40), backward(5, 40)]
