"""The kernel of QK-norm, rotation and cache write: the rule, its rounding points, what it writes, what it refuses."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_at_reference,
    qk_norm_rope_cache,
    qk_norm_rope_cache_reference,
    rope_rows,
    rotate_reference,
)
from tritium.kernels.rms_norm import rms_norm_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
EPS, CONTEXT = 1e-6, 50
FACTORS = (1 + torch.log2(torch.arange(CONTEXT) + 1.3) / 8).to(DEVICE)  # float32, no number of a half type
HALVES = [torch.bfloat16, torch.float16]
HEAD_DIMS = [16, 56, 64, 80, 96, 128, 256]
GQA = [(1, 1), (3, 3), (2, 1), (9, 3), (8, 2), (8, 1), (16, 1), (24, 6)]
MODES = [  # norm, norm first, RoPE (model: in the model dtype)
    ("none", True, "none"),
    ("none", True, "model"),
    ("none", False, "float32"),
    ("weighted", True, "none"),
    ("unweighted", False, "none"),
    ("weighted", True, "model"),
    ("unweighted", True, "float32"),
    ("weighted", False, "model"),
    ("weighted", False, "float32"),
    ("unweighted", False, "float32"),
]


class Args(NamedTuple):
    """The arguments of the kernel and of its definition."""

    qkv: Tensor
    num_heads: int
    num_kv_heads: int
    table: Tensor | None
    positions: Tensor | None
    rope_dtype: torch.dtype
    norm: bool
    weight: Tensor | None
    eps: float
    norm_first: bool
    query_scale: Tensor | None = None

    def scaled(self) -> "Args":
        """With a factor on q for each position."""
        return self._replace(query_scale=FACTORS)

    def take(self, tokens: Any) -> "Args":
        """Some of the tokens, or all in another order."""
        return self._replace(qkv=self.qkv[tokens], positions=None if self.positions is None else self.positions[tokens])

    def heads(self) -> Tensor:
        """q's and k's heads [T, Hq + Hk, D] of the input."""
        count = self.num_heads + 2 * self.num_kv_heads
        return self.qkv.unflatten(1, (count, -1))[:, : self.num_heads + self.num_kv_heads]


def rope_table(head_dim: int) -> Tensor:
    angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angle.cos(), angle.sin()), 1).float().to(DEVICE)


def inputs(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    mode: tuple[str, bool, str] = ("weighted", True, "model"),
    scale: float = 1.0,
    eps: float = EPS,
) -> Args:
    norm, first, rope = mode
    positions = torch.tensor([CONTEXT - 1, 0, 17, 5, 17, 41])[torch.arange(tokens) % 6].to(DEVICE)
    return Args(
        draw(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, scale=scale),
        heads,
        kv_heads,
        None if rope == "none" else rope_table(head_dim),
        None if rope == "none" else positions,
        torch.float32 if rope == "float32" else dtype,
        norm != "none",
        draw(heads + kv_heads, head_dim, dtype=dtype, seed=1) * 0.3 + 1 if norm == "weighted" else None,
        eps,
        first,
    )


def in_float64(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of widened arguments, the rotation in float64 too."""
    return qk_norm_rope_at_reference(*Args(*args)._replace(rope_dtype=torch.float64))


def check(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    got = qk_norm_rope(*args)
    expected, truth = qk_norm_rope_at_reference(*args), truth_of(in_float64, *args)
    for name, ours, theirs, true in zip("qk", got, expected, truth, strict=False):
        assert ours.is_contiguous()
        assert_rule(ours, theirs, true, f"{name} {list(true.shape)} {args[5:7]} {args.norm_first}")
    assert same_bits(got[2], expected[2])
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rule(head_dim: int, dtype: torch.dtype) -> None:
    for mode in MODES:
        check(inputs(2, 4, 2, head_dim, dtype, mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), GQA)
def test_head_counts(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """The packed heads are cut at the right places, across the blocks of heads, for every GQA ratio."""
    check(inputs(2, heads, kv_heads, 96, dtype))
    check(inputs(2, heads, kv_heads, 64, dtype, ("weighted", False, "float32")))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "kv_heads"), [*GQA, (32, 8), (32, 32), (64, 8)])
