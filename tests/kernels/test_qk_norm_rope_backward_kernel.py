"""The kernels of the gradient of QK-norm and rotation: the rule, sums over tokens, what they leave alone and refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_at_reference
from tritium.kernels.qk_norm_rope_backward import qk_norm_rope_backward, qk_norm_rope_backward_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits
from .test_qk_norm_rope_kernel import GQA, HEAD_DIMS, MODES, ROTATING, Args, inputs

pytestmark = pytest.mark.usefixtures("poisoned")
OP = torch.ops.tritium.qk_norm_rope


def upstream(args: Args) -> tuple[Tensor, Tensor]:
    """dq and dk."""
    tokens, head_dim = args.qkv.shape[0], args.qkv.shape[1] // (args.num_heads + 2 * args.num_kv_heads)
    heads = ((args.num_heads, 2), (args.num_kv_heads, 3))
    dq, dk = (draw(tokens, count, head_dim, dtype=args.qkv.dtype, seed=seed) for count, seed in heads)
    return dq, dk


def leaves(args: Args, dtype: torch.dtype) -> tuple[Args, list[Tensor]]:
    """The arguments with qkv and the weight as leaves of a graph; and these."""
    qkv = args.qkv.detach().to(dtype).requires_grad_()
    weight = None if args.weight is None else args.weight.detach().to(dtype).requires_grad_()
    return args._replace(qkv=qkv, weight=weight), [qkv] if weight is None else [qkv, weight]


def autograds(dq: Tensor, dk: Tensor, args: Args) -> list[Tensor]:
    """Autograd's gradients of the definition in float64, of (rounded) inputs: of qkv, and of the weight."""
    given, wanted = leaves(args._replace(rope_dtype=torch.float64), torch.float64)
    table = None if args.table is None else args.table.double()
    q, k, _ = qk_norm_rope_at_reference(*given._replace(table=table))
    return list(torch.autograd.grad((q, k), wanted, (dq.double(), dk.double())))


def check(args: Args) -> tuple[Tensor, Tensor]:
    """Holds the gradients of q's heads, of k's and of their weights to the rule; v's must be zero."""
    dq, dk = upstream(args)
    got = qk_norm_rope_backward(dq, dk, *args)
    expected, truth = qk_norm_rope_backward_reference(dq, dk, *args), autograds(dq, dk, args)
    count, heads = args.num_heads + 2 * args.num_kv_heads, args.num_heads
    assert got[0].is_contiguous()
    assert got[1].is_contiguous()
    assert got[1].numel() == (0 if args.weight is None else args.weight.numel())
    for index, exact in enumerate(truth):
        ours, theirs, true = (x.view(-1, args.heads().shape[2]) for x in (got[index], expected[index], exact))
        rows = torch.arange(ours.shape[0], device=DEVICE) % (count if index == 0 else heads + args.num_kv_heads)
        for name, part in (("q", rows < heads), ("k", (rows >= heads) & (rows < heads + args.num_kv_heads))):
            what = f"{index} {name} {list(exact.shape)} {args[5:7]} {args.norm_first}"
            assert_rule(ours[part], theirs[part], true[part], what)
        assert ours[rows >= heads + args.num_kv_heads].eq(0).all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rule(head_dim: int, dtype: torch.dtype) -> None:
    for mode in MODES:
        check(inputs(2, 2, 1, head_dim, dtype, mode))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), GQA)
