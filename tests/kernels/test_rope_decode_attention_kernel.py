"""The fused decoding attention: the rule, what it writes and reads, batch invariance, its scratch, what it refuses."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.rope_decode_attention import (
    Scratch,
    rope_decode_attention,
    rope_decode_attention_reference,
    rope_decode_attention_scratch,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

module = import_module("tritium.kernels.rope_decode_attention")  # the package has the function of this name

pytestmark = pytest.mark.usefixtures("poisoned")
PAGE, CONTEXT, EPS = 32, 600, 1e-6
BF16, F32 = torch.bfloat16, torch.float32
FACTORS = (1 + torch.log2(torch.arange(CONTEXT) + 1.3) / 8).to(DEVICE)
HEAD_DIMS = [16, 56, 64, 80, 128]
MODES = [  # norm, norm first, RoPE (model: in the model dtype), factor on q
    ("weighted", True, "model", False),
    ("unweighted", False, "float32", False),
    ("none", True, "float32", True),
    ("weighted", False, "model", True),
    ("unweighted", True, "none", False),
    ("none", True, "none", False),
]
NAMES = (
    "qkv", "num_heads", "num_kv_heads", "table", "positions", "rope_dtype", "norm", "weight", "eps", "norm_first",
    "query_scale", "k_cache", "v_cache", "slots", "page_table", "lengths", "scale", "window", "longest",
)  # fmt: skip


def rope_table(head_dim: int) -> Tensor:
    angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angle.cos(), angle.sin()), 1).float().to(DEVICE)


class Step:
    """Rows whose older keys lie in shuffled pages. NaN lies wherever nothing was cached, the new key's slot included;
    unused entries of the page table are no page's number. A row's numbers are those of its id."""

    def __init__(
        self,
        lengths: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = BF16,
        mode: tuple[str, bool, str, bool] = MODES[0],
        page: int = PAGE,
        ids: list[int] | None = None,
        seed: int = 0,
        spare: int = 2,
        idle: tuple[int, ...] = (),  # rows without a slot
    ) -> None:
        ids = list(range(len(lengths))) if ids is None else ids
        counts = [-(-length // page) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
        pages = torch.full((len(lengths), max(counts, default=0) + spare), 2**30, dtype=torch.int32)
        cache = torch.full((2, kv_heads, len(order), page, head_dim), float("nan"), dtype=dtype)
        slots = torch.full((len(lengths),), -1)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            older = draw(2, kv_heads, max(length, 1), head_dim, dtype=dtype, seed=100 + ids[row]).cpu()[:, :, :-1]
            for index in range(count if row not in idle else 0):
                pages[row, index] = order.pop()
                piece = older[:, :, index * page : (index + 1) * page]
                cache[:, :, pages[row, index], : piece.shape[2]] = piece
            if length and row not in idle:
                slots[row] = int(pages[row, (length - 1) // page]) * page + (length - 1) % page
        norm, first, rope, scaled = mode
        width, rotates = (heads + 2 * kv_heads) * head_dim, rope != "none"
        own = [draw(width, dtype=dtype, seed=500 + id) for id in ids]
        self.lengths, self.slots = torch.tensor(lengths, dtype=torch.int32, device=DEVICE), slots.to(DEVICE)
        self.arguments: dict[str, Any] = dict(
            zip(
                NAMES,
                (
                    torch.stack(own) if own else draw(0, width, dtype=dtype),
                    heads,
                    kv_heads,
                    rope_table(head_dim) if rotates else None,
                    (self.lengths - 1).clamp(min=0).long() if rotates else None,
                    F32 if rope == "float32" else dtype,
                    norm != "none",
                    draw(heads + kv_heads, head_dim, dtype=dtype, seed=1) * 0.3 + 1 if norm == "weighted" else None,
                    EPS,
                    first,
                    FACTORS if scaled else None,
                    *cache.to(DEVICE),
                    self.slots,
                    pages.to(DEVICE),
                    self.lengths,
                    head_dim**-0.5,
                    None,
                    None,
                ),
                strict=True,
            )
        )

    def with_caches(self, caches: Tensor | None = None, **changed: Any) -> tuple[tuple[Any, ...], Tensor]:
        """The arguments with a copy of the caches, and that copy, [2, Hk, pages, page, D]."""
        given = self.arguments | changed
        caches = torch.stack((given["k_cache"], given["v_cache"]))
        given |= {"k_cache": caches[0], "v_cache": caches[1]}
        return tuple(given[name] for name in NAMES), caches

    def run(self, out: Tensor | None = None, scratch: Scratch | None = None, **changed: Any) -> tuple[Tensor, Tensor]:
        """The kernel's result and the caches that it leaves."""
        arguments, caches = self.with_caches(**changed)
        return rope_decode_attention(*arguments, out=out, scratch=scratch), caches

    def new(self, caches: Tensor) -> Tensor:
        """What lies in the slots: [2, Hk, rows with a slot, D]."""
        return caches.flatten(2, 3)[:, :, self.slots[self.slots >= 0]]

    def check(self, **changed: Any) -> Tensor:
        out, caches = self.run(**changed)
        arguments, theirs = self.with_caches(**changed)
        expected = rope_decode_attention_reference(*arguments)
        values = dict(zip(NAMES, self.with_caches(**changed)[0], strict=True))

        def in_float64(**given: Any) -> tuple[Tensor, Tensor]:
            result = rope_decode_attention_reference(**given | {"rope_dtype": torch.float64})
            return result, torch.stack((given["k_cache"], given["v_cache"]))

        truth, true_caches = truth_of(in_float64, **values)
        assert truth.isfinite().all()
        assert_rule(out, expected, truth, f"lengths {self.lengths.tolist()} {changed}")
        assert_rule(self.new(caches)[0], self.new(theirs)[0], self.new(true_caches)[0], "keys")
        assert same_bits(self.new(caches)[1], self.new(theirs)[1])
        caches.flatten(2, 3)[:, :, self.slots[self.slots >= 0]] = self.new(theirs)
        assert same_bits(caches, theirs)  # but for the keys' last bits, and so nothing else was written
        return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rule(head_dim: int, dtype: torch.dtype) -> None:
    for mode in MODES[: 4 if head_dim == 56 else 2]:
        Step([PAGE + 7], 4, 2, head_dim, dtype, mode, spare=0).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_positions(dtype: torch.dtype) -> None:
    for mode in MODES[4:]:
        Step([PAGE + 7, 3], 4, 2, 64, dtype, mode, spare=0).check()


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16, 17])
def test_groups(group: int) -> None:
    """With two key/value heads, so that a head of the wrong group shows."""
    for dtype in (BF16, F32):
        Step([PAGE + 1], 2 * group, 2, 16, dtype, spare=0).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_the_page(dtype: torch.dtype) -> None:
    """On the runtime's page, together and alone: the new key first in its page, last, and the only one."""
    lengths = [1, 255, 256, 257, 513, 2]
    together = Step(lengths, 3, 1, dtype=dtype, page=256, spare=0).check()
    for row in (0, 2, 3):
        alone = Step([lengths[row]], 3, 1, dtype=dtype, page=256, ids=[row], spare=0)
        assert same_bits(alone.run(longest=lengths[row])[0][0], together[row])


