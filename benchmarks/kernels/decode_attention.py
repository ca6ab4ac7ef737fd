"""Does one decoding step read the cache as fast as memory gives it, from one short sequence to many long ones?

32 query heads over 4, head dim 128, one sequence (Qwen3-30B-A3B) is the shape of published figures. The rows' pages lie
in random order in the pool. Peers without pages get keys and values that lie densely.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tritium.kernels.decode_attention import decode_attention_reference
from tritium.runtime.sdpa import sdpa_paged_attention

from ..case import Call, Case, Draw, call, launcher
from ..peers import flashinfer, sdpa
from ..shapes import ITEM, MODELS, spec

PAGE = 256
ITS_PAGE = 16  # FlashInfer's


def decode(name: str, heads: int, kv_heads: int, head_dim: int, rows: int, length: int) -> Case:
    scale, pages = head_dim**-0.5, -(-length // PAGE)

    def make(draw: Draw) -> tuple[Any, ...]:
        return (
            draw.normal(rows, heads, head_dim),
            draw.normal(kv_heads, rows * pages, PAGE, head_dim),
            draw.normal(kv_heads, rows * pages, PAGE, head_dim),
            draw.permutation(rows * pages).to(torch.int32).view(rows, pages),
            draw.whole([length] * rows),
        )

    def ours(*args: Tensor) -> Call:
        decode_attention = launcher("decode_attention")
        return lambda: decode_attention(*args, scale, None, length)

    def definition(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return decode_attention_reference(q, k_cache, v_cache, table, [length] * rows, scale)

    def fused(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return sdpa_paged_attention(q, k_cache, v_cache, table, range(rows + 1), [length] * rows, scale)

    def dense(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """q [R, Hq, 1, D], k and v [R, Hk, L, D]."""

        def gathered(cache: Tensor) -> Tensor:
            by_row = cache[:, table.long()].flatten(2, 3)[:, :, :length]  # [Hk, R, L, D]
            return by_row.transpose(0, 1).contiguous()

        return q.unsqueeze(2), gathered(k_cache), gathered(v_cache)

    def bind(package: Any, *args: Tensor) -> Call:
        q, k, v = dense(*args)
        if rows > 1:
            return paged(package, q[:, :, 0], k, v, scale)
        k, v = k[0], v[0]
        return lambda: package.single_decode_with_kv_cache(q[0, :, 0], k, v, "HND", sm_scale=scale).unsqueeze(0)

    return Case(
        name=f"{name} {heads}/{kv_heads} d{head_dim} batch {rows} keys {length}",
        make=make,
        ours=ours,
        definition=definition,
        reads=rows * (heads + 2 * length * kv_heads) * head_dim * ITEM,
        writes=rows * heads * head_dim * ITEM,
        flop=4 * rows * heads * head_dim * length,
        peers={
            "torch": call(fused),
            "FlashAttention-2 (SDPA)": sdpa("FLASH_ATTENTION", dense, False, scale),  # type: ignore[arg-type]
            "cuDNN": sdpa("CUDNN_ATTENTION", dense, False, scale),  # type: ignore[arg-type]
            "flashinfer": flashinfer(bind),
        },
    )


def paged(package: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """FlashInfer's decoding of a batch: q [R, Hq, D] over k and v [R, Hk, L, D], put into pages of the size it is made
    for.
    """
    rows, kv_heads, length, head_dim = k.shape
    pages = -(-length // ITS_PAGE)

    def cut(x: Tensor) -> Tensor:
        """[R * pages, Hk, tokens, D]."""
        whole = F.pad(x, (0, 0, 0, pages * ITS_PAGE - length)).unflatten(2, (pages, ITS_PAGE))
        return whole.transpose(1, 2).flatten(0, 1).contiguous()

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=q.device)

    work = torch.zeros(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(work, "HND", use_tensor_cores=q.shape[1] >= 4 * kv_heads)
    wrapper.plan(
        numbers(row * pages for row in range(rows + 1)),
        numbers(range(rows * pages)),
        numbers([length - (pages - 1) * ITS_PAGE] * rows),
        q.shape[1],
        kv_heads,
        head_dim,
        ITS_PAGE,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
        sm_scale=scale,
    )
    q, cache = q.contiguous(), (cut(k), cut(v))
    return lambda: wrapper.run(q, cache)


def _of(model: str) -> tuple[str, int, int, int]:
    found = spec(model)
    return model, found.num_heads, found.num_kv_heads, found.head_dim


CASES = [
    *(decode("30B-A3B", 32, 4, 128, 1, length * 1024) for length in (1, 4, 16, 64, 128)),
    *(decode(*_of(model), 1, length) for model in MODELS for length in (4096, 32768)),
    decode(*_of("qwen3 8B"), 1, 131072),
    decode(*_of("qwen3 8B"), 8, 32768),
    decode(*_of("qwen3 8B"), 32, 4096),
    decode(*_of("qwen3 8B"), 64, 1000),
]
SMOKE = [decode("tiny", 4, 2, 16, 2, 300)]