def test_head_counts(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """The packed heads are cut at the right places, across the blocks of heads, for every GQA ratio."""
    check(inputs(2, heads, kv_heads, 96, dtype, ("unweighted", True, "model")))
    check(inputs(2, heads, kv_heads, 64, dtype, ("weighted", False, "float32")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ROTATING[::2])
def test_query_scale_rule(mode: tuple[str, bool, str], dtype: torch.dtype) -> None:
    """Nine heads of q are no multiple of a program's heads; k has no factor."""
    check(inputs(3, 9, 3, 64, dtype, mode).scaled())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [15, 16, 17, 37])
def test_sums_over_many_tokens(tokens: int, dtype: torch.dtype) -> None:
    """More tokens than share a partial sum, and counts one off."""
    check(inputs(tokens, 2, 1, 16, dtype, ("weighted", tokens % 2 == 1, "model")))


@pytest.mark.parametrize("mode", [MODES[5], MODES[8]])
def test_projections_apart_are_turned_as_the_packed_one(mode: tuple[str, bool, str]) -> None:
    """q and k by two calls without heads of k and v, to the bit; so is the definition, and a compiled call."""
    args = inputs(3, 5, 2, 24, torch.bfloat16, mode)
    packed = qk_norm_rope(*args)
    for index, (first, count) in enumerate(((0, 5), (5, 2))):
        weight = None if args.weight is None else args.weight[first : first + count]
        apart = args._replace(qkv=args.qkv[:, first * 24 :][:, : count * 24], num_heads=count, num_kv_heads=0)
        apart = apart._replace(weight=weight)
        found, none, _ = qk_norm_rope(*apart)
        assert same_bits(found, packed[index])
        assert none.shape == (3, 0, 24)
        assert same_bits(qk_norm_rope_at_reference(*apart)[0], qk_norm_rope_at_reference(*args)[index])


@pytest.mark.parametrize("mode", [MODES[5], MODES[8]])
@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_projections_apart_are_the_packed_one(
    mode: tuple[str, bool, str], definition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients by two calls without heads of k and v, by autograd, compiled or not."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    args = inputs(3, 5, 2, 24, torch.bfloat16, mode)
    given, upstreams = upstream(args), (OP, torch.compile(OP, fullgraph=True, backend="aot_eager"))
    dqkv, dweight = torch.ops.tritium.qk_norm_rope_backward(*given, *args, True)
    for op in upstreams:
        for index, (first, count) in enumerate(((0, 5), (5, 2))):
            weight = None if args.weight is None else args.weight[first : first + count]
            apart = args._replace(qkv=args.qkv[:, first * 24 :][:, : count * 24], num_heads=count, num_kv_heads=0)
            apart, wanted = leaves(apart._replace(weight=weight), torch.bfloat16)
            found = torch.autograd.grad(op(*apart)[0], wanted, given[index])
            assert same_bits(found[0], dqkv[:, first * 24 :][:, : count * 24])
            if weight is not None:
                assert same_bits(found[1], dweight[first : first + count])


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
    """At 1e-4 an eps of 1e-6, not the mean square of 1e-8, decides; a head of zeros, and an eps of zero, are finite."""
    check(inputs(2, 2, 1, 80, dtype, ("weighted", first, "float32"), scale))
    args = inputs(2, 2, 1, 80, dtype, ("weighted", first, "float32"), eps=0.0)
    assert check(args)[0].isfinite().all()
    args = inputs(2, 2, 1, 80, dtype, ("weighted", first, "float32"))
    args = args._replace(qkv=torch.zeros_like(args.qkv))
    dqkv, dweight = check(args)
    assert dqkv.ne(0).float().mean() == pytest.approx(0.75, abs=0.02)  # dy * weight / sqrt(eps)
    assert dweight.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_the_token_alone(dtype: torch.dtype) -> None:
    """Of dqkv: alone, in another order, beside NaN, with the weight frozen; and again."""
    args = inputs(6, 4, 2, 64, dtype, ("weighted", True, "float32")).scaled()
    dq, dk = upstream(args)
    whole, dweight = qk_norm_rope_backward(dq, dk, *args)
    again = qk_norm_rope_backward(dq, dk, *args)
    assert same_bits(again[0], whole)
    assert same_bits(again[1], dweight)
    frozen = qk_norm_rope_backward(dq, dk, *args, wants_weight=False)
    assert same_bits(frozen[0], whole)
    assert frozen[1].shape == (0,)
    for tokens in (slice(1), slice(2, 5), torch.tensor([5, 3, 0, 1, 4, 2], device=DEVICE)):
        assert same_bits(qk_norm_rope_backward(dq[tokens], dk[tokens], *args.take(tokens))[0], whole[tokens])
    beside, alone, dalone = (torch.full_like(x, float("nan")) for x in (args.qkv, dq, dk))
    beside[3], alone[3], dalone[3] = args.qkv[3], dq[3], dk[3]
    assert same_bits(qk_norm_rope_backward(alone, dalone, *args._replace(qkv=beside))[0][3], whole[3])


def test_sums_do_not_depend_on_what_adds_nothing() -> None:
    """40 tokens more, without a gradient: more programs, the same partial sums, the same tree, the same bits."""
    args = inputs(60, 2, 1, 16, torch.float32)
    dq, dk = upstream(args)
    dq[20:], dk[20:] = 0, 0
    few = qk_norm_rope_backward(dq[:20], dk[:20], *args.take(slice(20)))[1]
    assert same_bits(qk_norm_rope_backward(dq, dk, *args)[1], few)


def test_views_and_empty_input() -> None:
    """Rows cut from wider ones, columns apart, expanded gradients, no tokens; what was given survives."""
    args = inputs(3, 4, 2, 64, torch.float32).scaled()
    dq, dk = upstream(args)
    whole, dweight = qk_norm_rope_backward(dq, dk, *args)
    wider = torch.full((3, 600), float("nan"), device=DEVICE)
    wider[:, 8:520] = args.qkv
    assert args.weight is not None
    strided = torch.stack((args.weight, args.weight), 2)[:, :, 0]
    both = torch.cat((dq, dk), 1)
    for given, (gradient, other) in (
        (args._replace(qkv=wider[:, 8:520]), (both[:, :4], both[:, 4:])),
        (args._replace(qkv=args.qkv.t().contiguous().t()), (dq.transpose(0, 1).contiguous().transpose(0, 1), dk)),
        (args._replace(weight=strided), (torch.stack((dq, dq), 3)[..., 1], dk.mT.contiguous().mT)),
    ):
        before = [x.clone() for x in (given.qkv, given.weight, gradient, other)]
        found = qk_norm_rope_backward(gradient, other, *given)
        assert same_bits(found[0], whole)
        assert same_bits(found[1], dweight)
        assert all(map(same_bits, before, (given.qkv, given.weight, gradient, other)))
    one = torch.ones((), device=DEVICE)
    expanded = qk_norm_rope_backward(one.expand(3, 4, 64), one.expand(3, 2, 64), *args)
    filled = qk_norm_rope_backward(torch.ones_like(dq), torch.ones_like(dk), *args)
    assert all(map(same_bits, expanded, filled))
    none = qk_norm_rope_backward(dq[:0], dk[:0], *args.take(slice(0)))
    assert none[0].shape == (0, 512)
    assert torch.equal(none[1], torch.zeros_like(args.weight))
    narrow = args._replace(positions=None if args.positions is None else args.positions.int())
    assert same_bits(qk_norm_rope_backward(dq, dk, *narrow)[0], whole)


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks, the last columns of the last token included."""
    rooms = room_around_outputs(monkeypatch)
    for head_dim in (56, 64, 80):
        args = inputs(2, 3, 1, head_dim, torch.float32)
        for gradient in qk_norm_rope_backward(*upstream(args), *args):
            assert gradient.ne(7).all()
    assert len(rooms) == 6
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_offsets_beyond_int32() -> None:
    """The third token of qkv, dq and dk is more than 2^31 elements from the first, by a stride that is less."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 2**20, dtype=torch.float16, device=DEVICE)
    args = inputs(3, 3, 3, 64, torch.float16)
    dq, dk = upstream(args)
    expected = qk_norm_rope_backward(dq, dk, *args)
    qkv = storage.as_strided((3, 9 * 64), (apart, 1))
    far = [storage.as_strided((3, 3, 64), (apart, 64, 1), offset) for offset in (1024, 2048)]
    for there, here in ((qkv, args.qkv), (far[0], dq), (far[1], dk)):
        there.copy_(here)
    assert all(map(same_bits, qk_norm_rope_backward(*far, *args._replace(qkv=qkv)), expected))


@needs_gpu
def test_no_race() -> None:
    args = inputs(300, 16, 8, 128, torch.bfloat16)
    dq, dk = upstream(args)
    first = qk_norm_rope_backward(dq, dk, *args)
    assert all(all(map(same_bits, qk_norm_rope_backward(dq, dk, *args), first)) for _ in range(200))


def test_refuses_what_does_not_fit() -> None:
    args = inputs(2, 4, 2, 64, torch.float32)
    dq, dk = upstream(args)
    wrong: list[tuple[tuple[Tensor, Tensor], dict[str, Any], type[Exception], str]] = [
        ((dq[:1], dk), {}, ValueError, r"dq must be \[2, 4, 64\] torch.float32, got \[1, 4, 64\]"),
        ((dq.half(), dk), {}, ValueError, r"dq must be .* got \[2, 4, 64\] torch.float16"),
        ((dq, dq), {}, ValueError, r"dk must be \[2, 2, 64\] torch.float32, got \[2, 4, 64\]"),
        ((dq, dk.to("meta")), {}, ValueError, "they must be on one device"),
        ((dq, dk.clone().requires_grad_()), {}, RuntimeError, "computes no gradients"),
        ((dq, dk), {"qkv": args.qkv.double()}, TypeError, "float64"),
        ((dq, dk), {"positions": None}, ValueError, "come together"),
        ((dq, dk), {"weight": args.heads()[0, :4]}, ValueError, r"weight must be \[6, 64\] torch.float32 like qkv"),
    ]
    for given, change, error, message in wrong:
        with pytest.raises(error, match=message):
            qk_norm_rope_backward(*given, *args._replace(**change))


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
@pytest.mark.parametrize(("mode", "scaled"), [(MODES[0], False), (MODES[5], True), (MODES[8], False)])
def test_registered(
    mode: tuple[str, bool, str], scaled: bool, definition: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both operations; autograd twice and compiled as one graph; also where no kernel can run."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    args = inputs(3, 4, 2, 64, torch.bfloat16, mode)
    args = args.scaled() if scaled else args
    dq, dk = upstream(args)
    given, wanted = leaves(args, torch.bfloat16)
    torch.library.opcheck(OP, given)
    backward = torch.ops.tritium.qk_norm_rope_backward
    for wants_weight in (True, False):
        torch.library.opcheck(backward, (dq, dk, *args, wants_weight))
    ours = qk_norm_rope_backward_reference if definition else qk_norm_rope_backward
    expected, before = ours(dq, dk, *args), (dq.clone(), dk.clone())
    q, k = OP(*given)
    for _ in range(2):
        assert all(map(same_bits, torch.autograd.grad((q, k), wanted, (dq, dk), retain_graph=True), expected))
    assert same_bits(dq, before[0])
    assert same_bits(dk, before[1])
    compiled = torch.compile(lambda *inputs: OP(*inputs), fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, torch.autograd.grad(compiled(*given), wanted, (dq, dk)), expected))


def test_gradients_that_are_asked_for() -> None:
    """Of one output alone, of one input alone, through an expanded gradient; none of a constant."""
    args = inputs(3, 4, 2, 16, torch.float32)
    dq, dk = upstream(args)
    given, wanted = leaves(args, torch.float32)
    nothing = torch.zeros_like(dq), torch.zeros_like(dk)
    for index, pair in ((0, (dq, nothing[1])), (1, (nothing[0], dk))):
        expected = qk_norm_rope_backward(*pair, *args)
        assert all(map(same_bits, torch.autograd.grad(OP(*given)[index], wanted, (dq, dk)[index]), expected))
    ones = qk_norm_rope_backward(torch.ones_like(dq), torch.ones_like(dk), *args)
    for index, frozen in ((0, given._replace(weight=args.weight)), (1, given._replace(qkv=args.qkv))):
        q, k = OP(*frozen)
        (gradient,) = torch.autograd.grad(q.sum() + k.sum(), [wanted[index]])
        assert same_bits(gradient, ones[index])
    plain = given._replace(norm=False)  # a weight that nothing uses has no gradient
    assert torch.autograd.grad(OP(*plain)[0].sum(), wanted, allow_unused=True)[1] is None
    assert args.table is not None
    for change in ({"table": args.table.clone().requires_grad_()}, {"query_scale": torch.ones(50, device=DEVICE)}):
        value = next(iter(change.values())).requires_grad_()
        q, _ = OP(*given._replace(**change))
        with pytest.raises(RuntimeError, match=f"no gradient of {next(iter(change))}, a constant of the model"):
            torch.autograd.grad(q.sum(), value)


def test_the_gradient_can_be_differentiated() -> None:
    """Through the gradient's definition, against float64."""
    args, found = inputs(2, 2, 1, 8, torch.float32, ("weighted", False, "float32")), []
    assert args.table is not None
    for function, dtype in ((OP, torch.float32), (qk_norm_rope_at_reference, torch.float64)):
        given, wanted = leaves(args._replace(table=args.table.to(dtype), rope_dtype=dtype), dtype)
        gradients = torch.autograd.grad(function(*given)[0].pow(3).sum(), wanted, create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in gradients), wanted)
        found.append([x.double() for x in again])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())
