"""Attention's three definitions against loops in float64, against one another, and their properties."""

import math
import random
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from tritium.kernels.attention import (
    attention_reference,
    paged_attention_reference,
    visible,
)
from tritium.kernels.decode_attention import dense_decode_attention_reference as decode_attention_reference
from tritium.runtime.sdpa import sdpa_attention, sdpa_paged_attention

HALVES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 56, 64, 80, 96, 128]
F64 = torch.float64


@pytest.fixture(autouse=True, params=["definition", "fused"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds for the definitions, and for torch's fused kernels in their place."""
    if request.param == "fused":
        monkeypatch.setitem(globals(), "attention_reference", sdpa_attention)
        monkeypatch.setitem(globals(), "paged_attention_reference", sdpa_paged_attention)


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None) -> Tensor:
    """One sequence: q [S, Hq, D], k and v [L, Hk, D] -> [S, Hq, D], a query at a time in float64."""
    q, k, v = q.double(), k.double(), v.double()
    num_queries, num_heads, _ = q.shape
    num_keys = k.shape[0]
    out = torch.zeros_like(q)
    for i in range(num_queries):
        last = num_keys - num_queries + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(num_heads):
            head = h // (num_heads // k.shape[1])
            scores = k[first : last + 1, head] @ q[i, h] * scale
            weights = torch.exp(scores - scores.max())
            out[i, h] = (weights / weights.sum()) @ v[first : last + 1, head]
    return out


def naive_rows(
    q: Tensor, k: Tensor, v: Tensor, starts: Sequence[int], scale: float, window: int | None = None
) -> Tensor:
    parts = [naive(q[start:end], k[start:end], v[start:end], scale, window) for start, end in pairwise(starts)]
    return torch.cat(parts) if parts else q.double()


def draw(tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    q, k, v = (torch.randn(*shape, dtype=F64, generator=generator) for shape in shapes)
    return 3 * q, k, v


def into_pages(
    keys: Sequence[Tensor], values: Sequence[Tensor], page: int, spare: int = 3, fill: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of [L, Hk, D] laid out in shuffled pages: (k cache, v cache, page table). Unused slots hold `fill`."""
    counts = [-(-len(row) // page) for row in keys]
    order = list(range(sum(counts) + spare))
    random.Random(seed).shuffle(order)
    heads, dim = keys[0].shape[1:]
    caches = [torch.full((heads, len(order), page, dim), fill, dtype=keys[0].dtype) for _ in range(2)]
    table = torch.zeros(len(keys), max(counts), dtype=torch.int64)
    for r, count in enumerate(counts):
        for index in range(count):
            table[r, index] = order.pop()
            for cache, rows in zip(caches, (keys, values), strict=True):
                piece = rows[r][index * page : (index + 1) * page]
                cache[:, table[r, index], : len(piece)] = piece.transpose(0, 1)
    return caches[0], caches[1], table


def into_dense(rows: Sequence[Tensor], longest: int, fill: float = 0.0) -> Tensor:
    """Rows of [L, Hk, D] as [Hk * R, longest, D], head by head."""
    heads, dim = rows[0].shape[1:]
    out = torch.full((heads, len(rows), longest, dim), fill, dtype=rows[0].dtype)
    for r, row in enumerate(rows):
        out[:, r, : len(row)] = row.transpose(0, 1)
    return out.flatten(0, 1)


def length_bias(lengths: Sequence[int], longest: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[R, 1, longest]: 0 at the keys that a row's last query sees, -inf elsewhere."""
    bias = torch.full((len(lengths), 1, longest), -math.inf, dtype=dtype)
    for r, length in enumerate(lengths):
        bias[r, 0, 0 if window is None else max(0, length - window) : length] = 0
    return bias


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# The mask.


@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (4, 4), (3, 8), (0, 3)])
def test_visible(num_queries: int, num_keys: int, window: int | None) -> None:
    """Off by one in the diagonal or the window would show."""
    seen = visible(num_queries, num_keys, window, torch.device("cpu"))
    assert seen.shape == (num_queries, num_keys)
    for i in range(num_queries):
        at = num_keys - num_queries + i
        expected = [j <= at and (window is None or j > at - window) for j in range(num_keys)]
        assert seen[i].tolist() == expected
        assert expected[at]  # every query sees itself


# Prefill and training.


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("window", [None, 3])
def test_prefill_head_dims(head_dim: int, window: int | None) -> None:
    """Every head dimension that a checkpoint brings, over a ragged batch."""
    q, k, v = draw(11, 4, 2, head_dim)
    starts = [0, 5, 6, 11]
    scale = head_dim**-0.5
    close(attention_reference(q, k, v, starts, scale, window), naive_rows(q, k, v, starts, scale, window))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 6), (6, 3), (6, 2), (8, 2), (8, 1), (16, 1)])
