"""The attention kernel at prefill: the rule, ragged and paged, windows, borders, NaN, and bits that do not depend on
the batch, on pages or on chunks."""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.attention import (
    attention,
    attention_reference,
    paged_attention,
    paged_attention_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
HEAD_DIMS = [16, 56, 64, 80, 96, 128, 256]
PAGE = 256
NAN = float("nan")


def tile_of(head_dim: int, dtype: torch.dtype) -> int:
    """The keys that the kernel takes at a time."""
    return int(tuning.config("attention", torch.device(DEVICE), head_dim=head_dim, itemsize=dtype.itemsize)["BLOCK_N"])


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


def starts_of(counts: Sequence[int]) -> Tensor:
    return ints([0, *accumulate(counts)])


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, the last as the slice of a packed projection that it is in a model."""
    packed = draw(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=3)
    q, k = draw(tokens, heads, head_dim, dtype=dtype, scale=2.0), draw(tokens, kv_heads, head_dim, dtype=dtype, seed=1)
    return q, k, packed[:, heads + kv_heads :]


def into_pages(
    rows: Sequence[tuple[Tensor, Tensor]], page: int = PAGE, fill: float = NAN, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (keys, values) [L, Hk, D] in shuffled pages: (k cache, v cache, page table). Unused slots hold `fill`."""
    counts = [-(-len(keys) // page) for keys, _ in rows]
    order = list(range(sum(counts) + 2))
    random.Random(seed).shuffle(order)
    _, kv_heads, head_dim = rows[0][0].shape
    caches = torch.full((2, kv_heads, len(order), page, head_dim), fill, dtype=rows[0][0].dtype, device=DEVICE)
    table = torch.full((len(rows), max(counts) + 1), 2**30, dtype=torch.int32)
    for r, row in enumerate(rows):
        for i in range(counts[r]):
            table[r, i] = order.pop()
            for cache, tensor in zip(caches, row, strict=True):
                piece = tensor[i * page : (i + 1) * page]
                cache[:, table[r, i], : len(piece)] = piece.transpose(0, 1)
    return caches[0], caches[1], table.to(DEVICE)


def check(counts: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, **options: Any) -> None:
    q, k, v = inputs(sum(counts), heads, kv_heads, head_dim, dtype)
    args = (q * options.pop("magnify", 1), k, v, starts_of(counts), head_dim**-0.5, options.pop("window", None))
    what = f"{counts} {heads}/{kv_heads} d{head_dim} window {args[-1]}"
    assert_rule(attention(*args), attention_reference(*args), truth_of(attention_reference, *args), what)


def check_paged(
    lengths: Sequence[int], new: Sequence[int], head_dim: int, dtype: torch.dtype, window: int | None = None
) -> None:
    """Rows of which the last tokens are new, over NaN wherever no key is; one key/value head for two query heads."""
    rows = [inputs(length, 2, 1, head_dim, dtype)[1:] for length in lengths]
    q = inputs(sum(new), 2, 1, head_dim, dtype)[0]
    args = (q, *into_pages(rows), starts_of(new), ints(lengths), head_dim**-0.5, window)
    expected, truth = paged_attention_reference(*args), truth_of(paged_attention_reference, *args)
    assert_rule(paged_attention(*args), expected, truth, f"{lengths} {new} d{head_dim} window {window}")


# The rule.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rule_over_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """Ragged rows, some empty, some of one token, one beyond a tile."""
    check([0, 1, 20, 0, 37, 0], 2, 1, head_dim, dtype)
    check([tile_of(head_dim, dtype) + 1], 1, 1, head_dim, dtype, window=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6, 8, 16])
def test_rule_over_gqa_ratios(ratio: int, dtype: torch.dtype) -> None:
    """Query head h reads key/value head h // ratio."""
    check([9, 3], 2 * ratio if ratio < 8 else ratio, 2 if ratio < 8 else 1, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_rule_around_tiles(offset: int, dtype: torch.dtype) -> None:
    """Rows and windows one off a tile, with the smallest windows and those that hide nothing."""
    tile = tile_of(64, dtype)
    for window in (None, 1, 2, tile - 1, tile, tile + 1, 2 * tile + offset):
        check([2 * tile + offset], 1, 1, 64, dtype, window=window)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129, 1000])
def test_rule_in_full(ratio: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    check([1, 0, 127, 128, 129, 700, 1, 255, 257], 2 * ratio, 2, head_dim, dtype, window=window)
    check_paged([1, 128, 300, 1025, 2048], [1, 1, 299, 130, 0], head_dim, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_extreme_magnitudes(head_dim: int, dtype: torch.dtype) -> None:
    """Scores in the hundreds and thousands: powers of two of them are far beyond float32."""
    for window in (None, 3):
        check([tile_of(head_dim, dtype) + 9], 1, 1, head_dim, dtype, window=window, magnify=100)


# The cache.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [56, 64])
def test_rule_over_pages(head_dim: int, dtype: torch.dtype) -> None:
    """A prefix hit of everything, a first chunk, one new token, many; rows in shuffled pages among NaN."""
    for window in (None, 2, 100):
        check_paged([5, 261, 70, 30], [0, 1, 30, 30], head_dim, dtype, window)


@pytest.mark.parametrize("border", [128, PAGE])
@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_appending_around_a_border(border: int, offset: int) -> None:
    """What is there already, and what it grows to, one off a tile and a page."""
    for new in (1, 2, 128):
        check_paged([border + offset + new], [new], 64, torch.bfloat16)
        if border + offset >= new:
            check_paged([border + offset], [new], 64, torch.float16, window=new)


def test_the_page_table_may_be_anything() -> None:
    """Where pages lie changes no bit, and neither does a table row that is part of a wider table."""
    rows = [inputs(length, 4, 2, 64, torch.bfloat16)[1:] for length in (300, 20)]
    q = inputs(5, 4, 2, 64, torch.bfloat16)[0]
    results = []
    for seed in range(3):
        k, v, table = into_pages(rows, seed=seed)
        wide = torch.full((4, 7), 2**30, dtype=torch.int32, device=DEVICE)
        wide[::2, : table.shape[1]] = table
        for view in (table, wide[::2]):
            results.append(paged_attention(q, k, v, view, starts_of([3, 2]), ints([300, 20]), 0.125))
    assert all(same_bits(result, results[0]) for result in results)


@pytest.mark.parametrize("window", [None, 4])
def test_no_visible_key_gives_zero(window: int | None) -> None:
    """A row without keys, with NaN in the page that it would read."""
    cache = torch.full((1, 1, PAGE, 16), NAN, device=DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    out = paged_attention(
        draw(3, 2, 16, dtype=torch.float32), cache, cache, table, ints([0, 3]), ints([0]), 1.0, window
    )
    assert out.eq(0).all()


# Bits.


@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, None), (torch.float16, 30), (torch.float32, None)])
def test_batch_invariance(dtype: torch.dtype, window: int | None) -> None:
    """A row's bits: alone, among 1 to 17, at another place, beside NaN."""
    counts = [(7 * r) % 40 + 1 for r in range(17)]
    counts[3] = 0
    q, k, v = inputs(sum(counts), 1, 1, 16, dtype)

    def run(rows: Sequence[int], spoilt: Sequence[int] = ()) -> dict[int, Tensor]:
        parts = []
        for x in (q, k, v):
            pieces = x.split(counts)
            parts.append(torch.cat([torch.full_like(pieces[r], NAN) if r in spoilt else pieces[r] for r in rows]))
        sizes = [counts[r] for r in rows]
        out = attention(*parts, starts_of(sizes), 0.25, window).split(sizes)
        return dict(zip(rows, out, strict=True))

    whole = run(range(17))
    for rows in [range(n) for n in (1, 2, 5, 16)] + [[r] for r in (4, 9, 16)] + [[12, 0, 16, 3, 9]]:
        assert all(same_bits(out, whole[r]) for r, out in run(rows).items()), list(rows)
    beside = run(range(17), spoilt=[0, 7, 9, 16])
    assert all(same_bits(beside[r], whole[r]) == (r not in (0, 7, 9, 16)) for r in range(17) if counts[r])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (80, 5), (64, 150)])
