"""Does the gradient of QK-norm and rotation cost one pass over the projection, the sums of the weight's included?

Gradients of q and k arrive as attention's backward leaves them, and v's part of the result is zeros.
"""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.qk_norm_rope import qk_norm_rope_at_reference
from tritium.kernels.qk_norm_rope_backward import qk_norm_rope_backward_reference

from ..case import Call, Case, Draw, launcher
from ..peers import compiled
from ..shapes import ITEM, MODELS, spec
from .swiglu import differentiated

EPS = 1e-6
CONTEXT = 8192


def backward(model: str, tokens: int) -> Case:
    shape = spec(model)
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    weighted, first = shape.qk_norm == "weighted", shape.qk_norm_position == "before_rope"
    context = min(CONTEXT, shape.context_length)

    def make(draw: Draw) -> tuple[Any, ...]:
        angles = draw.uniform(context, head_dim // 2) * 6.283
        return (
            draw.normal(tokens, heads, head_dim),
            draw.normal(tokens, kv_heads, head_dim),
            draw.normal(tokens, (heads + 2 * kv_heads) * head_dim),
            torch.stack((angles.cos(), angles.sin()), 1),
            draw.integers(context, tokens),
            torch.float32 if shape.rope_dtype == "float32" else draw.dtype,
            draw.normal(heads + kv_heads, head_dim) if weighted else None,
        )

    def arranged(qkv: Tensor, table: Tensor, positions: Tensor, dtype: torch.dtype, weight: Tensor | None) -> Any:
        return qkv, heads, kv_heads, table, positions, dtype, True, weight, EPS, first

    def given(gradients: tuple[Tensor, ...]) -> list[Tensor]:
        """The gradients that there are: none of a weight that is not there."""
        return [gradient for gradient in gradients if gradient.numel()]

    def ours(dq: Tensor, dk: Tensor, *args: Any) -> Call:
        function, rest = launcher("qk_norm_rope_backward"), arranged(*args)
        return lambda: given(function(dq, dk, *rest))

    def definition(dq: Tensor, dk: Tensor, *args: Any) -> list[Tensor]:
        return given(qk_norm_rope_backward_reference(dq, dk, *arranged(*args)))

    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return qk_norm_rope_at_reference(*arranged(*args))[:2]

    rotated, count = tokens * (heads + kv_heads) * head_dim, tokens * (heads + 2 * kv_heads) * head_dim
    gain = (heads + kv_heads) * head_dim if weighted else 0
    return Case(
        name=f"{model} {heads}/{kv_heads} d{head_dim} tokens {tokens}",
        make=make,
        ours=ours,
        definition=definition,
        reads=(2 * rotated + gain) * ITEM,
        writes=(count + gain) * ITEM,
        flop=20 * rotated,
        peers={
            "torch": differentiated(forward, wanted=(0, 4) if weighted else (0,), outputs=2),
            "torch.compile": compiled(definition),
        },
    )


CASES = [backward(model, tokens) for model in MODELS for tokens in (64, 4096)]
SMOKE = [backward("tiny", 3)]
