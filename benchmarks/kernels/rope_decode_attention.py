"""What does a decode step's attention cost as one launch, with QK-norm, rotation and the write into the cache?

Every row's new key is its last, in pages that lie in random order in the pool. The peer is the same in our two unfused
operations; attention alone is compared with others in `decode_attention`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.rope_decode_attention import rope_decode_attention_reference

from ..case import Call, Case, Draw, launcher
from ..shapes import ITEM, MODELS, spec

PAGE, EPS = 256, 1e-6


def decode(model: str, rows: int, length: int) -> Case:
    shape = spec(model)
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    weighted, first = shape.qk_norm == "weighted", shape.qk_norm_position == "before_rope"
    pages, scale = -(-length // PAGE), head_dim**-0.5

    def make(draw: Draw) -> tuple[Any, ...]:
        angles = draw.uniform(length, head_dim // 2) * 6.283
        table = draw.permutation(rows * pages).view(rows, pages)
        return (
            draw.normal(rows, (heads + 2 * kv_heads) * head_dim),
            torch.stack((angles.cos(), angles.sin()), 1),
            draw.whole([length - 1] * rows, torch.int64),
            torch.float32 if shape.rope_dtype == "float32" else draw.dtype,
            draw.normal(heads + kv_heads, head_dim) if weighted else None,
            draw.normal(kv_heads, rows * pages, PAGE, head_dim),
            draw.normal(kv_heads, rows * pages, PAGE, head_dim),
            table[:, -1] * PAGE + (length - 1) % PAGE,
            table.to(torch.int32),
            draw.whole([length] * rows),
        )

    def arranged(
        qkv: Tensor, table: Tensor, positions: Tensor, dtype: torch.dtype, weight: Tensor | None, *cache: Tensor
    ) -> tuple[Any, ...]:
        return qkv, heads, kv_heads, table, positions, dtype, True, weight, EPS, first, None, *cache

    def ours(*args: Any) -> Call:
        function = launcher("rope_decode_attention")
        scratch = launcher("rope_decode_attention", "rope_decode_attention_scratch")(
            rows, heads, kv_heads, head_dim, pages, args[0].device
        )
        given = (*arranged(*args), scale, None, length)
        return lambda: function(*given, scratch=scratch)

    def unfused(*args: Any) -> Call:
        rotate, attend = launcher("qk_norm_rope", "qk_norm_rope_cache"), launcher("decode_attention")
        *given, table, lengths = arranged(*args)
        k_cache, v_cache = given[11:13]
        return lambda: attend(rotate(*given), k_cache, v_cache, table, lengths, scale, None, length)

    def definition(*args: Any) -> Tensor:
        given: list[Any] = [*arranged(*args), scale]
        return rope_decode_attention_reference(*given)

    def observe(out: Any, args: Sequence[Any]) -> list[Tensor]:
        return [out, args[5], args[6]]

    new = rows * (heads + 2 * kv_heads) * head_dim * ITEM
    return Case(
        name=f"{model} {heads}/{kv_heads} d{head_dim} batch {rows} keys {length}",
        make=make,
        ours=ours,
        definition=definition,
        observe=observe,
        reads=new + rows * 2 * (length - 1) * kv_heads * head_dim * ITEM,
        writes=new,
        flop=4 * rows * heads * head_dim * length,
        peers={"unfused": unfused},
    )


CASES = [decode(model, rows, length) for model in MODELS for rows, length in ((1, 200), (1, 4096), (8, 4096))]
SMOKE = [decode("tiny", 2, 300)]