@pytest.mark.parametrize("window", [1, 2, PAGE - 1, PAGE, PAGE + 1, PAGE + 2, 3 * PAGE + 1, 10**6])
def test_windows(window: int) -> None:
    Step([1, PAGE, PAGE + 1, 3 * PAGE + 2], 2, 1, dtype=F32).check(window=window, longest=3 * PAGE + 2)


def test_many_splits() -> None:
    """More than one step of the merge; and a group of which it takes some heads after others."""
    Step([18 * 16 + 3], 16, 1, 64, page=16, spare=0).check()
    Step([PAGE + 1], 12, 1, 256, spare=0).check()


def test_rows_without_a_slot() -> None:
    """They are 0, write nothing, and neither their lengths nor their pages are followed."""
    step = Step([PAGE + 3, 5 * PAGE, 7, 0], idle=(1, 3))
    out = step.check(longest=PAGE + 3)
    assert out[[1, 3]].eq(0).all()
    assert out[[0, 2]].ne(0).any(-1).all()
    step.arguments["lengths"][1] = 2**30
    assert same_bits(step.run(longest=PAGE + 3)[0], out)


@pytest.mark.parametrize(("dtype", "window"), [(BF16, None), (F32, PAGE + 3), (torch.float16, None)])
def test_batch_invariance(dtype: torch.dtype, window: int | None) -> None:
    """A row's bits, and its key's: among 1 to 7 rows, at another place, on other pages, under another bound."""
    lengths = [PAGE + 9, 5, 2 * PAGE, 1, PAGE, 2 * PAGE + 1, PAGE + 1]

    def run(rows: list[int], longest: int | None = None) -> tuple[Tensor, Tensor]:
        step = Step([lengths[row] for row in rows], 3, 1, dtype=dtype, ids=rows, seed=len(rows), spare=0)
        out, caches = step.run(window=window, longest=longest)
        return out, step.new(caches)

    whole, keys = run(list(range(7)))
    assert whole.isfinite().all()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1)).tolist()
    for rows in ([0], [0, 1], order):
        out, new = run(rows)
        assert same_bits(out, whole[rows])
        assert same_bits(new, keys[:, :, rows])
    assert same_bits(run([0], PAGE + 9)[0], run([0], 10**9)[0])