def test_chunks_and_pages_change_no_bit(head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    """A prompt at once, packed or over pages, or chunk by chunk through the cache among NaN: the same bits."""
    length = 259
    q, k, v = inputs(length, 1, 1, head_dim, dtype)
    scale = head_dim**-0.5
    whole = attention(q, k, v, ints([0, length]), scale, window)
    sizes = [0, 1, 100, 27, 129, 2]
    assert sum(sizes) == length
    for chunks in ([length], sizes):
        begin = 0
        for size in chunks:
            end = begin + size
            cache = into_pages([(k[:end], v[:end])], seed=end) if end else into_pages([(k[:1], v[:1])])
            out = paged_attention(q[begin:end], *cache, ints([0, size]), ints([end]), scale, window)
            assert same_bits(out, whole[begin:end]), (begin, end)
            begin = end


def test_bulk_copies_change_no_bit() -> None:
    """A view that tensor descriptors cannot describe (a base 2 bytes off) goes by pointers."""
    tile = tile_of(64, torch.bfloat16)
    q, k, v = inputs(2 * tile + 9, 2, 1, 64, torch.bfloat16)
    shifted = torch.zeros(k.numel() + 1, dtype=k.dtype, device=DEVICE)[1:].view(k.shape)
    shifted.copy_(k)
    assert k.data_ptr() % 16 == 0
    assert shifted.data_ptr() % 16 == 2
    for window in (None, tile):
        args = (v, ints([0, 5, len(q)]), 0.125, window)
        assert same_bits(attention(q, shifted, *args), attention(q, k, *args))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_race(dtype: torch.dtype) -> None:
    """200 runs, one result."""
    counts = [513, 1, 128, 2000]
    args = (*inputs(sum(counts), 8, 2, 128, dtype), starts_of(counts), 128**-0.5)
    first = attention(*args)
    assert all(same_bits(attention(*args), first) for _ in range(200))


# NaN, views, offsets.


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_that_is_seen_shows_and_others_do_not(dtype: torch.dtype) -> None:
    """A key of NaN spoils the queries that see it, not earlier ones; another sequence's spoils nothing."""
    q, k, v = inputs(40, 2, 1, 64, dtype)
    clean = attention(q, k, v, ints([0, 20, 40]), 0.125)
    k[30] = NAN
    out = attention(q, k, v, ints([0, 20, 40]), 0.125)
    assert same_bits(out[:30], clean[:30])
    assert out[30:].isnan().all()
    window = attention(q, k, v, ints([0, 20, 40]), 0.125, 4)
    assert window[30:34].isnan().all()
    assert window[34:].isfinite().all()


def test_views_and_empty_input() -> None:
    """Slices of a packed projection, tokens apart, a turned last dimension, nothing at all."""
    packed = draw(22, 8, 32, dtype=torch.bfloat16)
    starts = ints([0, 4, 11])
    for x in (packed[:11], packed[::2], packed[:11].transpose(1, 2).contiguous().transpose(1, 2)):
        q, k, v = x[:, :4], x[:, 4:6], x[:, 6:]
        expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), starts, 0.2)
        assert same_bits(attention(q, k, v, starts, 0.2), expected)
    nothing = packed[:0]
    for rows in (0, 1, 3):
        empty = attention(nothing[:, :4], nothing[:, 4:6], nothing[:, 6:], ints([0] * (rows + 1)), 0.2)
        assert empty.shape == (0, 4, 32)
    cache = torch.zeros(2, 1, PAGE, 32, dtype=torch.bfloat16, device=DEVICE)
    table = torch.zeros(0, 1, dtype=torch.int32, device=DEVICE)
    assert paged_attention(nothing[:, :4], cache, cache, table, ints([0]), ints([]), 0.2).shape == (0, 4, 32)


