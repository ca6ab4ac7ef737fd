"""The gradient of attention: its definition is autograd's in float64, and rounds where it says; padding has none."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from tritium.kernels.attention import attention_reference, visible
from tritium.kernels.attention_backward import attention_backward_reference, attention_with_lse_reference

F64 = torch.float64
NAN = float("nan")


def draw(tokens: int, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dout, q, k and v in float64."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, count, head_dim) for count in (heads, heads, kv_heads, kv_heads)]
    dout, q, k, v = (torch.randn(*shape, dtype=F64, generator=generator) for shape in shapes)
    return dout, 2 * q, k, v


def autograds(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float, window: int | None
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention_reference(*leaves, starts, scale, window)
    return torch.autograd.grad(out, leaves, dout) if dout.numel() else tuple(map(torch.zeros_like, leaves))


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0], [0, 2, 0], [1, 1, 1], [4, 4], [1, 2, 3], [9]])
def test_is_autograds_in_float64(counts: list[int], window: int | None) -> None:
    """A head of another group, a key that is not seen, a delta left out: each would show."""
    starts = [0, *accumulate(counts)]
    for heads, kv_heads, head_dim in ((4, 2, 16), (3, 3, 5), (6, 1, 8)):
        dout, *qkv = draw(starts[-1], heads, kv_heads, head_dim)
        out, lse = attention_with_lse_reference(*qkv, starts, 0.3, window)
        assert torch.equal(out, attention_reference(*qkv, starts, 0.3, window))
        found = attention_backward_reference(dout, *qkv, out, lse, torch.tensor(starts), 0.3, window)
        for got, exact in zip(found, autograds(dout, *qkv, starts, 0.3, window), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


def test_lse_is_the_sum_over_the_keys_that_are_seen() -> None:
    """Query by query, to the base of two; large scores do not overflow."""
    _, q, k, v = draw(9, 4, 2, 16)
    for magnify, window in ((1, None), (1, 3), (1000, None)):
        lse = attention_with_lse_reference(q * magnify, k, v, [0, 4, 9], 0.3, window)[1]
        assert lse.shape == (4, 9)
        for t in range(9):
            first = max(0 if t < 4 else 4, 0 if window is None else t - window + 1)
            for h in range(4):
                scores = (k[first : t + 1, h // 2] @ q[t, h] * magnify * 0.3).tolist()
                most = max(scores)
                exact = (most + math.log(sum(math.exp(score - most) for score in scores))) / math.log(2)
                assert lse[h, t].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_points(dtype: torch.dtype) -> None:
    """p and ds round before their products, and nothing else but the results: the stated roundings give nearly every
    bit, and without any one of them many results differ."""
    length = 40
    dout, q, k, v = (x.to(dtype) for x in draw(length, 1, 1, 16))
    starts = [0, length]
    out, lse = attention_with_lse_reference(q, k, v, starts, 0.25)
    assert lse.dtype == torch.float32
    got = attention_backward_reference(dout, q, k, v, out, lse, starts, 0.25)

    def stated(p_rounds: bool, ds_rounds: bool) -> tuple[Tensor, ...]:
        d, x, y, z, o = (tensor[:, 0].double() for tensor in (dout, q, k, v, out))
        p = torch.exp2(x @ y.T * 0.25 / math.log(2) - lse[0].double()[:, None])
        p = p.masked_fill(~visible(length, length, None, p.device), 0.0)
        ds = p * (d @ z.T - (d * o).sum(1)[:, None])
        p, ds = p.to(dtype).double() if p_rounds else p, ds.to(dtype).double() if ds_rounds else ds
        return tuple(x[:, None].to(dtype) for x in (0.25 * ds @ y, 0.25 * ds.T @ x, p.T @ d))

    def equal(found: tuple[Tensor, ...]) -> list[float]:
        return [(mine == other).double().mean().item() for mine, other in zip(got, found, strict=True)]

    assert min(equal(stated(True, True))) > 0.97
    without_p, without_ds = equal(stated(False, True)), equal(stated(True, False))
    assert without_p[2] < 0.9
    assert max(without_ds[:2]) < 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_types_and_padding(dtype: torch.dtype) -> None:
    """Results have q's type; the tokens behind the last sequence have zeros, and what they hold reaches nobody."""
    dout, q, k, v = (x.to(dtype) for x in draw(9, 4, 2, 16))
    starts = [0, 2, 6]
    out, lse = attention_with_lse_reference(q[:6], k[:6], v[:6], starts, 0.3, 4)
    alone = attention_backward_reference(dout[:6], q[:6], k[:6], v[:6], out, lse, starts, 0.3, 4)
    for tensor in (dout, q, k, v):
        tensor[6:] = NAN
    padded, longer = attention_with_lse_reference(q, k, v, starts, 0.3, 4)
    assert torch.equal(padded[:6], out)
    assert torch.equal(longer[:, :6], lse)
    assert padded[6:].eq(0).all()
    assert longer[:, 6:].eq(0).all()
    found = attention_backward_reference(dout, q, k, v, padded, longer, starts, 0.3, 4)
    for mine, expected, like in zip(found, alone, (q, k, v), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == like.shape
        assert torch.equal(mine[:6], expected)
        assert mine[6:].eq(0).all()


def test_a_token_that_sees_itself_alone_gives_q_and_k_nothing() -> None:
    """With a window of one the weights are one: dv is the sum over the group, dq and dk are zero."""
    dout, q, k, v = draw(5, 4, 2, 16)
    out, lse = attention_with_lse_reference(q, k, v, [0, 3, 5], 0.3, 1)
    dq, dk, dv = attention_backward_reference(dout, q, k, v, out, lse, [0, 3, 5], 0.3, 1)
    torch.testing.assert_close(dv, dout.unflatten(1, (2, 2)).sum(2), rtol=1e-12, atol=1e-12)
    for gradient in (dq, dk):
        assert gradient.abs().max() < 1e-12