def test_prefill_gqa_ratios(heads: int, kv_heads: int) -> None:
    """Query head h reads key/value head h // ratio, not h % kv_heads."""
    q, k, v = draw(7, heads, kv_heads, 16)
    close(attention_reference(q, k, v, [0, 3, 7], 0.25), naive_rows(q, k, v, [0, 3, 7], 0.25))


@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0], [0, 2, 0], [1, 1, 1], [4, 4], [1, 2, 3], [9]])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_prefill_row_counts(counts: list[int], window: int | None, grad: bool) -> None:
    """Equal and unequal rows, empty rows and no rows take different paths to the same definition."""
    starts = [0, *accumulate(counts)]
    q, k, v = draw(starts[-1], 4, 2, 16)
    expected = naive_rows(q, k, v, starts, 0.25, window)
    out = attention_reference(*(x.clone().requires_grad_(grad) for x in (q, k, v)), starts, 0.25, window)
    assert out.requires_grad == grad or not counts
    close(out.detach(), expected)


@pytest.mark.parametrize("length", [255, 256, 257])
def test_prefill_one_off_a_page(length: int) -> None:
    """Lengths around the page and every power-of-two tile, in float32."""
    q, k, v = (x.float() for x in draw(length + 2, 2, 1, 16))
    starts = [0, 2, length + 2]
    for window in (None, 256):
        out = attention_reference(q, k, v, starts, 0.25, window)
        close(out.double(), naive_rows(q, k, v, starts, 0.25, window), 1e-5)


def test_prefill_non_contiguous() -> None:
    """q, k and v come as slices of one packed projection."""
    torch.manual_seed(0)
    packed = torch.randn(9, 8, 16, dtype=F64)
    q, k, v = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    assert not q.is_contiguous()
    for starts in ([0, 9], [0, 4, 9], [0, 3, 6, 9]):
        close(attention_reference(q, k, v, starts, 0.25), naive_rows(q, k, v, starts, 0.25))


def test_rows_do_not_see_each_other_and_permuting_them_permutes_the_result() -> None:
    """What a batch holds besides, and in which order, must not matter."""
    counts = [3, 1, 6, 2]
    starts = [0, *accumulate(counts)]
    q, k, v = draw(starts[-1], 4, 2, 16)
    out = attention_reference(q, k, v, starts, 0.25).split(counts)
    order = [2, 0, 3, 1]
    shuffled = [torch.cat([x.split(counts)[row] for row in order]) for x in (q, k, v)]
    moved = [0, *accumulate(counts[row] for row in order)]
    close(attention_reference(*shuffled, moved, 0.25), torch.cat([out[row] for row in order]), 1e-13)


def test_the_future_does_not_matter() -> None:
    """Changing the last token leaves every earlier result as it was."""
    q, k, v = draw(8, 4, 2, 16)
    out = attention_reference(q, k, v, [0, 8], 0.25)
    for x in (q, k, v):
        x[-1] = 1e6
    changed = attention_reference(q, k, v, [0, 8], 0.25)
    close(changed[:-1], out[:-1], 1e-13)
    assert not torch.allclose(changed[-1], out[-1])


@pytest.mark.parametrize("window", [None, 3])
def test_a_constant_on_all_scores_changes_nothing(window: int | None) -> None:
    """The same vector added to every key adds q . c to all of a query's scores."""
    q, k, v = draw(8, 4, 2, 16)
    shift = torch.linspace(-2, 2, 16, dtype=F64)
    out = attention_reference(q, k, v, [0, 8], 0.25, window)
    close(attention_reference(q, k + shift, v, [0, 8], 0.25, window), out, 1e-12)


@pytest.mark.parametrize("counts", [[6], [3, 3], [1, 4]])
def test_a_window_of_one_sees_only_itself(counts: list[int]) -> None:
    """The result is the own value of the query's group."""
    starts = [0, *accumulate(counts)]
    q, k, v = draw(starts[-1], 4, 2, 16)
    out = attention_reference(q, k, v, starts, 0.25, 1)
    close(out, v.repeat_interleave(2, 1), 1e-14)