def test_heads_beyond_int32_offsets() -> None:
    """The second head lies more than 2^31 elements on: an int32 offset would read elsewhere."""
    apart = 2**31 + 2**20
    torch.use_deterministic_algorithms(False)  # host memory of which only the pages that are written are ever there
    storage = torch.empty(apart + 2**16, dtype=torch.float16, device=DEVICE)
    cache = storage.as_strided((2, 2, PAGE, 16), (apart, PAGE * 16, 16, 1))
    q = storage[2**15 :].as_strided((5, 2, 16), (16, apart, 1))
    cache.copy_(draw(2, 2, PAGE, 16, dtype=torch.float16))
    q.copy_(draw(5, 2, 16, dtype=torch.float16, seed=1))
    rest = (ints([[1, 0]]), ints([0, 5]), ints([140]), 0.25)
    expected = paged_attention(q.contiguous(), cache.contiguous(), cache.contiguous(), *rest)
    assert same_bits(paged_attention(q, cache, cache, *rest), expected)
    flat = cache[:, 0, :5].transpose(0, 1)
    args = (ints([0, 5]), 0.25)
    expected = attention(q.contiguous(), flat.contiguous(), flat.contiguous(), *args)
    assert same_bits(attention(q, flat, flat, *args), expected)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "by pointers"])