def test_neighbours_do_not_matter() -> None:
    """A row's bits beside NaN, in another's projection and among another's keys."""
    expected = Step([PAGE + 9], ids=[7]).run()[0]
    step = Step([PAGE + 1, PAGE + 9, 2 * PAGE], ids=[30, 7, 31], spare=0)
    step.arguments["qkv"][0] = float("nan")
    step.arguments["v_cache"][:, step.arguments["page_table"][2, 0]] = float("nan")
    out, _ = step.run()
    assert out[::2].isnan().all()
    assert same_bits(out[1:2], expected)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_nan_of_the_new_token_shows(part: str) -> None:
    """Where the new key is alone, where it follows others in its page, and where its page is merged."""
    for lengths in ([1], [9], [PAGE + 1], [PAGE + 9]):
        step = Step(lengths, 2, 1, 16, F32, ("none", True, "none", False))
        step.arguments["qkv"].view(-1, 4, 16)[:, {"q": 0, "k": 2, "v": 3}[part], 5] = float("nan")
        out, caches = step.run()
        seen = out.isnan()
        assert seen[:, 0].any()
        assert seen[:, 1].any() == (part != "q")
        assert step.new(caches).isnan().sum() == (part != "q")


def test_scores_that_overflow() -> None:
    """A new key, or older ones, whose scores are -inf weigh nothing, from the first tile on."""
    for new, older in ((-8.0, 0.0), (0.0, -8.0)):
        for length in (PAGE + 1, PAGE + 9):
            step = Step([length], 2, 1, 16, F32, ("none", True, "none", False))
            step.arguments["qkv"].view(-1, 4, 16)[:, :2] = 1.0
            step.arguments["qkv"].view(-1, 4, 16)[:, 2] = new
            step.arguments["k_cache"].fill_(older)
            step.arguments["v_cache"].fill_(3.0)
            out, _ = step.run(scale=1e38)
            expected = step.arguments["qkv"].view(-1, 4, 16)[:, 3:] if new == 0.0 else torch.full_like(out, 3.0)
            assert torch.equal(out, expected.expand_as(out))


