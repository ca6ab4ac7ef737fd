"""How near does the gradient of causal attention come to cuDNN's?

The forward pass, and what it keeps, come before the timing. 64 query heads over 8, head dim 128, one sequence, is the
shape of the published cuDNN figures. Five products a visible pair are counted, though two kernels make seven: what is
found twice is no work that must be done.
"""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.attention import attention_reference
from tritium.kernels.attention_backward import attention_backward_reference, attention_with_lse_reference

from ..case import Call, Case, Draw, Prepare, launcher
from ..peers import sdpa
from ..shapes import ITEM, MODELS
from .attention import _of, visible_pairs
from .swiglu import differentiated


def backward(name: str, heads: int, kv_heads: int, head_dim: int, lengths: list[int]) -> Case:
    """One batch of sequences, each of which attends to itself; `lengths` are their tokens."""
    scale, tokens = head_dim**-0.5, sum(lengths)
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]

    def make(draw: Draw) -> tuple[Any, ...]:
        return (
            draw.normal(tokens, heads, head_dim),
            draw.normal(tokens, heads, head_dim),
            draw.normal(tokens, kv_heads, head_dim),
            draw.normal(tokens, kv_heads, head_dim),
            draw.whole([0, *ends]),
        )

    def ours(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Call:
        function = launcher("attention_backward")
        out, lse = launcher("attention_backward", "attention_with_lse")(q, k, v, starts, scale)
        return lambda: function(dout, q, k, v, out, lse, starts, scale)

    def definition(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> list[Tensor]:
        """One key/value head after another: scores of all would not fit in memory."""
        parts, group = [], heads // kv_heads
        for head in range(kv_heads):
            of, to = slice(head * group, (head + 1) * group), slice(head, head + 1)
            mine = (q[:, of], k[:, to], v[:, to])
            kept = attention_with_lse_reference(*mine, starts, scale)
            parts.append(attention_backward_reference(dout[:, of], *mine, *kept, starts, scale))
        return [torch.cat(gradients, 1) for gradients in zip(*parts, strict=True)]

    def across(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def fused(backend: str) -> Prepare:
        forward = sdpa(backend, across, True, scale)
        return differentiated(lambda *args: forward(*args)(), wanted=(0, 1, 2))

    peers: dict[str, Prepare] = {}
    if len(set(lengths)) == 1:  # they know no sequences of different lengths
        peers = {"cuDNN": fused("CUDNN_ATTENTION"), "FlashAttention-2 (SDPA)": fused("FLASH_ATTENTION")}
    if tokens <= 4096:
        plain = differentiated(lambda q, k, v, starts: attention_reference(q, k, v, starts, scale), wanted=(0, 1, 2))
        peers["torch"] = plain
    queries, keys = tokens * heads * head_dim, tokens * kv_heads * head_dim
    return Case(
        name=f"{name} {heads}/{kv_heads} d{head_dim} {' + '.join(map(str, lengths))}",
        make=make,
        ours=ours,
        definition=definition,
        reads=(3 * queries + 2 * keys) * ITEM + 4 * tokens * heads,
        writes=(queries + 2 * keys) * ITEM,
        flop=10 * heads * head_dim * sum(visible_pairs(length, length) for length in lengths),
        peers=peers,
    )


CASES = [
    *(backward("GQA", 64, 8, 128, [length * 1024]) for length in (2, 4, 8)),
    *(backward(*_of(model), [4096]) for model in MODELS),
    backward(*_of("qwen3 0.6B"), [1024] * 4),
    backward(*_of("qwen3 0.6B"), [2900, 700, 300, 150, 46]),
]
SMOKE = [backward("tiny", 4, 2, 16, [20]), backward("tiny", 4, 2, 16, [9, 9]), backward("tiny", 2, 1, 16, [11, 3])]