def test_a_window_wider_than_the_row_is_no_window() -> None:
    """Window L sees all L keys; window L - 1 drops the first for the last query only."""
    q, k, v = draw(6, 4, 2, 16)
    plain = attention_reference(q, k, v, [0, 6], 0.25)
    for window in (6, 7, 1000):
        close(attention_reference(q, k, v, [0, 6], 0.25, window), plain, 1e-13)
    cut = attention_reference(q, k, v, [0, 6], 0.25, 5)
    close(cut[:-1], plain[:-1], 1e-13)
    assert not torch.allclose(cut[-1], plain[-1])


def test_large_scores_do_not_overflow() -> None:
    """exp(1000) is infinite in float32: the maximum must be taken out first."""
    q, k, v = (x.float() for x in draw(5, 2, 1, 16))
    out = attention_reference(100 * q, 100 * k, v, [0, 5], 1.0)
    assert out.isfinite().all()
    close(out.double(), naive(100 * q, 100 * k, v, 1.0), 1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_values_in_float32(scale: float) -> None:
    """The result is as large as the values, whatever their magnitude; tiny keys give a plain mean."""
    q, k, v = (x.float() for x in draw(5, 2, 1, 16))
    out = attention_reference(q, k, v * scale, [0, 5], 0.25).double() / scale
    close(out, naive(q, k, v, 0.25), 1e-5)
    mean = torch.stack([v[: i + 1].mean(0) for i in range(5)]).expand(5, 2, 16)
    close(attention_reference(q, k * 1e-20, v, [0, 5], 0.25), mean, 1e-6)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients(window: int | None) -> None:
    """Against finite differences over a ragged batch, and the same when taken twice."""
    inputs = tuple(x.requires_grad_() for x in draw(5, 4, 2, 4))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, [0, 3, 5], 0.5, window)

    assert torch.autograd.gradcheck(call, inputs)
    out = call(*inputs)
    upstream = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(out, inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_when_only_keys_and_values_need_them() -> None:
    """A frozen query projection must not cut the graph of the others."""
    q, k, v = draw(5, 4, 2, 4)
    k.requires_grad_()
    v.requires_grad_()
    attention_reference(q, k, v, [0, 3, 5], 0.5).sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    close(v.grad.sum(), torch.tensor(5 * 4 * 4.0, dtype=F64))  # weights of every query sum to one


# Over the paged cache.


@pytest.mark.parametrize("length", [255, 256, 257])
@pytest.mark.parametrize("window", [None, 100, 256])
def test_pages_of_256_equal_dense_equal_plain(length: int, window: int | None) -> None:
    """Three definitions, shuffled pages, a last query each: one answer, one off the page size."""
    lengths = [length, 3, 256]
    starts = [0, *accumulate(lengths)]
    q, k, v = draw(starts[-1], 4, 2, 16)
    last = [end - 1 for end in starts[1:]]
    plain = attention_reference(q, k, v, starts, 0.25, window)[last]
    keys, values = k.split(lengths), v.split(lengths)
    k_cache, v_cache, table = into_pages(keys, values, 256)
    paged = paged_attention_reference(q[last], k_cache, v_cache, table, [0, 1, 2, 3], lengths, 0.25, window)
    longest = max(lengths)
    dense = decode_attention_reference(
        q[last],
        into_dense(keys, longest),
        into_dense(values, longest),
        length_bias(lengths, longest, window, F64),
        0.25,
    )
    close(paged, plain)
    close(dense, plain)
    expected = torch.stack(
        [naive(q[[i]], ks, vs, 0.25, window)[0] for i, ks, vs in zip(last, keys, values, strict=True)]
    )
    close(plain, expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_paged_chunks_of_queries(head_dim: int) -> None:
    """Chunked prefill: rows with many, one and all of their keys new, against loops."""
    lengths, new = [9, 4, 6, 5], [3, 1, 6, 0]
    keys, values = ([draw(n, 4, 2, head_dim, seed=n)[i] for n in lengths] for i in (1, 2))
    starts = [0, *accumulate(new)]
    q = draw(starts[-1], 4, 2, head_dim)[0]
    k_cache, v_cache, table = into_pages(keys, values, 4)
    for window in (None, 1, 2, 5):
        out = paged_attention_reference(q, k_cache, v_cache, table, starts, lengths, head_dim**-0.5, window)
        parts = zip(q.split(new), keys, values, strict=True)
        close(out, torch.cat([naive(qs, ks, vs, head_dim**-0.5, window) for qs, ks, vs in parts]))


def test_paged_order_of_pages_does_not_matter() -> None:
    """Where pages lie is nobody's business but the table's."""
    keys, values = ([draw(n, 4, 2, 16, seed=n)[i] for n in (11, 6)] for i in (1, 2))
    q = draw(2, 4, 2, 16)[0]
    outs = []
    for seed in range(3):
        k_cache, v_cache, table = into_pages(keys, values, 4, seed=seed)
        outs.append(paged_attention_reference(q, k_cache, v_cache, table, [0, 1, 2], [11, 6], 0.25))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("fill", [1e30, -1e30, math.nan])
def test_paged_keys_beyond_the_length_do_not_leak(fill: float) -> None:
    """The rest of a row's last page, and other rows' pages, are never read."""
    keys, values = ([draw(n, 4, 2, 16, seed=n)[i].float() for n in (5, 8, 1)] for i in (1, 2))
    q = draw(3, 4, 2, 16)[0].float()
    clean, dirty = (
        paged_attention_reference(q, *into_pages(keys, values, 4, fill=f), [0, 1, 2, 3], [5, 8, 1], 0.25)
        for f in (0.0, fill)
    )
    assert torch.equal(clean, dirty)


def test_paged_no_rows() -> None:
    """An empty batch is an empty result."""
    cache = torch.zeros(2, 1, 4, 16)
    out = paged_attention_reference(
        torch.zeros(0, 4, 16), cache, cache, torch.zeros(0, 1, dtype=torch.int64), [0], [], 1.0
    )
    assert out.shape == (0, 4, 16)


def test_paged_window_smaller_than_the_query_block() -> None:
    """Six new queries with a window of two: most keys are seen by some query, none by all."""
    _, k, v = draw(10, 4, 2, 16)
    q = draw(6, 4, 2, 16, seed=1)[0]
    out = paged_attention_reference(q, *into_pages([k], [v], 4), [0, 6], [10], 0.25, 2)
    close(out, naive(q, k, v, 0.25, 2))


# Decode over the dense view.


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1), (16, 1)])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_decode_gqa_ratios_with_unequal_lengths(heads: int, kv_heads: int, head_dim: int) -> None:
    """The bias of a row must reach all its heads, and no other row's."""
    lengths = [7, 1, 4]
    keys, values = ([draw(n, heads, kv_heads, head_dim, seed=n)[i] for n in lengths] for i in (1, 2))
    q = draw(3, heads, kv_heads, head_dim)[0]
    scale = head_dim**-0.5
    for window in (None, 1, 3):
        bias = length_bias(lengths, 7, window, F64)
        out = decode_attention_reference(q, into_dense(keys, 7), into_dense(values, 7), bias, scale)
        expected = [naive(q[[r]], keys[r], values[r], scale, window)[0] for r in range(3)]
        close(out, torch.stack(expected))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5), (1, 1, 5), (3, 1, 1)])