def test_scores_far_below_zero() -> None:
    """Equal ones weigh the same, those of a page without the new key too."""
    step = Step([PAGE + 1], 2, 1, 16, F32, ("none", True, "none", False))
    heads = step.arguments["qkv"].view(-1, 4, 16)
    heads[:, :2], heads[:, 2] = 1.0, -8.0
    step.arguments["k_cache"].fill_(-8.0)
    step.arguments["v_cache"].fill_(3.0)
    out, _ = step.run(scale=30.0)
    expected = (PAGE * 3.0 + heads[:, 3:]) / (PAGE + 1)
    torch.testing.assert_close(out, expected.expand_as(out))


def test_a_row_longer_than_it_was_said_to_be_is_nan() -> None:
    step = Step([5 * PAGE, 3, 2 * PAGE], spare=0)
    for name in ("k_cache", "v_cache"):
        step.arguments[name].nan_to_num_(0.0)
    for longest in (PAGE, 2 * PAGE):
        out, _ = step.run(longest=longest)
        assert out[0].isnan().all()
        assert out[1].isfinite().all()
    step.lengths[0] += 1
    for window in (None, PAGE):
        out, _ = step.run(window=window)
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()


def test_scratch_and_out_are_used_again_and_again() -> None:
    """With room for more; what they held does not matter, and the counts are 0 after every call."""
    scratch = rope_decode_attention_scratch(4, 2, 1, 16, 5, torch.device(DEVICE))
    for lengths in ([PAGE + 1, 3 * PAGE, 1], [2 * PAGE], [PAGE, 2 * PAGE + 3]):
        step = Step(lengths, 2, 1, spare=0)
        expected, out = step.run()[0], torch.empty(len(lengths), 2, 16, dtype=BF16, device=DEVICE)
        for number in (float("nan"), 1e30):
            scratch.partial.fill_(number)
            scratch.state.fill_(number)
            got, _ = step.run(out.fill_(number), scratch)
            assert got.data_ptr() == out.data_ptr()
            assert same_bits(got, expected)
            assert scratch.counts.eq(0).all()