def test_rule_in_full(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    for mode in MODES:
        for tokens in (1, 17, 300):
            check(inputs(tokens, heads, kv_heads, head_dim, dtype, mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_extreme_magnitudes_and_the_eps(scale: float, first: bool, dtype: torch.dtype) -> None:
    """Squares beyond float16's range on either side: at 1e-4 an eps of 1e-6, not the mean square of 1e-8, decides."""
    args = inputs(2, 4, 2, 80, dtype, ("unweighted", first, "float32"), scale)
    q, k, _ = check(args)
    rms = torch.cat((q, k), 1).double().square().mean().sqrt().item()
    assert rms == pytest.approx(0.1 if scale == 1e-4 else 1.0, rel=0.15)
    zero = qk_norm_rope(*args._replace(qkv=torch.zeros_like(args.qkv)))
    assert all(x.eq(0).all() for x in zero)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_rounds_where_the_definition_does(mode: tuple[str, bool, str], dtype: torch.dtype) -> None:
    """Bit for bit, wherever float32 noise cannot tip a rounding: the norm's, and that of the rotation in float32."""
    args = inputs(8, 4, 2, 64, dtype, mode)
    x, certain = args.heads(), torch.ones_like(args.heads(), dtype=torch.bool)

    def settle(exact: Tensor, margin: Tensor | float) -> Tensor:
        """Rounds, and drops whole pairs of which one element is within the margin of a tie."""
        nonlocal certain
        sure = (exact - margin).to(dtype) == (exact + margin).to(dtype)
        certain = certain & sure & sure.roll(32, -1)
        return exact.to(dtype)

    def normalised(x: Tensor) -> Tensor:
        exact = rms_norm_reference(x.double(), None, args.eps)
        y = settle(exact, exact.abs() * 1e-6)
        return y if args.weight is None else y * args.weight

    if args.norm and args.norm_first:
        x = normalised(x)
    if args.table is not None:
        cos, sin = rope_rows(*args.table[args.positions].unbind(1))
        if args.rope_dtype == dtype:
            x = rotate_reference(x, cos.to(dtype), sin.to(dtype))
        else:
            margin = 2e-7 * (x.double().abs() + x.double().roll(32, -1).abs())
            x = settle(rotate_reference(x.double(), cos.double(), sin.double()), margin)
    if args.norm and not args.norm_first:
        head_is_sure = certain.all(-1, keepdim=True)  # each element is in the sum of squares
        x = normalised(x)
        certain = certain & head_is_sure
    assert certain.float().mean() > (0.5 if mode[2] == "float32" and not mode[1] else 0.9)
    q, k, _ = qk_norm_rope(*args)
    assert torch.equal(torch.cat((q, k), 1)[certain], x[certain])


@pytest.mark.parametrize("dtype", HALVES)
def test_the_contracts_differ(dtype: torch.dtype) -> None:
    """Where the rotation rounds, which comes first, and whether there is a weight: each is seen in many elements."""
    q = {mode: qk_norm_rope(*inputs(4, 4, 1, 64, dtype, MODES[mode]))[0] for mode in (0, 1, 2, 5, 7, 8, 9)}
    for mode, other in ((1, 2), (7, 8), (5, 7), (8, 9), (0, 1)):
        assert (q[mode] != q[other]).float().mean() > 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_positions(dtype: torch.dtype) -> None:
    """One position more turns every head; int32 and int64 are the same; position 0 leaves the head alone."""
    args = inputs(6, 2, 1, 64, dtype, ("none", True, "float32"))
    args = args._replace(positions=args.positions.clamp(max=CONTEXT - 2))
    q, k, _ = check(args)
    for x, y in zip((q, k), qk_norm_rope(*args._replace(positions=args.positions + 1)), strict=False):
        assert ((x - y).double().norm(dim=-1) > 0.1 * x.double().norm(dim=-1)).all()
    narrow = qk_norm_rope(*args._replace(positions=args.positions.int()))
    assert same_bits(narrow[0], q)
    assert same_bits(narrow[1], k)
    zero = qk_norm_rope(*args._replace(positions=args.positions * 0))
    assert torch.equal(torch.cat(zero[:2], 1), args.heads())


ROTATING = [mode for mode in MODES if mode[2] != "none"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_query_scale_rule(head_dim: int, dtype: torch.dtype) -> None:
    for mode in ROTATING[::3]:
        check(inputs(2, 4, 2, head_dim, dtype, mode).scaled())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ROTATING)
def test_query_scale_rounds_the_factor_then_the_product(mode: tuple[str, bool, str], dtype: torch.dtype) -> None:
    """Bit for bit, from the q without it: the factor of the token's position rounds, then the product; k stays.

    Positions are out of order and one comes twice; nine heads of q are no multiple of a program's heads.
    """
    args = inputs(6, 9, 3, 64, dtype, mode).scaled()
    assert args.positions is not None
    q, k, v = qk_norm_rope(*args._replace(query_scale=None))
    factors = torch.stack([FACTORS[position] for position in args.positions.tolist()])
    wide = q.double()  # products of two float32 are exact there
    expected = (wide * factors.to(dtype).double().view(-1, 1, 1)).to(dtype)
    for positions in (args.positions, args.positions.int()):
        scaled = qk_norm_rope(*args._replace(positions=positions))
        assert same_bits(scaled[0], expected)
        assert same_bits(scaled[1], k)
        assert same_bits(scaled[2], v)
    if dtype != torch.float32:
        assert (expected != (wide * factors.double().view(-1, 1, 1)).to(dtype)).float().mean() > 0.05


def caches(kv_heads: int, head_dim: int, dtype: torch.dtype, pages: int = 3, page: int = 8) -> Tensor:
    """Keys and values [2, Hk, pages, page, D], all NaN, with room around them for what is written astray."""
    return torch.full((4, kv_heads, pages, page, head_dim), float("nan"), dtype=dtype, device=DEVICE)[1:3]


def check_cache(args: Args, slots: Tensor, pool: Tensor) -> Tensor:
    """q, and in their slots k and v, are those of the plain form; nothing else has changed in the pool. Returns q."""
    expected, (q, k, v) = pool.clone(), qk_norm_rope(*args)
    page = pool.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0, :, slot // page, slot % page] = k[token]
            expected[1, :, slot // page, slot % page] = v[token]
    rotated = qk_norm_rope_cache(*args, pool[0], pool[1], slots)
    assert same_bits(pool, expected)
    assert same_bits(rotated, q)
    assert rotated.is_contiguous()
    return rotated


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cache(head_dim: int, dtype: torch.dtype) -> None:
    """Shuffled slots across pages, a token of padding; the caches' other slots stay NaN."""
    slots = torch.tensor([17, 7, -1, 8, 23, 0], device=DEVICE)
    for args in (inputs(6, 4, 2, head_dim, dtype, MODES[5]), inputs(6, 4, 2, head_dim, dtype, MODES[9]).scaled()):
        check_cache(args, slots, caches(2, head_dim, dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), GQA)
def test_cache_head_counts(heads: int, kv_heads: int) -> None:
    """Also with heads that lie apart: every other one of a larger pool, whose other heads stay NaN."""
    args = inputs(2, heads, kv_heads, 64, torch.bfloat16)
    pool = caches(2 * kv_heads, 64, torch.bfloat16)
    check_cache(args, torch.tensor([9, 2], device=DEVICE), pool[:, ::2])
    assert pool[:, 1::2].isnan().all()


def test_keys_and_values_with_different_strides() -> None:
    """Keys with heads far apart, values with heads close together."""
    args = inputs(3, 4, 2, 64, torch.bfloat16)
    _, k, v = qk_norm_rope(*args)
    keys, values = caches(6, 64, torch.bfloat16)[0, ::3], caches(2, 64, torch.bfloat16)[1]
    qk_norm_rope_cache(*args, keys, values, torch.tensor([9, 2, 15], device=DEVICE))
    for cache, x in ((keys, k), (values, v)):
        assert same_bits(cache.flatten(1, 2)[:, [9, 2, 15]].transpose(0, 1), x)


@pytest.mark.parametrize("scaled", [False, True])
def test_cache_of_its_definition(scaled: bool) -> None:
    """The definition writes what the kernel writes, where its own q and k are the kernel's to the bit."""
    args = inputs(4, 4, 2, 80, torch.bfloat16, ("none", True, "model"))
    args = args.scaled() if scaled else args
    slots = torch.tensor([3, -1, 20, 11], device=DEVICE)
    ours, theirs = caches(2, 80, torch.bfloat16), caches(2, 80, torch.bfloat16)
    q = qk_norm_rope_cache(*args, ours[0], ours[1], slots)
    assert same_bits(q, qk_norm_rope_cache_reference(*args, theirs[0], theirs[1], slots))
    assert same_bits(ours, theirs)
    assert ours.isnan().float().mean() == pytest.approx(1 - 3 / 24)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with them before it drops them
def test_values_are_moved_not_computed() -> None:
    """Infinities and NaN of any payload among the values reach the cache as they are, and no key or query."""
    args = inputs(1, 2, 1, 16, torch.bfloat16)
    words = torch.tensor([0x7F80, -0x80, 0x7FC1, 0x7F81, -0x1, -0x8000, 0x0001, 0x7F7F], dtype=torch.int16).to(DEVICE)
    args.qkv[0, 48:56] = words.view(torch.bfloat16)
    pool = caches(1, 16, torch.bfloat16)
    q = qk_norm_rope_cache(*args, pool[0], pool[1], torch.tensor([12], device=DEVICE))
    assert torch.equal(pool[1, 0, 1, 4, :8].view(torch.int16), words)
    assert q.isfinite().all()
    assert pool[0, 0, 1, 4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_batch_invariance(head_dim: int, dtype: torch.dtype) -> None:
    """A token's bits: alone, among 1 to 17, at another place, beside NaN; q, k and what goes to the cache."""
    args = inputs(17, 4, 2, head_dim, dtype)
    args = args.scaled() if head_dim == 80 else args
    whole = qk_norm_rope(*args)[:2]

    def same(part: Args, of: Any) -> None:
        assert all(same_bits(a, b[of]) for a, b in zip(qk_norm_rope(*part)[:2], whole, strict=True))

    for tokens in range(1, 18) if dtype == torch.bfloat16 and head_dim == 64 else (1, 2, 16):
        same(args.take(slice(tokens)), slice(tokens))
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    same(args.take(order), order)
    alone = torch.full_like(args.qkv, float("nan"))
    alone[8] = args.qkv[8]
    beside = args._replace(qkv=alone)
    q, k, _ = qk_norm_rope(*beside)
    assert same_bits(q[8], whole[0][8])
    assert same_bits(k[8], whole[1][8])
    pool = caches(2, head_dim, dtype)
    q = qk_norm_rope_cache(*beside, pool[0], pool[1], torch.arange(17, device=DEVICE))
    assert same_bits(q[8], whole[0][8])
    assert same_bits(pool[0, :, 1, 0], whole[1][8])


def test_views_and_empty_input() -> None:
    """Rows cut from wider ones, columns apart, no tokens; v is a view; the input survives."""
    args = inputs(3, 4, 2, 64, torch.float32)
    q, k, v = qk_norm_rope(*args)
    assert v.data_ptr() == args.qkv[:, 6 * 64 :].data_ptr()
    wider = torch.full((3, 600), float("nan"), device=DEVICE)
    wider[:, 8:520] = args.qkv
    for qkv in (wider[:, 8:520], args.qkv.t().contiguous().t(), torch.stack((args.qkv, args.qkv), 2)[:, :, 1]):
        view = args._replace(qkv=qkv)
        assert all(same_bits(a, b) for a, b in zip(qk_norm_rope(*view), (q, k, v), strict=True))
        pool = caches(2, 64, torch.float32)
        assert same_bits(check_cache(view, torch.tensor([1, 9, 8], device=DEVICE), pool), q)
    strided = torch.stack((args.weight, args.weight), 2)[:, :, 0]
    assert same_bits(qk_norm_rope(*args._replace(weight=strided))[0], q)
    assert same_bits(args.qkv, inputs(3, 4, 2, 64, torch.float32).qkv)
    none = args.take(slice(0))
    assert [x.shape for x in qk_norm_rope(*none)] == [(0, 4, 64), (0, 2, 64), (0, 2, 64)]
    pool = caches(2, 64, torch.float32)
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert check_cache(none, empty, pool).shape == (0, 4, 64)


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks; neighbouring rows would hide a column too many, but for the last."""
    rooms = room_around_outputs(monkeypatch)
    for head_dim in (56, 64, 80):
        q, k, _ = qk_norm_rope(*inputs(2, 3, 1, head_dim, torch.float32))
        assert q.ne(7).all()
        assert k.ne(7).all()
    assert len(rooms) == 6
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_offsets_beyond_int32() -> None:
    """The third token, the third head of the cache, and slots are more than 2^31 elements from the first.

    The strides are less, as Triton would take a larger one, and any product with it, as int64.
    """
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 2**20, dtype=torch.float16, device=DEVICE)
    args = inputs(3, 3, 3, 64, torch.float16)
    q, k, v = qk_norm_rope(*args)
    qkv = storage.as_strided((3, 9 * 64), (apart, 1))
    qkv.copy_(args.qkv)
    assert all(same_bits(a, b) for a, b in zip(qk_norm_rope(*args._replace(qkv=qkv)), (q, k, v), strict=True))

    slots = torch.tensor([3, 10, 0], device=DEVICE)
    heads_apart = [storage.as_strided((3, 2, 8, 64), (apart, 512, 64, 1), offset) for offset in (0, 1024)]
    assert same_bits(qk_norm_rope_cache(*args, *heads_apart, slots), q)
    for cache, x in zip(heads_apart, (k, v), strict=True):
        assert same_bits(cache.flatten(1, 2)[:, slots].transpose(0, 1), x)

    args = inputs(2, 2, 1, 64, torch.float16)
    q, k, v = qk_norm_rope(*args)
    pages = 2 * apart // 512
    many = [storage.as_strided((1, pages, 8, 64), (pages * 512, 512, 64, 1), offset) for offset in (0, 1024)]
    slots = torch.tensor([2**25 + 100, 5], device=DEVICE)
    assert same_bits(qk_norm_rope_cache(*args, *many, slots), q)
    for cache, x in zip(many, (k, v), strict=True):
        assert same_bits(cache.flatten(1, 2)[0, slots], x[:, 0])


@needs_gpu
def test_no_race() -> None:
    args = inputs(300, 16, 8, 128, torch.bfloat16)
    slots = torch.randperm(512, generator=torch.Generator().manual_seed(3))[:300].to(DEVICE)
    first, pool = qk_norm_rope(*args), caches(8, 128, torch.bfloat16, 2, 256)
    for _ in range(200):
        again = caches(8, 128, torch.bfloat16, 2, 256)
        q = qk_norm_rope_cache(*args, again[0], again[1], slots)
        qk_norm_rope_cache(*args, pool[0], pool[1], slots)
        assert same_bits(q, first[0])
        assert same_bits(again, pool)


def test_refuses_what_does_not_fit() -> None:
    args = inputs(2, 4, 2, 64, torch.float32)
    wrong = [
        ({"qkv": args.qkv[:, 1:]}, ValueError, r"qkv must be \[T, 8 heads of an even width\], got \[2, 511\]"),
        ({"qkv": args.qkv[0]}, ValueError, "qkv must be"),
        ({"qkv": args.qkv[:, :0]}, ValueError, "2 to 256 elements, got 0"),
        ({"qkv": torch.zeros(1, 8 * 258, device=DEVICE)}, ValueError, "2 to 256 elements, got 258"),
        ({"qkv": args.qkv.double()}, TypeError, "float64"),
        ({"num_kv_heads": -1}, ValueError, "there must be heads"),
        ({"table": None}, ValueError, "come together"),
        ({"table": args.table[:, :, :16]}, ValueError, r"table must be contiguous float32 \[context, 2, 32\]"),
        ({"table": args.table.double()}, ValueError, "table must be contiguous float32"),
        ({"positions": args.positions[:1]}, ValueError, r"positions must be contiguous int32 or int64 \[2\]"),
        ({"positions": args.positions.float()}, ValueError, "positions must be"),
        ({"rope_dtype": torch.bfloat16}, TypeError, "rope_dtype must be torch.float32 or torch.float32 like qkv"),
        ({"weight": args.weight[:4]}, ValueError, r"weight must be \[6, 64\] torch.float32 like qkv"),
        ({"weight": args.weight.half()}, ValueError, "weight must be"),
        ({"query_scale": FACTORS, "table": None, "positions": None}, ValueError, "it needs table and positions"),
        ({"query_scale": FACTORS[1:]}, ValueError, r"query_scale must be contiguous float32 \[50\], .* got \[49\]"),
        ({"query_scale": FACTORS[:, None]}, ValueError, r"a factor for each row of table, got \[50, 1\] torch.float32"),
        ({"query_scale": FACTORS.half()}, ValueError, r"query_scale must be .* got \[50\] torch.float16"),
        ({"query_scale": torch.stack((FACTORS, FACTORS), 1)[:, 0]}, ValueError, "query_scale must be contiguous"),
        ({"query_scale": FACTORS.to("meta")}, ValueError, "they must be on one device"),
        ({"query_scale": FACTORS.clone().requires_grad_()}, RuntimeError, "computes no gradients"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            qk_norm_rope(*args._replace(**change))


def test_refuses_a_cache_that_does_not_fit() -> None:
    args, slots = inputs(2, 4, 2, 64, torch.float32), torch.tensor([0, 1], device=DEVICE)
    keys, values = caches(2, 64, torch.float32)
    wrong = [
        ((keys[:1], values, slots), r"k_cache must be \[2, pages, page size, 64\] torch.float32, got \[1, 3, 8, 64\]"),
        ((keys, values.half(), slots), "v_cache must be"),
        ((keys, values[0], slots), "v_cache must be"),
        ((keys.transpose(1, 2), values, slots), "k_cache: the pages of one head must be contiguous"),
        ((keys, values[..., ::2].repeat(1, 1, 1, 2)[:, ::2].repeat(1, 2, 1, 1)[:, ::2], slots), "v_cache: the pages"),
        ((keys, values, slots[:1]), r"slots must be contiguous int64 \[2\]"),
        ((keys, values, slots.int()), "slots must be contiguous int64"),
    ]
    with pytest.raises(ValueError, match="query_scale must be contiguous"):
        qk_norm_rope_cache(*args._replace(query_scale=torch.ones(3, device=DEVICE)), keys, values, slots)
    for cache, message in wrong:
        with pytest.raises(ValueError, match=message):
            qk_norm_rope_cache(*args, *cache)


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
@pytest.mark.parametrize(("mode", "scaled"), [(MODES[0], False), (MODES[5], False), (MODES[5], True)])
def test_registered(
    mode: tuple[str, bool, str], scaled: bool, definition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no kernel can run, and with nothing to do: no output may be a view of the input."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, args = torch.ops.tritium.qk_norm_rope, inputs(3, 4, 2, 64, torch.bfloat16, mode)
    args = args.scaled() if scaled else args
    torch.library.opcheck(op, args)
    compiled = torch.compile(lambda *inputs: op(*inputs), fullgraph=True, backend="aot_eager")(*args)
    for ours, again, theirs in zip(op(*args), compiled, qk_norm_rope_at_reference(*args), strict=False):
        assert same_bits(ours, again)
        torch.testing.assert_close(ours, theirs)
        assert ours.untyped_storage().data_ptr() != args.qkv.untyped_storage().data_ptr()

    cached, slots = torch.ops.tritium.qk_norm_rope_cache, torch.tensor([4, -1, 9], device=DEVICE)
    torch.library.opcheck(cached, (*args, *caches(2, 64, torch.bfloat16).zero_(), slots))
    pools = caches(2, 64, torch.bfloat16), caches(2, 64, torch.bfloat16)
    q = cached(*args, *pools[0], slots)
    step = torch.compile(lambda *inputs: cached(*inputs), fullgraph=True, backend="aot_eager")
    assert same_bits(q, step(*args, *pools[1], slots))
    assert same_bits(q, op(*args)[0])
    assert q.untyped_storage().data_ptr() != args.qkv.untyped_storage().data_ptr()
    assert same_bits(*pools)
    assert same_bits(pools[0].flatten(2, 3)[0, :, [4, 9]].transpose(0, 1), op(*args)[1][[0, 2]])
