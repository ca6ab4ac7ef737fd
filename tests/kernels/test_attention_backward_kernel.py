"""The kernels of attention's gradient: the rule against float64's autograd, and bits that depend on the sequence alone,
neither on its neighbours, nor on padding, nor on where tensors lie."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch, tuning
from tritium.kernels.attention import attention, attention_reference
from tritium.kernels.attention_backward import (
    attention_backward,
    attention_backward_reference,
    attention_with_lse,
    attention_with_lse_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of
from .test_attention_kernel import HEAD_DIMS, NAN, inputs, ints, starts_of

pytestmark = pytest.mark.usefixtures("poisoned")
Gradients = tuple[Tensor, Tensor, Tensor]


class Args(NamedTuple):
    """What the forward pass is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor
    scale: float
    window: int | None


def given(
    counts: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> tuple[Tensor, Args]:
    """dout and the arguments; v is a slice of a packed projection."""
    q, k, v = inputs(sum(counts), heads, kv_heads, head_dim, dtype)
    dout = draw(sum(counts), heads, head_dim, dtype=dtype, seed=7)
    return dout, Args(q, k, v, starts_of(counts), head_dim**-0.5, window)


def backward(dout: Tensor, args: Args) -> Gradients:
    """Both passes by the kernels."""
    out, lse = attention_with_lse(*args)
    return attention_backward(dout, *args[:3], out, lse, *args[3:])


def autograds(dout: Tensor, args: Args) -> tuple[Tensor, ...]:
    """Autograd's gradients of the definition in float64, of (rounded) inputs."""
    leaves = [x.double().requires_grad_() for x in args[:3]]
    out = attention_reference(*leaves, *args[3:])
    return torch.autograd.grad(out, leaves, dout.double())


def check(dout: Tensor, args: Args, what: str = "") -> None:
    out, lse = attention_with_lse(*args)
    assert same_bits(out, attention(*args)), what
    expected_lse = attention_with_lse_reference(*args)[1]
    assert_rule(lse, expected_lse, truth_of(attention_with_lse_reference, *args)[1], f"lse {what}")
    found = attention_backward(dout, *args[:3], out, lse, *args[3:])
    reference = attention_backward_reference(dout, *args[:3], *attention_with_lse_reference(*args), *args[3:])
    for name, got, expected, exact in zip(("dq", "dk", "dv"), found, reference, autograds(dout, args), strict=True):
        assert got.is_contiguous()
        assert_rule(got, expected, exact, f"{name} {what}")


def check_rows(counts: Sequence[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, **kw: Any) -> None:
    what = f"{counts} {heads}/{kv_heads} d{head_dim} {dtype} {kw}"
    check(*given(counts, heads, kv_heads, head_dim, dtype, **kw), what)


def tiles(head_dim: int, dtype: torch.dtype) -> set[int]:
    """The sizes of the tiles that the two kernels take."""
    parts = ("dq", "dkdv")
    key = {"head_dim": head_dim, "itemsize": dtype.itemsize}
    tables = [tuning.config("attention_backward", torch.device(DEVICE), part=part, **key) for part in parts]
    return {int(table[name]) for table in tables for name in ("BLOCK_M", "BLOCK_N")}


# The rule.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, *HEAD_DIMS])
def test_rule_over_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    """Ragged rows, some empty, some of one token, one beyond a tile; two key/value heads beside each other."""
    check_rows([0, 1, 20, 0, 37, 0], 4, 2, head_dim, dtype)
    check_rows([max(tiles(head_dim, dtype)) + 1], 1, 1, head_dim, dtype, window=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6, 8, 16])
def test_rule_over_gqa_ratios(ratio: int, dtype: torch.dtype) -> None:
    """dk and dv sum over the query heads of their group, and over no others."""
    check_rows([9, 3], 2 * ratio if ratio < 8 else ratio, 2 if ratio < 8 else 1, 16, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_rule_around_tiles(offset: int, dtype: torch.dtype) -> None:
    """Rows and windows one off a tile, with the smallest windows and those that hide nothing."""
    sizes = tiles(64, dtype)
    tile = max(sizes)
    for window in {None, 1, 2, tile + offset, *(size + offset for size in sizes)}:
        check_rows([tile + min(sizes) + offset], 1, 1, 64, dtype, window=window)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 127, 128, 129, 1000])