@pytest.mark.parametrize("programs", [1, 5, 14])
def test_any_number_of_programs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase by itself: each program takes its share of the pages, as in a launch of the whole step."""
    step = Step([PAGE + 9, 2 * PAGE, 2], idle=(2,), spare=0)
    expected, left = step.run()

    def phase(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        assert grid == (3 * 2 * 2,)
        options |= {"SYNC": 0, "PREFETCH": False, "launch_pdl": False}
        if launch.INTERPRETED:
            del options["launch_pdl"]
        pointers, rest = args[:14], args[14:]
        for program in range(programs):
            module.rope_decode_attention_phase[(1,)](program, programs, *pointers, pointers[-1], 0, *rest, **options)

    monkeypatch.setattr(module, "launch", phase)
    out, caches = step.run()
    assert same_bits(out, expected)
    assert same_bits(caches, left)


def test_views() -> None:
    """A projection among others, positions of 32 bits, caches with room between heads, a slice of a wider table."""
    step = Step([PAGE + 5, 7], 4, 2, 24)
    expected, left = step.run()
    given = step.arguments
    qkv = draw(2, 5 + 8 * 24, dtype=BF16, seed=9)
    qkv[:, 5:] = given["qkv"]
    _, heads, pages, page, head_dim = left.shape
    room = torch.full((2, heads, pages + 3, page, head_dim), float("nan"), dtype=BF16, device=DEVICE)
    room[0, :, :pages], room[1, :, :pages] = given["k_cache"], given["v_cache"]
    wide = torch.cat((given["page_table"],) * 2, 1)
    changed = {
        "qkv": qkv[:, 5:],
        "positions": given["positions"].int(),
        "k_cache": room[0, :, :pages],
        "v_cache": room[1, :, :pages],
        "page_table": wide[:, : given["page_table"].shape[1]],
    }
    out = rope_decode_attention(**given | changed)
    assert same_bits(out, expected)
    assert same_bits(room[:, :, :pages], left)
    assert room[:, :, pages:].isnan().all()
    changed = {"qkv": given["qkv"].t().contiguous().t(), "page_table": given["page_table"].t().contiguous().t()}
    assert same_bits(step.run(**changed)[0], expected)


def test_empty() -> None:
    assert Step([]).run()[0].shape == (0, 4, 16)
    step = Step([0, 0], spare=0)
    assert step.arguments["page_table"].shape == (2, 0)
    assert step.run()[0].eq(0).all()
    assert Step([0, 0]).run()[0].eq(0).all()


def test_refuses_what_does_not_fit() -> None:
    step = Step([5, PAGE + 1])
    room = rope_decode_attention_scratch(2, 4, 2, 16, 1, torch.device(DEVICE))
    few = rope_decode_attention_scratch(1, 4, 2, 16, 9, torch.device(DEVICE))
    k = step.arguments["k_cache"]
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"qkv": step.arguments["qkv"][:, 1:]}, ValueError, "qkv must be"),
        ({"slots": step.slots.int()}, ValueError, "slots must be contiguous int64"),
        ({"k_cache": k[:1]}, ValueError, "k_cache must be"),
        ({"lengths": step.lengths.long()}, TypeError, "must be torch.int32"),
        ({"window": 0}, ValueError, "a window of 0 keys"),
        ({"out": torch.empty(2, 4, 8, dtype=BF16, device=DEVICE)}, ValueError, r"out must be .* got \[2, 4, 8\]"),
        ({"out": torch.empty(2, 4, 16, device=DEVICE)}, ValueError, "out must be contiguous torch.bfloat16"),
        ({"scratch": room}, ValueError, "scratch is for less than 2 rows of 4 pages of 32 keys"),
        ({"scratch": few}, ValueError, "scratch is for less than 2 rows"),
    ]
    for changed, error, match in wrong:
        with pytest.raises(error, match=match):
            rope_decode_attention(**step.arguments | changed)
    wide = Step([3], 17, 1, 256, F32, ("none", True, "none", False))
    with pytest.raises(ValueError, match=r"17 query heads of 256 torch\.float32 share a key/value head"):
        wide.run()


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_registered(definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, step = torch.ops.tritium.rope_decode_attention, Step([PAGE + 1], 2, 1, dtype=F32, spare=0)
    for name in ("k_cache", "v_cache"):  # opcheck compares inputs before and after: it takes NaN for a change
        step.arguments[name].nan_to_num_(0.0)
    torch.library.opcheck(op, step.with_caches(window=9)[0])
    (first, ours), (second, theirs) = step.with_caches(), step.with_caches()
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*first)
    assert same_bits(compiled, op(*second))
    assert same_bits(ours, theirs)
    torch.testing.assert_close(compiled, rope_decode_attention_reference(*step.with_caches()[0]))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16, 24])
def test_rule_in_full(group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 255, 256, 257, 512, 513, 600, 0]
    for mode in MODES:
        for window in (None, 300):
            Step(lengths, 2 * group, 2, head_dim, dtype, mode, 256, idle=(4,)).check(window=window)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 64])
def test_no_race(rows: int) -> None:
    """Two hundred times the same bits from one scratch, with few programs and with many."""
    step = Step([500 + row for row in range(rows)], 32, 4, 128, page=16)
    scratch = rope_decode_attention_scratch(rows, 32, 4, 128, 40, torch.device(DEVICE))
    first, caches = step.run(scratch=scratch)
    assert first.isfinite().all()
    for _ in range(200):
        again, written = step.run(scratch=scratch)
        assert same_bits(again, first)
        assert same_bits(written, caches)
    assert scratch.counts.eq(0).all()
