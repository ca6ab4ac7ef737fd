"""What does a decode step of one launch save over its phases launched one by one?

All layers of a model, random weights, one row or eight behind 300 tokens. Floors count every weight once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.decode_step import decode_step_reference
from tritium.kernels.step_tables import StepLayers, step_scratch, step_tables
from tritium.runtime.kv_cache import PAGE_SIZE

from ..case import Call, Case, Draw, launcher
from ..shapes import ITEM, projections, spec

EPS, BEHIND, PAGES = 1e-6, 300, 2
LISTS = (
    "attention_norms",
    "qkv_weights",
    "out_weights",
    "mlp_norms",
    "up_weights",
    "down_weights",
    "k_caches",
    "v_caches",
)


def decode_step(name: str, rows: int) -> Case:
    model = spec(name)
    shapes = projections(name)
    number, heads, norm = model.num_layers, (model.num_heads, model.num_kv_heads), model.qk_norm

    def make(draw: Draw) -> tuple[Any, ...]:
        """Whatever stands alone, then the layers' tensors, list by list: `grouped` puts them together again."""
        cache = (model.num_kv_heads, rows * PAGES, PAGE_SIZE, model.head_dim)
        made: list[Tensor] = []
        for kind in LISTS:
            projection = {"qkv_weights": "qkv", "out_weights": "out", "up_weights": "gate_up", "down_weights": "down"}
            for _ in range(number):
                if kind in projection:
                    height, depth = shapes[projection[kind]]
                    made.append(draw.normal(height, depth, scale=depth**-0.5))
                elif kind.endswith("norms"):
                    made.append(draw.normal(model.embedding_dim, scale=0.3).add_(1))
                else:
                    made.append(draw.normal(*cache))
        if norm == "weighted":
            made += [draw.normal(sum(heads), model.head_dim, scale=0.3).add_(1) for _ in range(number)]
        vocabulary, width = shapes["head"]
        angles = torch.outer(
            torch.arange(PAGES * PAGE_SIZE), 1e4 ** (-torch.arange(0, model.head_dim, 2) / model.head_dim)
        )
        row = draw.whole(range(rows)).to(torch.int64)
        return (
            draw.normal(vocabulary, width), draw.integers(vocabulary, rows),
            draw.normal(width, scale=0.3).add_(1), draw.normal(vocabulary, width, scale=width**-0.5),
            torch.stack((angles.cos(), angles.sin()), 1).to(draw.device), torch.full_like(row, BEHIND),
            draw.dtype if model.rope_dtype == "model" else torch.float32,
            row * PAGES * PAGE_SIZE + BEHIND, draw.whole(range(rows * PAGES)).view(rows, PAGES),
            draw.whole([BEHIND + 1] * rows), *made,
        )  # fmt: skip

    def grouped(*args: Any) -> tuple[Any, ...]:
        """What decode_step takes."""
        embedding, tokens, last, head, table, positions, rope_dtype, slots, pages, lengths, *rest = args
        lists = [rest[at : at + number] for at in range(0, len(rest), number)]
        named: dict[str, Any] = dict(zip((*LISTS, "qk_norm_weights"), lists, strict=False))
        norms = list(model.qk_norm_layers) if norm != "none" else [False] * number
        layers = StepLayers(**named, rotates=list(model.rope_layers), qk_norms=norms, windows=[0] * number)
        return (
            embedding, tokens, layers, last, head, EPS, *heads, table, positions, rope_dtype,
            model.qk_norm_position == "before_rope", None, slots, pages, lengths, model.head_dim**-0.5,
        )  # fmt: skip

    def ours(*args: Any) -> Call:
        step, taken = launcher("decode_step"), grouped(*args)
        embedding, layers = taken[0], taken[2]
        given = {
            "out": embedding.new_empty(rows, len(embedding)),
            "best": torch.zeros(rows, dtype=torch.int64, device=embedding.device),
            "tables": step_tables(layers),
            "scratch": step_scratch(embedding, layers, rows, *heads, PAGES),
        }
        return lambda: step(*taken, **given)

    weights = number * sum(height * depth for height, depth in shapes.values())
    weights -= (number - 1) * shapes["head"][0] * shapes["head"][1]
    return Case(
        name=f"{name} {rows}",
        make=make,
        ours=ours,
        definition=lambda *args: decode_step_reference(*grouped(*args)),
        reads=weights * ITEM,
        writes=rows * model.vocab_size * ITEM,
        flop=2 * rows * weights,
        peers={"one by one": lambda *args: _one_by_one(*grouped(*args))},
        observe=lambda out, args: out[:1],
        tokens=rows,
    )


def _one_by_one(
    embedding: Tensor, tokens: Tensor, layers: StepLayers, last: Tensor, head: Tensor, eps: float, *rest: Any
) -> Call:
    """A launch for each phase."""
    heads, (table, positions, rope_dtype, norm_first, _, slots, pages, lengths, scale) = rest[:2], rest[2:]
    norm_linear, swiglu = launcher("decode_linear", "norm_linear"), launcher("decode_linear", "norm_linear_swiglu")
    residual, norm_head = launcher("decode_linear", "decode_linear_residual"), launcher("decode_linear", "norm_head")
    attend: Callable[..., Tensor] = launcher("rope_decode_attention")
    gains: Sequence[Tensor | None] = layers.qk_norm_weights or [None] * len(layers.rotates)

    def run() -> Any:
        x = torch.nn.functional.embedding(tokens, embedding)
        for layer, rotates in enumerate(layers.rotates):
            attended = attend(
                norm_linear(x, layers.attention_norms[layer], eps, layers.qkv_weights[layer]), *heads,
                table if rotates else None, positions if rotates else None, rope_dtype, layers.qk_norms[layer],
                gains[layer], eps, norm_first, None, layers.k_caches[layer], layers.v_caches[layer], slots, pages,
                lengths, scale,
            )  # fmt: skip
            x = residual(attended.flatten(1), layers.out_weights[layer], None, x)
            x = residual(
                swiglu(x, layers.mlp_norms[layer], eps, layers.up_weights[layer]), layers.down_weights[layer], None, x
            )
        return norm_head(x, last, eps, head)

    return run


CASES = [decode_step(name, rows) for name in ("qwen3 0.6B", "mobilellm 950m") for rows in (1, 8)]
SMOKE = [decode_step("tiny", 2)]