def test_pages_beyond_int32_offsets(shift: int) -> None:
    """The last pages of a pool of more than 2^31 elements."""
    pages = 2**31 // (PAGE * 16) + 3
    torch.use_deterministic_algorithms(False)
    storage = torch.empty(pages * PAGE * 16 + shift, dtype=torch.float16, device=DEVICE)
    cache = storage[shift:].view(1, pages, PAGE, 16)
    near, q = draw(1, 2, PAGE, 16, dtype=torch.float16), draw(5, 2, 16, dtype=torch.float16, seed=1)
    cache[:, -2:] = near
    rest = (ints([0, 5]), ints([PAGE + 44]), 0.25)
    got = paged_attention(q, cache, cache, ints([[pages - 1, pages - 2]]), *rest)
    assert same_bits(got, paged_attention(q, near, near, ints([[1, 0]]), *rest))


@pytest.mark.parametrize("part", ["q", "k"])
def test_tokens_beyond_int32_offsets(part: str) -> None:
    """Tokens whose last is more than 2^31 elements from the first, though one stride is not, and counts elements."""
    apart = 2**30 + 2**20 + 1
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 4, 16), (apart, 16, 1))
    far.copy_(draw(3, 4, 16, dtype=torch.float16))
    near, starts = far.contiguous(), ints([0, 3])
    q, kv = (far, near) if part == "q" else (near, far)
    expected = attention(near[:, :2], near[:, 2:3], near[:, 3:], starts, 0.25)
    assert same_bits(attention(q[:, :2], kv[:, 2:3], kv[:, 3:], starts, 0.25), expected)


