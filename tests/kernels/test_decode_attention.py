"""Decoding attention's definition: against loops in float64, the pages' order, lengths and windows."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.decode_attention import decode_attention_reference

from ..rule import draw

F64 = torch.float64
PAGE = 4


def naive(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float, window: int | None) -> Tensor:
    """One row: q [Hq, D], k and v [Hk, L, D], a head at a time."""
    out = torch.zeros_like(q)
    first = 0 if window is None else max(0, length - window)
    for head in range(len(q) if length else 0):
        kv_head = head // (len(q) // len(k))
        weights = [math.exp((q[head] @ k[kv_head, j]).item() * scale) for j in range(first, length)]
        out[head] = sum(w / sum(weights) * v[kv_head, j] for w, j in zip(weights, range(first, length), strict=True))
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1)])
def test_against_loops(heads: int, kv_heads: int, window: int | None) -> None:
    lengths = [9, 0, 1, 4, 5]
    q = draw(5, heads, 16, dtype=F64)
    k_cache, v_cache = (draw(kv_heads, 15, PAGE, 16, dtype=F64, seed=seed) for seed in (1, 2))
    table = torch.randperm(15, generator=torch.Generator().manual_seed(3)).reshape(5, 3).to(torch.int32)
    got = decode_attention_reference(q.cpu(), k_cache.cpu(), v_cache.cpu(), table, lengths, 0.25, window)
    for row, length in enumerate(lengths):
        k, v = (cache.cpu()[:, table[row].long()].flatten(1, 2) for cache in (k_cache, v_cache))
        torch.testing.assert_close(got[row], naive(q[row].cpu(), k, v, length, 0.25, window), rtol=0, atol=1e-12)
    assert got[1].eq(0).all()


def test_lengths_as_a_tensor_and_a_bound() -> None:
    """Both forms give one answer, and the bound that launchers take is nothing to the definition."""
    q, cache = draw(2, 4, 16, dtype=F64), draw(2, 4, PAGE, 16, dtype=F64, seed=1)
    table = torch.arange(4, dtype=torch.int32).reshape(2, 2).to(q.device)
    expected = decode_attention_reference(q, cache, cache, table, [7, 2], 0.25)
    lengths = torch.tensor([7, 2], dtype=torch.int32, device=q.device)
    for longest in (None, 7, 8):
        assert torch.equal(decode_attention_reference(q, cache, cache, table, lengths, 0.25, None, longest), expected)


def test_no_rows() -> None:
    cache = draw(1, 1, PAGE, 16, dtype=F64)
    table = torch.zeros(0, 1, dtype=torch.int32, device=cache.device)
    assert decode_attention_reference(draw(0, 2, 16, dtype=F64), cache, cache, table, [], 1.0).shape == (0, 2, 16)
