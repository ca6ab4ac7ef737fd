"""Do QK-norm, rotation and the write into the cache cost one pass over the projection, and one launch when decoding?

The form that models run: with the write into a paged cache, each token at a random place of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.qk_norm_rope import qk_norm_rope_at_reference, qk_norm_rope_cache_reference

from ..case import Call, Case, Draw, call, launcher
from ..peers import compiled
from ..shapes import ITEM, MODELS, spec

PAGE = 256
EPS = 1e-6
CONTEXT = 8192


def rotate(model: str, tokens: int) -> Case:
    shape = spec(model)
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    weighted, first = shape.qk_norm == "weighted", shape.qk_norm_position == "before_rope"
    pages, context = -(-tokens // PAGE) + 1, min(CONTEXT, shape.context_length)

    def make(draw: Draw) -> tuple[Any, ...]:
        angles = draw.uniform(context, head_dim // 2) * 6.283
        return (
            draw.normal(tokens, (heads + 2 * kv_heads) * head_dim),
            torch.stack((angles.cos(), angles.sin()), 1),
            draw.integers(context, tokens),
            torch.float32 if shape.rope_dtype == "float32" else draw.dtype,
            draw.normal(heads + kv_heads, head_dim) if weighted else None,
            draw.normal(kv_heads, pages, PAGE, head_dim),
            draw.normal(kv_heads, pages, PAGE, head_dim),
            draw.permutation(pages * PAGE)[:tokens].contiguous(),
        )

    def arranged(
        qkv: Tensor, table: Tensor, positions: Tensor, dtype: torch.dtype, weight: Tensor | None, *cache: Tensor
    ) -> tuple[Any, ...]:
        return qkv, heads, kv_heads, table, positions, dtype, True, weight, EPS, first, None, *cache

    def ours(*args: Any) -> Call:
        qk_norm_rope_cache, given = launcher("qk_norm_rope", "qk_norm_rope_cache"), arranged(*args)
        return lambda: qk_norm_rope_cache(*given)

    def definition(*args: Any) -> Tensor:
        return qk_norm_rope_cache_reference(*arranged(*args))

    def fusible(*args: Any) -> Tensor:
        """The definition for tokens that all have a slot: no shape depends on values."""
        *given, k_cache, v_cache, slots = arranged(*args)
        q, k, v = qk_norm_rope_at_reference(*given)
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.flatten(1, 2).index_copy_(1, slots, new.transpose(0, 1))
        return q

    def observe(out: Any, args: Sequence[Any]) -> list[Tensor]:
        return [out, args[5], args[6]]

    moved = tokens * (heads + 2 * kv_heads) * head_dim * ITEM
    return Case(
        name=f"{model} {heads}/{kv_heads} d{head_dim} tokens {tokens}",
        make=make,
        ours=ours,
        definition=definition,
        observe=observe,
        reads=moved,
        writes=moved,
        flop=10 * tokens * (heads + kv_heads) * head_dim,
        peers={"torch": call(fusible), "torch.compile": compiled(fusible)},
    )


CASES = [rotate(model, tokens) for model in MODELS for tokens in (1, 64, 4096)]
SMOKE = [rotate("tiny", 3)]
