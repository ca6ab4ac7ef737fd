"""QK-norm with rotary positions against loops in float64, the order of norm and rotation, and where they round."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.qk_norm_rope import (
    cache_write_reference,
    qk_norm_rope_at_reference,
    qk_norm_rope_reference,
    rope_rows,
    rotate_reference,
)

HALVES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [2, 16, 56, 64, 80, 96, 128]


def angles(tokens: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Float64 [T, D/2] angles of positions 0, 3, 6, ..."""
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.outer(3 * torch.arange(tokens, dtype=torch.float64), frequency)


def naive_rotate(x: list[float], angle: list[float]) -> list[float]:
    """One head's rotation: element i pairs with element i + D/2."""
    half = len(angle)
    out = [0.0] * (2 * half)
    for i, a in enumerate(angle):
        out[i] = x[i] * math.cos(a) - x[i + half] * math.sin(a)
        out[i + half] = x[i + half] * math.cos(a) + x[i] * math.sin(a)
    return out


def naive_norm(x: list[float], weight: list[float], eps: float) -> list[float]:
    root = math.sqrt(sum(value * value for value in x) / len(x) + eps)
    return [value / root * w for value, w in zip(x, weight, strict=True)]


def naive(
    qkv: Tensor, heads: int, kv_heads: int, angle: Tensor | None, weight: Tensor | None, eps: float, norm: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm` is none, first or last."""
    tokens = qkv.shape[0]
    total = heads + 2 * kv_heads
    head_dim = qkv.shape[1] // total
    out = torch.zeros(tokens, total, head_dim, dtype=torch.float64)
    for t in range(tokens):
        row = qkv[t].double().tolist()
        for h in range(total):
            x = row[h * head_dim : (h + 1) * head_dim]
            if h < heads + kv_heads:
                w = [1.0] * head_dim if weight is None else weight[h].double().tolist()
                if norm == "first":
                    x = naive_norm(x, w, eps)
                if angle is not None:
                    x = naive_rotate(x, angle[t].tolist())
                if norm == "last":
                    x = naive_norm(x, w, eps)
            out[t, h] = torch.tensor(x, dtype=torch.float64)
    return out[:, :heads], out[:, heads : heads + kv_heads], out[:, heads + kv_heads :]


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("norm", ["none", "first", "last"])
def test_is_the_formula_in_float64(head_dim: int, norm: str) -> None:
    """Interleaved pairs, a wrong sign, norm and rotation exchanged, a normalised v: each would show."""
    torch.manual_seed(0)
    heads, kv_heads, tokens = 4, 2, 3
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(heads + kv_heads, head_dim, dtype=torch.float64)
    angle = angles(tokens, head_dim)
    cos, sin = rope_rows(angle.cos(), angle.sin())
    assert cos.shape == sin.shape == (tokens, 1, head_dim)
    got = qk_norm_rope_reference(qkv, heads, kv_heads, cos, sin, norm != "none", weight, 0.1, norm == "first")
    assert_same(got, naive(qkv, heads, kv_heads, angle, weight, 0.1, norm))


@pytest.mark.parametrize("ratio", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_head_counts_and_row_counts(ratio: int, tokens: int) -> None:
    """The packed heads are cut at the right places for every GQA ratio, and no tokens give empty tensors."""
    torch.manual_seed(1)
    kv_heads, head_dim = 2, 16
    heads = ratio * kv_heads
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=torch.float64)
    angle = angles(tokens, head_dim)
    got = qk_norm_rope_reference(qkv, heads, kv_heads, *rope_rows(angle.cos(), angle.sin()), norm=True, eps=0.1)
    assert [tuple(x.shape) for x in got] == [(tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    assert_same(got, naive(qkv, heads, kv_heads, angle, None, 0.1, "first"))


def test_no_positions_and_no_norm_is_only_the_cut() -> None:
    """A layer without rotary positions must leave q and k alone."""
    qkv = torch.arange(2.0 * 8 * 4).view(2, 32)
    q, k, v = qk_norm_rope_reference(qkv, 4, 2)
    assert torch.equal(q, qkv[:, :16].view(2, 4, 4))
    assert torch.equal(k, qkv[:, 16:24].view(2, 2, 4))
    assert torch.equal(v, qkv[:, 24:].view(2, 2, 4))


def test_norm_without_positions() -> None:
    """QK-norm in a layer that has no rotary positions."""
    torch.manual_seed(2)
    qkv = torch.randn(2, 8 * 16, dtype=torch.float64)
    weight = torch.randn(6, 16, dtype=torch.float64)
    for first in (True, False):
        got = qk_norm_rope_reference(qkv, 4, 2, norm=True, weight=weight, eps=0.1, norm_first=first)
        assert_same(got, naive(qkv, 4, 2, None, weight, 0.1, "first"))


def test_position_zero_changes_nothing_and_lengths_are_kept() -> None:
    """A rotation: norms of heads, and dot products at equal distance, do not change."""
    torch.manual_seed(3)
    head_dim, tokens = 64, 12
    angle = angles(tokens, head_dim)
    cos, sin = rope_rows(angle.cos(), angle.sin())
    q, k = torch.randn(2, head_dim, dtype=torch.float64).unbind()
    rotated_q, rotated_k = (rotate_reference(x.expand(tokens, 1, head_dim), cos, sin).squeeze(1) for x in (q, k))
    assert torch.equal(rotated_q[0], q)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(tokens), rtol=1e-12, atol=0.0)
    for distance in (0, 1, 5):
        dots = (rotated_q[distance:] * rotated_k[: tokens - distance]).sum(-1)
        torch.testing.assert_close(dots, dots[:1].expand_as(dots), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(dots, q @ k)


@pytest.mark.parametrize("dtype", HALVES)
def test_each_product_and_the_sum_round_in_the_model_dtype(dtype: torch.dtype) -> None:
    """Qwen's and Llama's rotation, x * cos + rotate_half(x) * sin in the half type, bit for bit.

    A fused multiply-add keeps the second product unrounded and differs in a quarter of the elements.
    """
    torch.manual_seed(4)
    x = torch.randn(9, 4, 80).to(dtype)
    angle = angles(9, 80).float()
    cos, sin = angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)
    x1, x2 = x.chunk(2, -1)
    left, right = (x1 * cos, x2 * cos), (x2 * sin, x1 * sin)  # each product rounds
    expected = torch.cat((left[0] - right[0], left[1] + right[1]), -1)
    assert torch.equal(rotate_reference(x, *rope_rows(cos.squeeze(1), sin.squeeze(1))), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_rows_round_once(dtype: torch.dtype) -> None:
    """MobileLLM-R1's rotation: float32 cos and sin, one rounding back; bit for bit away from ties."""
    torch.manual_seed(5)
    x = torch.randn(9, 4, 64).to(dtype)
    angle = angles(9, 64).float()
    cos, sin = rope_rows(angle.cos(), angle.sin())
    out = rotate_reference(x, cos, sin)
    assert out.dtype == dtype
    wide = x.double()
    exact = wide * cos.double() + wide.roll(32, -1) * sin.double()
    margin = 1e-6 * (wide.abs() + wide.roll(32, -1).abs())
    certain = (exact - margin).to(dtype) == (exact + margin).to(dtype)
    assert certain.float().mean() > 0.95
    assert torch.equal(out[certain], exact.to(dtype)[certain])
    in_half = rotate_reference(x, cos.to(dtype), sin.to(dtype))
    assert (in_half != out).float().mean() > 0.1  # the two contracts do differ


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("first", [True, False])
def test_the_norm_inside_rounds_as_rms_norm_does(dtype: torch.dtype, first: bool) -> None:
    """Normalise in float32, round, then multiply by the weight, then rotate; or rotate, round and normalise."""
    torch.manual_seed(6)
    tokens, heads, kv_heads, head_dim = 16, 4, 2, 96
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    weight = (1 + 0.3 * torch.randn(heads + kv_heads, head_dim)).to(dtype)
    angle = angles(tokens, head_dim).float()
    cos, sin = rope_rows(angle.cos().to(dtype), angle.sin().to(dtype))

    def norm(x: Tensor) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normalised.to(dtype) * weight

    qk = qkv.view(tokens, -1, head_dim)[:, : heads + kv_heads]
    expected = rotate_reference(norm(qk), cos, sin) if first else norm(rotate_reference(qk, cos, sin))
    q, k, v = qk_norm_rope_reference(qkv, heads, kv_heads, cos, sin, True, weight, 1e-6, first)
    same = torch.cat((q, k), 1) == expected
    assert same.float().mean() > 0.999  # float32's own last bit may tip a tie
    assert torch.equal(v, qkv.view(tokens, -1, head_dim)[:, heads + kv_heads :])


@pytest.mark.parametrize("norm", ["none", "first", "last"])
def test_query_scale_is_the_formula_in_float64(norm: str) -> None:
    """Every head of q times the factor of its position, after all else: a norm that comes last does not undo it.

    One position comes twice, out of order. The float32 factors are widened, as the truth needs them.
    """
    torch.manual_seed(12)
    heads, kv_heads, head_dim = 4, 2, 16
    positions = torch.tensor([7, 2, 7, 0, 5])
    qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim, dtype=torch.float64)
    weight = 1 + 0.3 * torch.randn(heads + kv_heads, head_dim, dtype=torch.float64)
    factors, angle = 1 + torch.rand(8), angles(8, head_dim)
    q, k, v = naive(qkv, heads, kv_heads, angle[positions], weight, 0.1, norm)
    scaled = torch.stack([x * factors[position].item() for x, position in zip(q, positions.tolist(), strict=True)])
    rest = (norm != "none", weight, 0.1, norm == "first")
    table = torch.stack((angle.cos(), angle.sin()), 1)
    at = qk_norm_rope_at_reference(qkv, heads, kv_heads, table, positions, torch.float64, *rest, factors)
    assert_same(at, (scaled, k, v))
    rows = rope_rows(angle[positions].cos(), angle[positions].sin())
    assert_same(qk_norm_rope_reference(qkv, heads, kv_heads, *rows, *rest, factors[positions]), (scaled, k, v))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_query_scale_rounds_the_factor_then_the_product(dtype: torch.dtype) -> None:
    """Bit for bit: the rounded query times the rounded factor, rounded once; k and v are those without the factor."""
    torch.manual_seed(13)
    qkv = torch.randn(6, 8 * 16).to(dtype)
    factors, angle = 1 + torch.rand(6), angles(6, 16).float()
    rows = rope_rows(angle.cos().to(dtype), angle.sin().to(dtype))
    plain = qk_norm_rope_reference(qkv, 4, 2, *rows, norm=True, eps=1e-6)
    q, k, v = qk_norm_rope_reference(qkv, 4, 2, *rows, norm=True, eps=1e-6, scale=factors)
    wide = plain[0].double()  # products of two float32 are exact there
    assert q.dtype == dtype
    assert torch.equal(q, (wide * factors.to(dtype).double().view(6, 1, 1)).to(dtype))
    assert torch.equal(k, plain[1])
    assert torch.equal(v, plain[2])
    if dtype != torch.float32:
        assert (q != (wide * factors.double().view(6, 1, 1)).to(dtype)).float().mean() > 0.05  # the factor unrounded


@pytest.mark.parametrize("table", [None, torch.ones(4, 2, 2)])
def test_query_scale_needs_positions(table: Tensor | None) -> None:
    """A factor that nothing points at would be left out in silence."""
    rest = (torch.float32, False, None, 0.0, True, torch.ones(4))
    with pytest.raises(ValueError, match="it needs table and positions"):
        qk_norm_rope_at_reference(torch.zeros(2, 16), 2, 1, table, None, *rest)


def test_non_contiguous_qkv() -> None:
    """A transposed projection, and columns cut from a wider one, give what their copies give."""
    torch.manual_seed(7)
    angle = angles(3, 16)
    rows = rope_rows(angle.cos(), angle.sin())
    for qkv in (torch.randn(8 * 16, 3, dtype=torch.float64).t(), torch.randn(3, 200, dtype=torch.float64)[:, 5:133]):
        assert not qkv.is_contiguous()
        got = qk_norm_rope_reference(qkv, 4, 2, *rows, norm=True, eps=0.1)
        assert_same(got, naive(qkv, 4, 2, angle, None, 0.1, "first"))


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_magnitudes_in_float32(scale: float) -> None:
    """Rotation is linear at any magnitude; the norm takes 1e15 to 1, and leaves 1e-20 to the eps."""
    torch.manual_seed(8)
    qkv = torch.randn(3, 8 * 16) * scale
    angle = angles(3, 16)
    rows = rope_rows(angle.cos().float(), angle.sin().float())
    for norm in ("none", "first", "last"):
        got = qk_norm_rope_reference(qkv, 4, 2, *rows, norm=norm != "none", eps=1e-6, norm_first=norm == "first")
        expected = naive(qkv, 4, 2, angle, None, 1e-6, norm)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_the_input_is_not_overwritten() -> None:
    """The backward pass still needs it."""
    torch.manual_seed(9)
    qkv = torch.randn(3, 8 * 16)
    before = qkv.clone()
    angle = angles(3, 16).float()
    qk_norm_rope_reference(qkv, 4, 2, *rope_rows(angle.cos(), angle.sin()), norm=True)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("scale", [None, torch.tensor([1.0, 1.25])])
@pytest.mark.parametrize("first", [True, False])
def test_gradients(first: bool, scale: Tensor | None) -> None:
    """Against finite differences in qkv and weight, and the same when taken twice."""
    torch.manual_seed(10)
    qkv = torch.randn(2, 4 * 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    angle = angles(2, 4)
    cos, sin = rope_rows(angle.cos(), angle.sin())

    def call(qkv: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return qk_norm_rope_reference(qkv, 2, 1, cos, sin, True, weight, 0.1, first, scale)

    assert torch.autograd.gradcheck(call, (qkv, weight))
    out = torch.cat([x.flatten() for x in call(qkv, weight)])
    upstream = torch.randn_like(out)
    one = torch.autograd.grad(out, (qkv, weight), upstream, retain_graph=True)
    two = torch.autograd.grad(out, (qkv, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_cache_write_puts_each_token_in_its_slot_and_touches_no_other() -> None:
    """K and V exchanged, a wrong slot or a write beyond it would corrupt another sequence."""
    torch.manual_seed(11)
    k_cache, v_cache = (torch.full((2, 12, 4), fill).transpose(0, 1) for fill in (7.0, 8.0))
    k, v = torch.randn(3, 4, 4)[:, ::2], torch.randn(3, 2, 4)
    slots = torch.tensor([11, 0, 5])
    cache_write_reference(k, v, k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot], k[token])
        assert torch.equal(v_cache[slot], v[token])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert (k_cache[untouched] == 7).all()
    assert (v_cache[untouched] == 8).all()
    empty = torch.zeros(0, 2, 4)
    cache_write_reference(empty, empty, k_cache, v_cache, torch.zeros(0, dtype=torch.int64))
    assert (v_cache[untouched] == 8).all()