def test_decode_bias_shapes(shape: tuple[int, ...]) -> None:
    """Every shape that the docstring promises broadcasts over rows and keys, never over heads by accident."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 4, 16, dtype=F64), *torch.randn(2, 2, 3, 5, 16, dtype=F64))
    bias = torch.randn(shape, dtype=F64)
    full = bias[:, 0].expand(3, 5)
    expected = torch.zeros_like(q)
    for r in range(3):
        for h in range(4):
            weights = torch.softmax(k[h // 2, r] @ q[r, h] * 0.25 + full[r], -1)
            expected[r, h] = weights @ v[h // 2, r]
    close(decode_attention_reference(q, k.flatten(0, 1), v.flatten(0, 1), bias, 0.25), expected)


def test_decode_rows_permute_and_constants_cancel() -> None:
    """Rows are independent, alone or together, and one number added to a row's bias changes nothing."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 4, 16, dtype=F64), *torch.randn(2, 2, 3, 6, 16, dtype=F64))
    bias = length_bias([6, 2, 4], 6, None, F64)

    def call(rows: list[int], length: int, bias: Tensor) -> Tensor:
        keys, values = (x[:, rows, :length].flatten(0, 1) for x in (k, v))
        return decode_attention_reference(q[rows], keys, values, bias, 0.25)

    out = call([0, 1, 2], 6, bias)
    close(call([2, 0, 1], 6, bias[[2, 0, 1]]), out[[2, 0, 1]], 1e-13)
    close(call([0, 1, 2], 6, bias + 5.0), out, 1e-13)
    close(call([1], 6, bias[[1]]), out[[1]])
    close(call([1], 2, torch.zeros(1, 1, 1, dtype=F64)), out[[1]])