def test_strided_integers() -> None:
    """Starts, lengths and tables that are views: read as if they were dense, they would be others."""
    q, k_cache, v_cache = (
        draw(*shape, dtype=torch.float32) for shape in ((5, 2, 16), (1, 4, PAGE, 16), (1, 4, PAGE, 16))
    )
    table, starts, lengths = ints([[3, 1], [0, 2]]), ints([0, 2, 5]), ints([PAGE + 3, 7])
    expected = paged_attention(q, k_cache, v_cache, table, starts, lengths, 0.25)

    def strided(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((x, torch.full_like(x, 9)), -1)[..., 0]

    views = (strided(table), strided(starts), strided(lengths))
    assert same_bits(paged_attention(q, k_cache, v_cache, *views, 0.25), expected)
    with pytest.raises(ValueError, match=r"starts must be \[rows \+ 1\] int32 from 0 to 5, got \[1\]"):
        attention(q, q[:, :1], q[:, :1], ints([0]), 0.25)
    with pytest.raises(ValueError, match="hold no page"):
        paged_attention(q, k_cache, v_cache, table[:, :0], starts, lengths, 0.25)


def test_references_take_tensors() -> None:
    """The definitions have the launchers' signatures."""
    q, k, v = inputs(9, 2, 1, 16, torch.float32)
    lists = attention_reference(q, k, v, [0, 4, 9], 0.25)
    k_cache, v_cache, table = into_pages([(k[:4], v[:4]), (k[4:], v[4:])], page=4, fill=0.0)
    for dtype in (torch.int32, torch.int64):
        starts, lengths = ints([0, 4, 9]).to(dtype), ints([4, 5]).to(dtype)
        assert same_bits(attention_reference(q, k, v, starts, 0.25), lists)
        paged = paged_attention_reference(q, k_cache, v_cache, table.to(dtype), starts, lengths, 0.25)
        torch.testing.assert_close(paged, lists)


def test_refuses_what_does_not_fit() -> None:
    q, k, v = inputs(4, 2, 1, 16, torch.float32)
    starts, table = ints([0, 4]), ints([[0]])
    with pytest.raises(TypeError, match="float64"):
        attention(q.double(), k, v, starts, 1.0)
    with pytest.raises(TypeError, match="one dtype"):
        attention(q, k.half(), v, starts, 1.0)
    with pytest.raises(ValueError, match="4 tokens of q"):
        attention(q, k[:3], v[:3], starts, 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v[..., :8], starts, 1.0)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        attention(q[:, :1], k.expand(4, 2, 16), v.expand(4, 2, 16), starts, 1.0)
    with pytest.raises(ValueError, match="head_dim must be in"):
        attention(*(torch.zeros(1, 1, 257, device=DEVICE) for _ in range(3)), starts, 1.0)
    for scale, window in ((0.0, None), (NAN, None), (1.0, 0)):
        with pytest.raises(ValueError, match="scale must be positive"):
            attention(q, k, v, starts, scale, window)
    with pytest.raises(ValueError, match=r"starts must be \[2\] int32"):
        attention(q, k, v, starts.long(), 1.0)
    cache = torch.zeros(1, 2, PAGE, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"lengths must be \[1\] int32"):
        paged_attention(q, cache, cache, table, starts, ints([4, 4]), 1.0)
    with pytest.raises(ValueError, match=r"page_table must be \[1, pages\] int32"):
        paged_attention(q, cache, cache, table.long(), starts, ints([4]), 1.0)
    with pytest.raises(ValueError, match="one after another"):
        paged_attention(q, cache[:, :, :32], cache, table, starts, ints([4]), 1.0)
    with pytest.raises(ValueError, match="page size must be a multiple"):
        paged_attention(q, cache[:, :1, :8], cache[:, :1, :8], table, starts, ints([4]), 1.0)


@pytest.mark.parametrize("paged", [False, True])
def test_registered(paged: bool) -> None:
    q, k, v = inputs(6, 2, 1, 16, torch.float32)
    starts = ints([0, 2, 6])
    op, args = torch.ops.tritium.attention, (q, k, v, starts, 0.25, 3)
    if paged:
        caches = into_pages([(k[:2], v[:2]), (k[2:], v[2:])], fill=0.0)
        op, args = torch.ops.tritium.paged_attention, (q, *caches, starts, ints([2, 4]), 0.25, 3)
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*args)
    assert same_bits(compiled, op(*args))
    packed = (q, k, v, starts, 0.25, 3)
    assert_rule(compiled, attention_reference(*packed), truth_of(attention_reference, *packed))
