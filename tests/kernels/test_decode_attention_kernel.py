"""The decoding attention kernels: the rule, pages, windows, batch invariance, what is not read, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels.decode_attention import decode_attention, decode_attention_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
PAGE = 32  # small, so that few keys fill several
BF16, F32 = torch.bfloat16, torch.float32
GROUPS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
HEAD_DIMS = [16, 56, 64, 80, 96, 128, 256]


class Batch:
    """Rows of keys and values in shuffled pages; unused slots and pages hold NaN, unused entries no page's number."""

    def __init__(
        self,
        lengths: list[int],
        group: int = 2,
        head_dim: int = 16,
        kv_heads: int = 1,
        dtype: torch.dtype = BF16,
        page: int = PAGE,
        seed: int = 0,
        spare: int = 2,
        scale: float = 1.0,
        ids: list[int] | None = None,
    ) -> None:
        ids = list(range(len(lengths))) if ids is None else ids  # which row's numbers: the same at any place
        counts = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        table = torch.full((len(lengths), max(counts, default=0) + spare), 2**30, dtype=torch.int32)
        cache = torch.full((2, kv_heads, len(order), page, head_dim), float("nan"), dtype=dtype)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            numbers = draw(2, kv_heads, max(length, 1), head_dim, dtype=dtype, seed=100 + ids[row], scale=scale).cpu()
            for index in range(count):
                table[row, index] = order.pop()
                piece = numbers[:, :, index * page : min(length, (index + 1) * page)]
                cache[:, :, table[row, index], : piece.shape[2]] = piece
        self.k, self.v = cache.to(DEVICE)
        self.table, self.lengths = table.to(DEVICE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        heads = [draw(group * kv_heads, head_dim, dtype=dtype, seed=500 + id, scale=scale) for id in ids]
        self.q = torch.stack(heads) if heads else draw(0, group * kv_heads, head_dim, dtype=dtype)
        self.scale = head_dim**-0.5 / scale**2

    def arguments(self, window: int | None = None) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.table, self.lengths, self.scale, window

    def run(self, window: int | None = None, longest: int | None = None) -> Tensor:
        return decode_attention(*self.arguments(window), longest)

    def check(self, window: int | None = None, longest: int | None = None) -> None:
        args = self.arguments(window)
        truth = truth_of(decode_attention_reference, *args)
        assert truth.isfinite().all()
        what = f"lengths {self.lengths.tolist()} window {window}"
        assert_rule(self.run(window, longest), decode_attention_reference(*args), truth, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rule_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    Batch([PAGE + 7, 3], 4, head_dim, dtype=dtype).check(longest=PAGE + 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_rule_groups(group: int, dtype: torch.dtype) -> None:
    """With two key/value heads, so that a head of the wrong group shows."""
    Batch([PAGE + 1], group, 16, kv_heads=2, dtype=dtype).check(longest=2 * PAGE)


@pytest.mark.parametrize("group", [17, 24, 64])
def test_rule_wide_groups(group: int) -> None:
    Batch([PAGE + 1], group, 32).check(longest=2 * PAGE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_the_page(dtype: torch.dtype) -> None:
    """One, several pages, none at all, together and each alone; a row without keys is 0."""
    lengths = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 5]
    batch = Batch(lengths, 3, dtype=dtype, spare=0)
    batch.check()
    together = batch.run()
    assert together[0].eq(0).all()
    for row, length in enumerate(lengths):
        alone = Batch([length], 3, dtype=dtype, ids=[row])
        alone.check(longest=length)
        assert same_bits(alone.run(longest=length)[0], together[row])


@pytest.mark.parametrize(("dtype", "page"), [(BF16, 256), (F32, 256), (BF16, 128), (BF16, 16)])
def test_page_sizes(dtype: torch.dtype, page: int) -> None:
    """The runtime's page is several tiles, whose masks and rescaling are then met too."""
    Batch([page, 2 * page - 1, page + 1, 0, 16], 4, dtype=dtype, page=page, spare=0).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_splits(dtype: torch.dtype) -> None:
    """More than one block of the merge; and a first block in which every score overflows to -inf."""
    batch = Batch([18 * 16 + 3], dtype=dtype, page=16, spare=0)
    batch.scale = 1.0  # scores far apart: what was merged before is scaled down in earnest
    batch.check()
    batch.k.fill_(-8.0)
    batch.k[:, batch.table[0, 18], 2] = 0.0
    batch.q.fill_(1.0)
    batch.scale = 1e38
    assert torch.equal(batch.run()[0], batch.v[:, batch.table[0, 18], 2].expand(2, -1))


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, PAGE + 2, 2 * PAGE, 3 * PAGE + 1, 10**6])
def test_windows(window: int) -> None:
    """Windows of less than a page, over two and three of them, and wider than any row."""
    Batch([1, PAGE, PAGE + 1, 3 * PAGE + 2], dtype=F32).check(window, 3 * PAGE + 2)


@pytest.mark.parametrize("window", [1, 255, 256, 257, 300])
def test_windows_on_the_runtime_page(window: int) -> None:
    Batch([256, 2 * 256 + 80], 4, page=256, spare=0).check(window)


@pytest.mark.parametrize("window", [5, PAGE + 3])
def test_what_lies_before_a_window_is_not_read(window: int) -> None:
    """Its pages may have been handed to another row, and its slots hold anything."""
    batch = Batch([3 * PAGE + 2, PAGE], dtype=F32)
    expected = batch.run(window)
    for row, length in enumerate(batch.lengths.tolist()):
        for position in range(length - window):
            page = batch.table[row, position // PAGE]
            batch.k[:, page, position % PAGE] = float("nan")
            batch.v[:, page, position % PAGE] = float("nan")
        batch.table[row, : max(0, length - window) // PAGE] = 2**30
    assert expected.isfinite().all()
    assert same_bits(batch.run(window), expected)


@pytest.mark.parametrize(("dtype", "window"), [(BF16, None), (F32, None), (torch.float16, PAGE + 3)])
def test_batch_invariance(dtype: torch.dtype, window: int | None) -> None:
    """A row's bits: among 1 to 17 rows, at another place and on other pages, under another bound."""
    lengths = [PAGE + 9, 5, 2 * PAGE, *[1, PAGE] * 7]

    def run(rows: list[int], longest: int | None = 2 * PAGE) -> Tensor:
        batch = Batch([lengths[row] for row in rows], 3, dtype=dtype, ids=rows, seed=len(rows))
        return batch.run(window, longest)

    whole = run(list(range(17)))
    assert whole.isfinite().all()
    for rows in (1, 2, 4, 9) if DEVICE == "cpu" else range(1, 17):
        assert same_bits(run(list(range(rows))), whole[:rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1)).tolist()
    assert same_bits(run(order), whole[order])
    for longest in (None, PAGE + 9, 10**9):
        assert same_bits(run([0], longest), whole[:1])


@pytest.mark.parametrize("window", [None, PAGE + 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_do_not_matter(dtype: torch.dtype, window: int | None) -> None:
    """A row's bits beside much longer rows, and beside NaN."""
    alone = Batch([PAGE + 9], 3, dtype=dtype, ids=[7]).run(window)
    batch = Batch([9 * PAGE + 1, PAGE + 9, 6 * PAGE], 3, dtype=dtype, ids=[30, 7, 31], spare=0)
    assert same_bits(batch.run(window)[1:2], alone)
    batch.q[0] = float("nan")
    batch.v[:, batch.table[2, 5]] = float("nan")
    poisoned = batch.run(window)
    assert poisoned[::2].isnan().all()
    assert same_bits(poisoned[1:2], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-38])
def test_one_split_needs_no_merge(scale: float, dtype: torch.dtype) -> None:
    """A grid of one split writes the result itself: the bits that merging one split gives, signed zeros included."""
    batch = Batch([PAGE, 1, PAGE - 3, 0], 5, dtype=dtype)
    batch.v *= scale
    assert same_bits(batch.run(longest=PAGE), batch.run(longest=3 * PAGE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scores(sign: int, dtype: torch.dtype) -> None:
    """Scores of thousands, the largest in the first or the last page; exp of either is out of range by itself."""
    batch = Batch([2 * PAGE + 3], dtype=dtype)
    ramp = torch.arange(2 * PAGE + 3).mul(sign * 8.0).to(dtype).to(DEVICE)
    for position, height in enumerate(ramp):
        batch.k[:, batch.table[0, position // PAGE], position % PAGE] = height
    batch.q.fill_(1.0)
    batch.scale = 1.0
    batch.check()
    if sign < 0:  # all scores but the first overflow to -inf, those of later pages altogether
        batch.scale = 1e38
        first = batch.v[:, batch.table[0, 0], 0]
        assert torch.equal(batch.run()[0], first.expand(2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [1e-4, 1e2])
def test_extreme_magnitudes(magnitude: float, dtype: torch.dtype) -> None:
    Batch([PAGE + 5, 7], 4, dtype=dtype, scale=magnitude).check()


def test_a_nan_in_a_row_shows() -> None:
    """A visible NaN is not taken for a row without keys."""
    batch = Batch([PAGE + 5, 7], dtype=F32)
    batch.k[:, batch.table[0, 1], 2] = float("nan")
    for longest in (None, PAGE + 5):
        got = batch.run(longest=longest)
        assert got[0].isnan().all()
        assert got[1].isfinite().all()


@pytest.mark.parametrize("window", [None, PAGE])
def test_a_row_longer_than_it_was_said_to_be_is_nan(window: int | None) -> None:
    """Neither a bound that does not hold nor a length beyond the table may give a plausible result."""
    batch = Batch([5 * PAGE, 3, 2 * PAGE], spare=0)
    batch.k.nan_to_num_(0.0)
    batch.v.nan_to_num_(0.0)
    if window is None:
        for longest in (PAGE, 2 * PAGE):
            got = batch.run(longest=longest)
            assert got[0].isnan().all()
            assert got[1].isfinite().all()
    batch.lengths[0] = 5 * PAGE + 1
    got = batch.run(window)
    assert got[0].isnan().all()
    assert got[1:].isfinite().all()


def test_views() -> None:
    """q as a slice of a packed projection, a cache with room between its heads, a slice of a wider table."""
    batch = Batch([PAGE + 5, 7], 2, 24, kv_heads=2)
    expected = batch.run()
    packed = draw(2, 8, 24, dtype=BF16, seed=9)
    packed[:, :4] = batch.q
    batch.q = packed[:, :4]
    heads, pages, page, head_dim = batch.k.shape
    room = torch.full((2, heads, pages + 3, page, head_dim), float("nan"), dtype=BF16, device=DEVICE)
    room[0, :, :pages], room[1, :, :pages] = batch.k, batch.v
    batch.k, batch.v = room[:, :, :pages]
    batch.table = torch.cat((batch.table, batch.table), 1)[:, : batch.table.shape[1]]
    assert not any(x.is_contiguous() for x in (batch.q, batch.k, batch.table))
    assert same_bits(batch.run(), expected)
    batch.q = batch.q.transpose(1, 2).contiguous().transpose(1, 2)
    batch.table = batch.table.t().contiguous().t()
    batch.lengths = batch.lengths.repeat_interleave(2)[::2]
    assert same_bits(batch.run(), expected)


def test_empty() -> None:
    """No rows, no pages, no keys."""
    assert Batch([]).run().shape == (0, 2, 16)
    batch = Batch([0, 0], spare=0)
    assert batch.table.shape == (2, 0)
    assert batch.run().eq(0).all()
    batch = Batch([0, 0])
    for longest in (None, 0):
        assert batch.run(longest=longest).eq(0).all()


def test_queries_beyond_int32_offsets() -> None:
    """Rows whose last is more than 2^31 elements from the first, though one stride is not."""
    apart, batch = 2**30 + 2**20, Batch([PAGE + 5, 3, 7], 2, 16, dtype=torch.float16)
    expected = batch.run()
    torch.use_deterministic_algorithms(False)
    far = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE).as_strided(batch.q.shape, (apart, 16, 1))
    far.copy_(batch.q)
    batch.q = far
    assert same_bits(batch.run(), expected)


@pytest.mark.parametrize("far", ["head", "page"])
def test_beyond_int32_offsets(far: str) -> None:
    """A head or page that begins past 2^31 elements, by strides below that: an int32 offset would read elsewhere."""
    batch = Batch([PAGE + 5], 2, 16, kv_heads=3, dtype=torch.float16)
    expected = batch.run()
    heads, pages, page, head_dim = batch.k.shape
    skipped = 2**31 // (page * head_dim) if far == "page" else 0
    apart = 2**30 + 2**20 if far == "head" else (skipped + pages) * page * head_dim
    caches = []
    for cache in (batch.k, batch.v):
        size = heads * apart
        storage = torch.empty(size, dtype=torch.float16, device=DEVICE) if DEVICE == "cuda" else _untouched(size)
        view = storage.as_strided((heads, skipped + pages, page, head_dim), (apart, page * head_dim, head_dim, 1))
        view[:, skipped:] = cache
        caches.append(view)
    batch.k, batch.v = caches
    batch.table += skipped
    assert same_bits(batch.run(), expected)


def _untouched(count: int) -> Tensor:
    """Host memory of which only the pages that are written are ever there: not poisoned."""
    torch.use_deterministic_algorithms(False)
    return torch.empty(count, dtype=torch.float16)


def test_refuses_what_does_not_fit() -> None:
    batch = Batch([5, 7])

    def refused(error: type[Exception], match: str, **changed: Any) -> None:
        names = ("q", "k_cache", "v_cache", "page_table", "lengths", "scale", "window")
        with pytest.raises(error, match=match):
            decode_attention(**dict(zip(names, batch.arguments(), strict=True)) | changed)

    k = batch.k
    refused(TypeError, "float64", q=batch.q.double())
    refused(TypeError, "q is torch.bfloat16, the cache is torch.float32", k_cache=k.float(), v_cache=k.float())
    refused(ValueError, "q must be", q=batch.q[0])
    refused(ValueError, "v_cache must be laid out like k_cache", v_cache=k[:, :1])
    refused(ValueError, "heads of 8 over a cache of 16", q=batch.q[..., :8])
    refused(ValueError, "130 query heads over 1", q=batch.q.repeat(1, 65, 1))
    refused(ValueError, "2 query heads over 3", k_cache=k.repeat(3, 1, 1, 1), v_cache=k.repeat(3, 1, 1, 1))
    refused(ValueError, "a page of 31 keys", k_cache=k[:, :, 1:], v_cache=k[:, :, 1:])
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    refused(ValueError, "follow one another", k_cache=turned, v_cache=turned)
    refused(TypeError, "must be torch.int32", page_table=batch.table.long())
    refused(TypeError, "must be torch.int32", lengths=batch.lengths.long())
    refused(ValueError, r"page_table must be \[2, pages\]", page_table=batch.table[:1])
    refused(ValueError, r"lengths \[2\]", lengths=batch.lengths[:1])
    refused(ValueError, "a window of 0 keys", window=0)


@pytest.mark.parametrize("options", [(), (3,), (None, PAGE)])
def test_registered(options: tuple[int | None, ...]) -> None:
    batch = Batch([PAGE, 7], dtype=F32)
    # opcheck compares inputs before and after: it takes NaN for a change.
    args = (batch.q, batch.k.nan_to_num(0.0), batch.v.nan_to_num(0.0), *batch.arguments()[3:6], *options)
    op = torch.ops.tritium.decode_attention
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*args)
    assert same_bits(compiled, op(*args))
    assert same_bits(compiled, decode_attention(*args))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 4, 8, 16, 24, 64])
def test_rule_in_full(group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 255, 256, 257, 1000, 0, 4096, 5000]
    for window in (None, 300):
        Batch(lengths, group, head_dim, kv_heads=2, dtype=dtype, page=256).check(window)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_no_race(rows: int) -> None:
    """Two hundred times the same bits, with few programs and with many."""
    batch = Batch([3000 + 17 * row for row in range(rows)], 8, 128, kv_heads=4, page=256)
    first = batch.run()
    assert first.isfinite().all()
    assert all(same_bits(batch.run(), first) for _ in range(200))
