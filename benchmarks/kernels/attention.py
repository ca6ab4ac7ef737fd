"""How near does causal prefill come to cuDNN's attention, over packed tokens and over the paged cache?

64 query heads over 8, head dim 128, one sequence, is the shape of the published cuDNN figures. Truth in float64 is
taken for a sample of the queries, with the first and the last among them: scores of all would not fit in memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.rms_norm import wide

from ..case import Call, Case, Draw, Prepare, call, launcher
from ..peers import flashinfer, sdpa
from ..shapes import ITEM, MODELS, spec

PAGE = 256
SAMPLED = 64


def sampled(queries: int) -> list[int]:
    """Which queries are looked at: evenly spread, off the blocks' bounds, with both ends."""
    return sorted({*(index * queries // SAMPLED for index in range(SAMPLED)), *range(min(3, queries)), queries - 1})


def attend(q: Tensor, k: Tensor, v: Tensor, at: Tensor, scale: float) -> Tensor:
    """The definition for queries q [P, Hq, D] at positions `at` [P] over k and v [L, Hk, D]: [P, Hq, D]."""
    grouped = wide(q).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("phgd,lhd->hgpl", grouped, wide(k)) * scale
    hidden = torch.arange(k.shape[0], device=q.device) > at[:, None]
    probabilities = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return torch.einsum("hgpl,lhd->phgd", wide(probabilities), wide(v)).reshape(q.shape).to(q.dtype)


def visible_pairs(queries: int, keys: int) -> int:
    return queries * (keys - queries) + queries * (queries + 1) // 2


def prefill(name: str, heads: int, kv_heads: int, head_dim: int, length: int) -> Case:
    """One sequence of `length` tokens that attends to itself."""
    scale, rows = head_dim**-0.5, sampled(length)

    def make(draw: Draw) -> tuple[Any, ...]:
        return (
            draw.normal(length, heads, head_dim),
            draw.normal(length, kv_heads, head_dim),
            draw.normal(length, kv_heads, head_dim),
            draw.whole([0, length]),
        )

    def ours(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Call:
        attention = launcher("attention")
        return lambda: attention(q, k, v, starts, scale)

    def definition(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        out[rows] = attend(q[rows], k, v, torch.tensor(rows, device=q.device), scale)
        return out

    def across(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def bind(package: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Call:
        return lambda: package.single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=scale)

    return Case(
        name=f"{name} {heads}/{kv_heads} d{head_dim} {length}",
        make=make,
        ours=ours,
        definition=definition,
        observe=lambda out, args: [out[rows]],
        reads=length * (heads + 2 * kv_heads) * head_dim * ITEM,
        writes=length * heads * head_dim * ITEM,
        flop=4 * heads * head_dim * visible_pairs(length, length),
        peers={
            "cuDNN": sdpa("CUDNN_ATTENTION", across, True, scale),
            "FlashAttention-2 (SDPA)": sdpa("FLASH_ATTENTION", across, True, scale),
            "flashinfer": flashinfer(bind),
        },
    )


def chunk(name: str, heads: int, kv_heads: int, head_dim: int, queries: int, length: int) -> Case:
    """The last `queries` tokens of a sequence of `length`, over a cache whose pages lie in random order."""
    scale, rows, pages = head_dim**-0.5, sampled(queries), -(-length // PAGE)

    def make(draw: Draw) -> tuple[Any, ...]:
        return (
            draw.normal(queries, heads, head_dim),
            draw.normal(kv_heads, pages, PAGE, head_dim),
            draw.normal(kv_heads, pages, PAGE, head_dim),
            draw.permutation(pages).to(torch.int32).unsqueeze(0),
            draw.whole([0, queries]),
            draw.whole([length]),
        )

    def ours(*args: Tensor) -> Call:
        paged_attention = launcher("attention", "paged_attention")
        return lambda: paged_attention(*args, scale)

    def definition(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, *rest: Tensor) -> Tensor:
        # [Hk, pages, PAGE, D] -> [L, Hk, D]
        k, v = (cache[:, table[0].long()].flatten(1, 2)[:, :length].transpose(0, 1) for cache in (k_cache, v_cache))
        out = torch.zeros_like(q)
        at = torch.tensor(rows, device=q.device)
        out[rows] = attend(q[rows], k, v, at + (length - queries), scale)
        return out

    def observe(out: Any, args: Sequence[Any]) -> list[Tensor]:
        return [out[rows]]

    peers: dict[str, Prepare] = {"torch": call(lambda *args: _whole(args, length, scale))}
    return Case(
        name=f"{name} {heads}/{kv_heads} d{head_dim} {queries} of {length} paged",
        make=make,
        ours=ours,
        definition=definition,
        observe=observe,
        reads=(queries * heads + 2 * length * kv_heads) * head_dim * ITEM,
        writes=queries * heads * head_dim * ITEM,
        flop=4 * heads * head_dim * visible_pairs(queries, length),
        peers=peers,
    )


def _whole(args: Sequence[Any], length: int, scale: float) -> Tensor:
    from tritium.runtime.sdpa import sdpa_paged_attention

    q, k_cache, v_cache, table = args[:4]
    return sdpa_paged_attention(q, k_cache, v_cache, table, [0, len(q)], [length], scale)


def _of(model: str) -> tuple[str, int, int, int]:
    found = spec(model)
    return model, found.num_heads, found.num_kv_heads, found.head_dim


CASES = [
    *(prefill("GQA", 64, 8, 128, length * 1024) for length in (2, 4, 8, 16, 32)),
    *(prefill(*_of(model), 4096) for model in MODELS),
    *(prefill(*_of(model), length * 1024) for model in ("qwen3 8B", "mobilellm 950m") for length in (2, 8, 16, 32)),
    chunk(*_of("qwen3 8B"), 1024, 8192),
]
SMOKE = [prefill("tiny", 4, 2, 16, 20), chunk("tiny", 2, 1, 16, 5, 270)]
