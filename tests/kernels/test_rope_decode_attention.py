"""The fused decoding attention's definition: against whole sequences that never were cached, and rows without slots."""

import torch
from tritium.kernels.attention import attention_reference
from tritium.kernels.qk_norm_rope import qk_norm_rope_at_reference
from tritium.kernels.rope_decode_attention import rope_decode_attention_reference

from ..rule import draw

HEADS, KV_HEADS, HEAD_DIM, PAGE, EPS = 4, 2, 16, 4, 1e-6


def test_decoding_token_by_token_is_attention_over_the_sequence() -> None:
    """Each token's own key is seen, and those before it from the cache, where each call put them."""
    tokens = 9
    qkv = draw(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float64)
    device = qkv.device
    angles = torch.outer(torch.arange(tokens), 10.0 ** -torch.arange(HEAD_DIM // 2).double()).to(device)
    table = torch.stack((angles.cos(), angles.sin()), 1)
    positions = torch.arange(tokens, device=device)
    weight = draw(HEADS + KV_HEADS, HEAD_DIM, dtype=torch.float64, seed=1)
    how = (torch.float64, True, weight, EPS, True, None)
    whole = qk_norm_rope_at_reference(qkv, HEADS, KV_HEADS, table, positions, *how)
    for window in (None, 3):
        expected = attention_reference(*whole, [0, tokens], 0.25, window)
        cache = torch.full((2, KV_HEADS, 3, PAGE, HEAD_DIM), float("nan"), dtype=torch.float64, device=device)
        pages = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
        for position in range(tokens):
            got = rope_decode_attention_reference(
                qkv[position : position + 1], HEADS, KV_HEADS, table, positions[position : position + 1], *how,
                cache[0], cache[1], (pages[:, position // PAGE] * PAGE + position % PAGE).long(), pages,
                torch.tensor([position + 1], dtype=torch.int32, device=device), 0.25, window,
            )  # fmt: skip
            torch.testing.assert_close(got[0], expected[position], rtol=0, atol=1e-12)


def test_a_row_without_a_slot_is_zero_and_writes_nothing() -> None:
    qkv = draw(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float64)
    cache = draw(2, KV_HEADS, 2, PAGE, HEAD_DIM, dtype=torch.float64, seed=1)
    before, device = cache.clone(), qkv.device
    got = rope_decode_attention_reference(
        qkv, HEADS, KV_HEADS, None, None, torch.float64, False, None, EPS, True, None, cache[0], cache[1],
        torch.tensor([-1, 6], device=device), torch.tensor([[0], [1]], dtype=torch.int32, device=device),
        torch.tensor([3, 3], dtype=torch.int32, device=device), 0.25,
    )  # fmt: skip
    assert got[0].eq(0).all()
    assert got[1].ne(0).any()
    heads = qkv.view(2, -1, HEAD_DIM)
    before[:, :, 1, 2] = heads[1, HEADS:].view(2, KV_HEADS, HEAD_DIM)
    assert torch.equal(cache, before)