def test_rule_in_full(ratio: int, head_dim: int, window: int | None, dtype: torch.dtype) -> None:
    check_rows([1, 0, 127, 128, 129, 700, 1, 255, 257], 2 * ratio, 2, head_dim, dtype, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_extreme_magnitudes(head_dim: int, dtype: torch.dtype) -> None:
    """Scores in the hundreds: where a key is not seen, or a query is not there, powers of two of them are infinite."""
    # Of scores in the thousands float32 keeps so few places that chance decides which of two results is nearer.
    magnify = 10 if dtype == torch.float32 else 100
    for window in (None, 3):
        dout, args = given([max(tiles(head_dim, dtype)) + 9], 1, 1, head_dim, dtype, window)
        check(dout, args._replace(q=args.q * magnify), f"d{head_dim} {dtype} window {window}")
        check(dout * 1000, args._replace(v=args.v * 0.001), f"d{head_dim} {dtype} window {window} large dout")


# Bits.


@pytest.mark.parametrize(("dtype", "window"), [(torch.bfloat16, None), (torch.float16, 30), (torch.float32, None)])
def test_batch_invariance(dtype: torch.dtype, window: int | None) -> None:
    """A row's gradients: again, alone, among others, at another place, beside NaN."""
    counts = [20, 1, 0, 37, 8, 15, 2]
    dout, args = given(counts, 2, 1, 16, dtype, window)

    def run(rows: Sequence[int], spoilt: Sequence[int] = ()) -> dict[int, Gradients]:
        parts = []
        for x in (dout, *args[:3]):
            pieces = x.split(counts)
            parts.append(torch.cat([torch.full_like(pieces[r], NAN) if r in spoilt else pieces[r] for r in rows]))
        sizes = [counts[r] for r in rows]
        found = backward(parts[0], Args(*parts[1:], starts_of(sizes), args.scale, window))
        return dict(zip(rows, zip(*(x.split(sizes) for x in found), strict=True), strict=True))

    whole = run(range(7))
    for rows in (range(7), range(1), range(4), [3], [6], [5, 0, 6, 2, 3]):
        for r, found in run(rows).items():
            assert all(map(same_bits, found, whole[r])), (rows, r)
    beside = run(range(7), spoilt=[0, 4, 6])
    for r in range(7):
        if r in (0, 4, 6):
            assert all(x.isnan().all() for x in beside[r])
        else:
            assert all(map(same_bits, beside[r], whole[r])), r


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_behind_the_last_sequence(dtype: torch.dtype) -> None:
    """Tokens that are no sequence's get zeros, whatever they hold, in both passes, and change no bit of the others."""
    dout, args = given([20, 17, 5], 2, 1, 64, dtype)
    short = args._replace(starts=args.starts[:3].clone())
    out, lse = attention_with_lse(*args)
    expected = [x[:37] for x in attention_backward(dout, *args[:3], out, lse, *args[3:])]
    for tensor in (dout, *args[:3]):
        tensor[37:] = NAN
    padded, longer = attention_with_lse(*short)
    assert same_bits(padded[:37], out[:37])
    assert same_bits(longer[:, :37], lse[:, :37])
    assert padded[37:].eq(0).all()
    assert longer[:, 37:].eq(0).all()
    padded[37:], longer[:, 37:] = NAN, NAN
    found = attention_backward(dout, *short[:3], padded, longer, *short[3:])
    for got, sequence in zip(found, expected, strict=True):
        assert same_bits(got[:37], sequence)
        assert got[37:].eq(0).all()


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_race(dtype: torch.dtype) -> None:
    """200 runs, one result."""
    dout, args = given([513, 1, 128, 2000], 8, 2, 128, dtype)
    first = backward(dout, args)
    assert all(all(map(same_bits, backward(dout, args), first)) for _ in range(200))


# NaN, views, offsets.


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_sees_nothing_of_a_nan_is_spared(dtype: torch.dtype) -> None:
    """A NaN in a token's dout reaches dq of that token and dk of the keys that it sees alone; and dv of its own
    sequence's keys in the same tile, where a weight of zero multiplies it."""
    tile = max(tiles(64, dtype))
    counts = [20, tile + 20]
    dout, args = given(counts, 2, 1, 64, dtype)
    clean = backward(dout, args)
    dout[20 + 3] = NAN
    dq, dk, dv = backward(dout, args)
    rest = torch.arange(sum(counts), device=DEVICE) != 23
    assert same_bits(dq[rest], clean[0][rest])
    assert dq[23].isnan().all()
    for got, before in ((dk, clean[1]), (dv, clean[2])):
        assert same_bits(got[:20], before[:20])
        assert got[20:24].isnan().all()
        later = 24 if got is dk else 20 + tile
        assert same_bits(got[later:], before[later:])


def test_views_expanded_gradients_and_empty_input() -> None:
    """Slices of packed tensors, tokens apart, a turned last dimension, an expanded dout, nothing at all; what was given
    survives."""
    packed = draw(22, 12, 32, dtype=torch.bfloat16)
    starts = ints([0, 4, 11])
    for x in (packed[:11], packed[::2], packed[:11].transpose(1, 2).contiguous().transpose(1, 2)):
        dout, *qkv = x[:, :4], x[:, 4:8], x[:, 8:10], x[:, 10:]
        expected = backward(dout.contiguous(), Args(*(y.contiguous() for y in qkv), starts, 0.2, None))
        out, lse = attention_with_lse(*qkv, starts, 0.2)
        twice = torch.stack((out, out), -1)[..., 0], torch.stack((lse, lse), -1)[..., 0]
        for saved in ((out, lse), twice):
            before = [y.clone() for y in (x, *saved)]
            assert all(map(same_bits, attention_backward(dout, *qkv, *saved, starts, 0.2), expected))
            assert all(map(same_bits, (x, *saved), before))
    dout, args = given([4, 7], 4, 2, 32, torch.float32)
    one = torch.ones((), device=DEVICE)
    assert all(map(same_bits, backward(one.expand(11, 4, 32), args), backward(torch.ones_like(dout), args)))
    strided = torch.stack((args.starts, torch.full_like(args.starts, 9)), -1)[..., 0]
    assert all(map(same_bits, backward(dout, args._replace(starts=strided)), backward(dout, args)))
    for rows in (0, 1, 3):
        nothing = args._replace(q=args.q[:0], k=args.k[:0], v=args.v[:0], starts=ints([0] * (rows + 1)))
        assert [list(x.shape) for x in backward(dout[:0], nothing)] == [[0, 4, 32], [0, 2, 32], [0, 2, 32]]


@pytest.mark.parametrize("head_dim", [56, 64, 80])
def test_nothing_is_written_beside_the_outputs(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks, with a last tile that is not full."""
    dout, args = given([5, 9], 2, 2, head_dim, torch.float32)
    out, lse = attention_with_lse(*args)
    expected = attention_backward(dout, *args[:3], out, lse, *args[3:])
    rooms: list[Tensor] = []

    def with_room(shape: torch.Size, **options: Any) -> Tensor:
        rooms.append(torch.full((shape.numel() + 128,), 7.0, **options))
        rooms[-1][64:-64] = 0
        return rooms[-1][64:-64].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", with_room)
        found = attention_backward(dout, *args[:3], out, lse, *args[3:])
    assert all(map(same_bits, found, expected))
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


@pytest.mark.parametrize("part", ["heads", "tokens"])
def test_offsets_beyond_int32(part: str) -> None:
    """dout, q, k and v whose last token, or second head, lies more than 2^31 elements on, by strides that are even less
    where tokens are apart."""
    torch.use_deterministic_algorithms(False)  # host memory of which only the pages that are written are ever there
    dout, args = given([3], 2, 2, 16, torch.float16)
    expected = backward(dout, args)
    strides = (16, 2**31 + 2**20, 1) if part == "heads" else (2**30 + 2**20, 16, 1)
    storage = torch.empty(2**31 + 2**23, dtype=torch.float16, device=DEVICE)
    far = [storage.as_strided((3, 2, 16), strides, 4096 * index) for index in range(4)]
    for there, here in zip(far, (dout, *args[:3]), strict=True):
        there.copy_(here)
    assert all(map(same_bits, backward(far[0], Args(*far[1:], *args[3:])), expected))


def test_refuses_what_does_not_fit() -> None:
    dout, args = given([4], 2, 1, 16, torch.float32)
    q, k, v = args[:3]
    out, lse = attention_with_lse(*args)
    good = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "starts": args.starts, "scale": 1.0}
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"q": q.double()}, TypeError, "float64"),
        ({"dout": dout[:3]}, ValueError, r"dout must be \[4, 2, 16\] torch.float32, got \[3, 2, 16\]"),
        ({"dout": dout.half()}, ValueError, r"dout must be .* got \[4, 2, 16\] torch.float16"),
        ({"out": out[:, :1]}, ValueError, r"out must be \[4, 2, 16\]"),
        ({"lse": lse.T}, ValueError, r"lse must be \[2, 4\] torch.float32, got \[4, 2\]"),
        ({"k": k.half()}, ValueError, r"k must be .* torch.float32, got .* torch.float16"),
        ({"k": k[:3], "v": v[:3]}, ValueError, "do not fit"),
        ({"v": v[..., :8]}, ValueError, "do not fit"),
        ({"k": k.expand(4, 3, 16), "v": v.expand(4, 3, 16)}, ValueError, "multiple of the key/value heads"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"window": 0}, ValueError, "scale must be positive and window at least 1"),
        ({"starts": args.starts.long()}, ValueError, r"starts must be \[rows \+ 1\] int32 from 0 to at most 4, got"),
        ({"starts": ints([0])}, ValueError, r"starts must be .* got \[1\]"),
        ({"lse": lse.to("meta")}, ValueError, "they must be on one device"),
        ({"v": v.clone().requires_grad_()}, RuntimeError, "computes no gradients"),
    ]
    for change, error, message in wrong:
        with pytest.raises(error, match=message):
            attention_backward(**(good | change))
    with pytest.raises(ValueError, match="4 tokens of q"):
        attention_with_lse(q, k[:3], v[:3], args.starts, 1.0)


# Registered.


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
@pytest.mark.parametrize("window", [None, 3])
def test_registered(window: int | None, definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three operations; autograd twice and compiled as one graph; also where no kernel can run."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    ops = torch.ops.tritium
    dout, args = given([2, 4], 4, 2, 16, torch.bfloat16, window)
    leaves = [x.clone().requires_grad_() for x in args[:3]]
    out, lse = ops.attention_with_lse(*args)
    torch.library.opcheck(ops.attention_with_lse, args)
    torch.library.opcheck(ops.attention_backward, (dout, *args[:3], out, lse, *args[3:]))
    torch.library.opcheck(ops.attention, (*leaves, *args[3:]))
    function = attention_backward_reference if definition else attention_backward
    expected, before = function(dout, *args[:3], out, lse, *args[3:]), dout.clone()

    def with_lse(*inputs: Any) -> Tensor:
        found: Tensor = ops.attention_with_lse(*inputs)[0]
        return found

    for call in (ops.attention, with_lse):
        result = call(*leaves, *args[3:])
        assert same_bits(result, out)
        for _ in range(2):  # nothing that was saved is overwritten
            assert all(map(same_bits, torch.autograd.grad(result, leaves, dout, retain_graph=True), expected))
        compiled = torch.compile(lambda *inputs, call=call: call(*inputs), fullgraph=True, backend="aot_eager")
        assert all(map(same_bits, torch.autograd.grad(compiled(*leaves, *args[3:]), leaves, dout), expected))
    assert same_bits(dout, before)


def test_gradients_that_are_asked_for() -> None:
    """Of one input alone, through an expanded gradient; none through lse, which says so."""
    op = torch.ops.tritium.attention_with_lse
    _, args = given([2, 4], 4, 2, 16, torch.float32)
    ones = backward(torch.ones_like(args.q), args)
    for index in range(3):
        leaf = args[index].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(op(*args[:index], leaf, *args[index + 1 :])[0].sum(), [leaf])
        assert same_bits(gradient, ones[index])
    leaf = args.q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="lse has no gradient: detach it"):
        op(leaf, *args[1:])[1].sum().backward()