def test_decode_huge_hidden_keys_do_not_leak() -> None:
    """Stale cache entries are finite but may be anything; a probability of exactly 0 removes them."""
    lengths = [2, 5]
    keys, values = ([draw(n, 4, 2, 16, seed=n)[i].float() for n in lengths] for i in (1, 2))
    q = draw(2, 4, 2, 16)[0].float()
    bias = length_bias(lengths, 6, None, torch.float32)
    clean, dirty = (
        decode_attention_reference(q, into_dense(keys, 6, fill), into_dense(values, 6, fill), bias, 0.25)
        for fill in (0.0, 1e30)
    )
    assert torch.equal(clean, dirty)


def test_decode_on_views_of_a_longer_cache() -> None:
    """The cache hands out strided views, and q is a slice of the packed projection."""
    torch.manual_seed(3)
    k, v = torch.randn(2, 2 * 3, 16, 16, dtype=F64)[:, :, :5]
    q = torch.randn(3, 8, 16, dtype=F64)[:, :4]
    assert not k.is_contiguous()
    assert not q.is_contiguous()
    out = decode_attention_reference(q, k, v, torch.zeros(1, 1, 1, dtype=F64), 0.25)
    expected = [naive(q[[r]], k[r::3].transpose(0, 1), v[r::3].transpose(0, 1), 0.25)[0] for r in range(3)]
    close(out, torch.stack(expected))


def test_decode_no_rows() -> None:
    """An empty batch is an empty result."""
    empty = torch.zeros(0, 4, 16)
    assert decode_attention_reference(empty, empty, empty, torch.zeros(1, 1, 1), 1.0).shape == (0, 4, 16)


# Rounding.


def stated_rounding(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One row at the stated points: float32 scores and softmax, probabilities rounded, one rounding at the end."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("shd,lhd->hsl", q.float(), k.float()) * scale
    scores = scores.masked_fill(~visible(q.shape[0], k.shape[0], None, q.device), -math.inf)
    return torch.einsum("hsl,lhd->shd", scores.softmax(-1).to(q.dtype).float(), v.float()).to(q.dtype)


def errors(out: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root mean square)."""
    difference = (out.double() - truth).abs()
    return difference.max().item(), difference.pow(2).mean().sqrt().item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", ["prefill", "paged", "dense"])
def test_scores_and_softmax_are_float32(dtype: torch.dtype, form: str) -> None:
    """Against float64 at most twice the error of the stated rounding, as the project's rule has it.

    Scores of 30 rounded to bfloat16 are off by a sixteenth, and probabilities by as many percent.
    """
    torch.manual_seed(4)
    length, head_dim = 300, 64
    q = (torch.randn(length, 4, head_dim) * 4).to(dtype)
    k = (torch.randn(length, 2, head_dim) * 2).to(dtype)
    v = torch.randn(length, 2, head_dim).to(dtype)
    scale = head_dim**-0.5
    queries = 40
    q = q[-queries:]
    truth = naive(q, k, v, scale)
    largest, rms = errors(stated_rounding(q, k, v, scale), truth)
    if form == "prefill":
        padded = torch.cat((torch.zeros(length - queries, 4, head_dim, dtype=dtype), q))
        out = attention_reference(padded, k, v, [0, length], scale)[-queries:]
    elif form == "paged":
        out = paged_attention_reference(q, *into_pages([k], [v], 256), [0, queries], [length], scale)
    else:  # every query as a row of its own
        lengths = range(length - queries + 1, length + 1)
        keys, values = (into_dense([x[:n] for n in lengths], length) for x in (k, v))
        out = decode_attention_reference(q, keys, values, length_bias(lengths, length, None, torch.float32), scale)
    assert out.dtype == dtype
    got = errors(out, truth)
    assert got[0] <= 2.0 * largest
    assert got[1] <= 1.2 * rms
