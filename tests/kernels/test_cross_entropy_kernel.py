"""The cross-entropy kernel and its gradient's: the rule, the options, ignored and impossible labels, order, views."""

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.cross_entropy import (
    BLOCK_T,
    IGNORE_INDEX,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_backward_reference,
    cross_entropy_reference,
    cross_entropy_rows,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits

module = import_module("tritium.kernels.cross_entropy")  # the package has the function of this name

pytestmark = pytest.mark.usefixtures("poisoned")
NAN, INF = float("nan"), float("inf")
VOCABULARIES = [1, 2, 257, 1024, 1025, 4097, 9001]  # both rows of the table, one block and more, full and not
PUBLISHED = [50257, 128256, 151936]
OPTIONS = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3)]  # (label_smoothing, z_loss)
ONE = torch.ones((), device=DEVICE)


def labels_for(rows: int, vocabulary: int, ignored: bool = True) -> Tensor:
    """Random labels, the first and the last word among them, and a row in the middle that is ignored."""
    generator = torch.Generator().manual_seed(rows + vocabulary)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    labels[0], labels[-1] = 0, vocabulary - 1
    if ignored and rows > 2:
        labels[1] = IGNORE_INDEX
    return labels.to(DEVICE)


def rows_reference(logits: Tensor, labels: Tensor, *options: Any) -> Tensor:
    """The definition of each row by itself."""
    return torch.stack(
        [cross_entropy_reference(logits[i : i + 1], labels[i : i + 1], *options) for i in range(len(labels))]
    )


def gradient_of(logits: Tensor, labels: Tensor, gradient: Tensor, *options: Any) -> Tensor:
    """Autograd's gradient of the definition in float64, of (rounded) logits."""
    leaf = logits.double().requires_grad_()
    (found,) = torch.autograd.grad(cross_entropy_reference(leaf, labels, *options), leaf, gradient.double())
    return found


def check(
    rows: int, vocabulary: int, dtype: torch.dtype, smoothing: float = 0.0, z_loss: float = 0.0, scale: float = 3.0
) -> None:
    logits, labels = draw(rows, vocabulary, dtype=dtype, scale=scale), labels_for(rows, vocabulary)
    options = (IGNORE_INDEX, smoothing, z_loss)
    losses, logsumexp = cross_entropy_rows(logits, labels, *options)
    expected, truth = (rows_reference(x, labels, *options) for x in (logits, logits.double()))
    assert_rule(losses, expected, truth, f"losses {rows}x{vocabulary}")
    counted = labels != IGNORE_INDEX
    at_dtype, exact = (x.logsumexp(-1).masked_fill(~counted, 0) for x in (logits.float(), logits.double()))
    assert_rule(logsumexp, at_dtype, exact, f"logsumexp {rows}x{vocabulary}")
    gradient = torch.tensor(0.7, device=DEVICE)
    for reduction in ("mean", "sum"):
        total = truth.sum().item() / (counted.sum().item() if reduction == "mean" else 1)
        assert cross_entropy(logits, labels, *options, reduction).item() == pytest.approx(total, rel=2e-6, abs=1e-6)
        got = cross_entropy_backward(logits, labels, gradient, *options, reduction)
        definition = cross_entropy_backward_reference(logits, labels, gradient, *options, reduction)
        exact = gradient_of(logits, labels, gradient, *options, reduction)
        assert_rule(got, definition, exact, f"gradient {rows}x{vocabulary} {reduction}")
        assert got[~counted].eq(0).all()
    assert same_bits(cross_entropy(logits, labels, *options, "none"), losses)
    gradients = draw(rows, dtype=torch.float32, seed=3)
    got = cross_entropy_backward(logits, labels, gradients, *options, "none")
    definition = cross_entropy_backward_reference(logits, labels, gradients, *options, "none")
    exact = gradient_of(logits, labels, gradients, *options, "none")
    assert_rule(got, definition, exact, f"gradient {rows}x{vocabulary} none")
    assert got[~counted].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_rule(vocabulary: int, dtype: torch.dtype) -> None:
    check(5, vocabulary, dtype)
    check(1, vocabulary, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS[1:])
@pytest.mark.parametrize("vocabulary", [1, 300, 4100])
def test_rule_of_smoothing_and_z_loss(vocabulary: int, smoothing: float, z_loss: float, dtype: torch.dtype) -> None:
    check(3, vocabulary, dtype, smoothing, z_loss)


@pytest.mark.parametrize("vocabulary", PUBLISHED)
def test_rule_of_published_vocabularies(vocabulary: int) -> None:
    check(2, vocabulary, torch.bfloat16, 0.1, 1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", PUBLISHED)
@pytest.mark.parametrize(("smoothing", "z_loss"), OPTIONS)
def test_rule_in_full(vocabulary: int, smoothing: float, z_loss: float, dtype: torch.dtype) -> None:
    check(300, vocabulary, dtype, smoothing, z_loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 100.0])
def test_rule_of_flat_and_of_peaked_rows(scale: float, dtype: torch.dtype) -> None:
    check(3, 1500, dtype, 0.1, 1e-4, scale)


@pytest.mark.parametrize("shift", [1e4, -1e4, 1e30])
def test_a_constant_costs_no_digits(shift: float) -> None:
    """The maximum is taken out before the label's logit: a logsumexp of 10001.4 has no digits for the loss."""
    logits, label = torch.tensor([[0.0, 1.0, 2.0]], device=DEVICE), torch.tensor([1], device=DEVICE)
    if abs(shift) < 1e30:
        expected = 1.4076059644443804
        assert cross_entropy(logits + shift, label).item() == pytest.approx(expected, rel=1e-6)
        assert cross_entropy(logits + shift, label, label_smoothing=0.5).item() == pytest.approx(expected, rel=1e-6)
        gradients = [cross_entropy_backward(logits + step, label, ONE) for step in (0.0, shift)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)
    else:  # differences beyond float32
        assert cross_entropy(logits * shift, label).item() == pytest.approx(1e30)
        assert cross_entropy_backward(logits * shift, label, ONE).tolist() == [[0.0, -1.0, 1.0]]


def test_infinite_logits() -> None:
    """-inf is a word without probability, anywhere in the row; where it is the label's, the loss is infinite."""
    logits = draw(2, 2100, dtype=torch.float32)
    logits[0, :2048] = -INF  # whole blocks, the first among them
    logits[1, 1030:] = -INF
    labels = torch.tensor([2099, 5], device=DEVICE)
    loss = rows_reference(logits.double(), labels)
    torch.testing.assert_close(cross_entropy_rows(logits, labels)[0].double(), loss, rtol=1e-6, atol=0)
    assert_rule(
        cross_entropy_backward(logits, labels, ONE),
        cross_entropy_backward_reference(logits, labels, ONE),
        gradient_of(logits, labels, ONE),
    )
    assert cross_entropy(logits, labels.flip(0)).item() == INF
    for smoothing in (0.0, 0.1):
        assert cross_entropy_rows(logits, labels.flip(0), label_smoothing=smoothing)[0].tolist() == [INF, INF]
    assert cross_entropy_rows(torch.full_like(logits, -INF), labels)[0].isnan().all()
    logits[0, 2050] = NAN
    assert cross_entropy_rows(logits, labels)[0].isnan().tolist() == [True, False]
    assert cross_entropy_backward(logits, labels, ONE).isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("ignore_index", [IGNORE_INDEX, -1, 0, 7, 10**12])
def test_ignored_rows(ignore_index: int) -> None:
    """They neither count nor divide, whatever they hold; the gradient of theirs is exactly 0. Any number may say so."""
    logits = draw(7, 40, dtype=torch.float32)
    labels = torch.tensor([3, 5, 39, 8, 1, 2, 4], device=DEVICE)
    kept = [0, 2, 3, 6]
    labels[[1, 4, 5]] = ignore_index
    logits[1], logits[4] = NAN, INF
    loss = cross_entropy(logits, labels, ignore_index)
    assert loss.item() == pytest.approx(cross_entropy_reference(logits[kept], labels[kept]).item(), rel=1e-6)
    losses, logsumexp = cross_entropy_rows(logits, labels, ignore_index)
    gradient = cross_entropy_backward(logits, labels, ONE, ignore_index)
    for found in (losses, logsumexp, gradient):
        assert found[[1, 4, 5]].eq(0).all()
        assert not found[[1, 4, 5]].signbit().any()
    assert same_bits(gradient[kept], cross_entropy_backward(logits[kept], labels[kept], ONE))


def test_nothing_to_predict() -> None:
    """No rows, or none that counts: 0, and gradients of 0, not 0 / 0."""
    labels = torch.full((3,), IGNORE_INDEX, device=DEVICE)
    logits = torch.full((3, 50), NAN, dtype=torch.float16, device=DEVICE)
    for reduction in ("mean", "sum"):
        options = (IGNORE_INDEX, 0.1, 1e-3, reduction)
        assert cross_entropy(logits, labels, *options).item() == 0.0
        assert cross_entropy(logits[:0], labels[:0], *options).item() == 0.0
        gradient = cross_entropy_backward(logits, labels, ONE, *options)
        assert gradient.dtype == torch.float16
        assert gradient.eq(0).all()
        assert cross_entropy_backward(logits[:0], labels[:0], ONE, *options).shape == (0, 50)


@pytest.mark.parametrize("label", [-1, -101, 40, 2**31, 2**33 + 3, -(2**33), 2**63 - 1, -(2**63)])
def test_impossible_labels_are_nan(label: int) -> None:
    """No memory beside the row is read, and nothing goes on as if it were right. The other rows are what they are."""
    logits, labels = draw(3, 40, dtype=torch.float32), torch.tensor([3, label, 39], device=DEVICE)
    for definition in (False, True):
        loss = cross_entropy_reference if definition else cross_entropy
        backward = cross_entropy_backward_reference if definition else cross_entropy_backward
        assert loss(logits, labels).isnan()
        gradient = backward(logits, labels, ONE, reduction="sum")
        assert gradient[1].isnan().all()
        expected = backward(logits[::2], labels[::2], ONE, reduction="sum")
        assert torch.equal(gradient[::2], expected)
    losses, _ = cross_entropy_rows(logits, labels)
    assert losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [1, BLOCK_T - 1, BLOCK_T + 1, 3 * BLOCK_T])
def test_the_mean_over_many_rows(rows: int) -> None:
    """Blocks of rows, the last of them not full, with ignored rows in each: against Python's own sum."""
    losses = draw(rows, dtype=torch.float32).abs()
    labels = torch.arange(rows, device=DEVICE) % 3 - 1  # a third is ignored
    losses[labels == -1] = 0
    total = math.fsum(losses.tolist())
    mean = module.reduced(losses, labels, -1, "mean").item()
    assert mean == pytest.approx(total / max(1, (labels != -1).sum().item()), rel=3e-7)
    assert module.reduced(losses, labels, -1, "sum").item() == pytest.approx(total, rel=3e-7)
    assert module.reduced(ONE, labels, -1, "mean").item() == pytest.approx(1 / max(1, (labels != -1).sum().item()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone_and_repeats(dtype: torch.dtype) -> None:
    """To the bit: alone, at another place, beside NaN, and again."""
    logits, labels = draw(6, 4500, dtype=dtype), labels_for(6, 4500, ignored=False)
    options = (IGNORE_INDEX, 0.1, 1e-3)

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return *cross_entropy_rows(x, y, *options), cross_entropy_backward(x, y, ONE, *options, "sum")

    whole = run(logits, labels)
    beside = torch.full_like(logits, NAN)
    beside[4] = logits[4]
    for found, expected in (
        (run(logits, labels), whole),
        (run(logits[2:3], labels[2:3]), [x[2:3] for x in whole]),
        (run(logits.flip(0), labels.flip(0)), [x.flip(0) for x in whole]),
        ([x[4] for x in run(beside, labels)], [x[4] for x in whole]),
    ):
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    assert same_bits(cross_entropy(logits, labels), cross_entropy(logits, labels))


def test_views() -> None:
    """Strided rows, a transposed vocabulary, every other label; the gradient is contiguous whatever the logits are."""
    storage, many = draw(6, 2, 80, dtype=torch.float32), labels_for(12, 40)
    for logits in (storage[:, 1, :40], storage[::2].flatten(0, 1)[:, 40:], draw(40, 6, dtype=torch.float32).t()):
        for labels in (many[: len(logits)], many[::2][: len(logits)], many[:1].expand(len(logits))):
            plain = logits.contiguous(), labels.contiguous()
            assert same_bits(cross_entropy(logits, labels), cross_entropy(*plain))
            gradient = cross_entropy_backward(logits, labels, ONE.expand(3)[1])
            assert gradient.is_contiguous()
            assert same_bits(gradient, cross_entropy_backward(*plain, ONE))


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    logits = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE).as_strided((3, 64), (apart, 1))
    logits.copy_(draw(3, 64, dtype=torch.float16))
    labels = labels_for(3, 64, ignored=False)
    assert same_bits(cross_entropy_rows(logits, labels)[0], cross_entropy_rows(logits.contiguous(), labels)[0])
    gradients = [cross_entropy_backward(x, labels, ONE) for x in (logits, logits.contiguous())]
    assert same_bits(*gradients)


def test_overwrites_nothing_and_writes_nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = room_around_outputs(monkeypatch)
    for vocabulary in (57, 1024, 4097):
        logits, labels, gradient = draw(3, vocabulary, dtype=torch.float32), labels_for(3, vocabulary), ONE.clone()
        before = logits.clone(), labels.clone()
        assert cross_entropy_backward(logits, labels, gradient).ne(7).all()
        cross_entropy(logits, labels)
        assert same_bits(logits, before[0])
        assert torch.equal(labels, before[1])
        assert gradient.item() == 1
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


@needs_gpu
def test_no_race_and_no_wait() -> None:
    """The same bits 100 times, and no call that waits for the device."""
    logits, labels = draw(300, 50257, dtype=torch.bfloat16), labels_for(300, 50257)
    first = cross_entropy(logits, labels), cross_entropy_backward(logits, labels, ONE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [(cross_entropy(logits, labels), cross_entropy_backward(logits, labels, ONE)) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(same_bits(a, b) for found in again for a, b in zip(found, first, strict=True))


def test_refuses_what_does_not_fit() -> None:
    logits, labels = draw(2, 8, dtype=torch.float32), torch.tensor([1, 2], device=DEVICE)
    wrong: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        ((logits.double(), labels), {}, TypeError, "float64"),
        ((logits[0], labels), {}, ValueError, r"logits must be \[tokens, vocabulary\] .* got \[8\]"),
        ((logits[:, :0], labels), {}, ValueError, r"at least one word, got \[2, 0\]"),
        ((logits, labels[:1]), {}, ValueError, r"labels must be \[2\] torch.int64, .* got \[1\] torch.int64"),
        ((logits, labels.int()), {}, ValueError, r"labels must be \[2\] torch.int64, .* got \[2\] torch.int32"),
        ((logits, labels.to("meta")), {}, ValueError, "they must be on one device"),
        ((logits, labels), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be 0 to 1, got 1.5"),
        ((logits, labels), {"label_smoothing": NAN}, ValueError, "label_smoothing must be 0 to 1, got nan"),
        ((logits, labels), {"z_loss": -1e-4}, ValueError, "z_loss must be 0 or more, got -0.0001"),
        ((logits, labels), {"reduction": "all"}, ValueError, "reduction must be mean or sum or none, got all"),
        ((logits.clone().requires_grad_(), labels), {}, RuntimeError, "computes no gradients"),
    ]
    for args, options, error, message in wrong:
        with pytest.raises(error, match=message):
            cross_entropy(*args, **options)
        with pytest.raises(error, match=message):
            cross_entropy_backward(*(*args, ONE), **options)
        if options:
            with pytest.raises(error, match=message):
                cross_entropy_reference(*args, **options)
            with pytest.raises(error, match=message):
                cross_entropy_backward_reference(*(*args, ONE), **options)
    for gradient in (torch.ones(2, device=DEVICE), ONE.half()):
        with pytest.raises(ValueError, match=r"gradient must be a torch.float32 scalar, got \["):
            cross_entropy_backward(logits, labels, gradient)
    for gradient in (ONE, torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE).half()):
        with pytest.raises(ValueError, match=r"gradient must be \[2\] torch.float32, got \["):
            cross_entropy_backward(logits, labels, gradient, reduction="none")


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_registered(definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd, twice, with an expanded gradient, compiled as one graph; also where no kernel can run."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, backward = torch.ops.tritium.cross_entropy, torch.ops.tritium.cross_entropy_backward
    options = (IGNORE_INDEX, 0.1, 1e-3, "sum")
    leaf, labels = draw(4, 30, dtype=torch.float32).requires_grad_(), labels_for(4, 30)
    share = torch.tensor(0.25, device=DEVICE)
    torch.library.opcheck(op, (leaf, labels))
    torch.library.opcheck(op, (leaf, labels, *options))
    torch.library.opcheck(backward, (leaf.detach(), labels, share, *options))
    torch.library.opcheck(backward, (leaf.detach().t().contiguous().t(), labels, share))
    ours = cross_entropy_backward_reference if definition else cross_entropy_backward
    for rest in ((), options):
        loss, expected = op(leaf, labels, *rest), ours(leaf.detach(), labels, share, *rest)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, leaf, share, retain_graph=True)
            assert same_bits(gradient, expected)
        compiled = torch.compile(lambda x, y, rest=rest: op(x, y, *rest), fullgraph=True, backend="aot_eager")
        assert same_bits(torch.autograd.grad(compiled(leaf, labels), leaf, share)[0], expected)
        assert same_bits(compiled(leaf, labels), loss)
    assert share.item() == 0.25
    each = (*options[:3], "none")
    torch.library.opcheck(op, (leaf, labels, *each))
    strided = draw(8, dtype=torch.float32)[::2]
    assert same_bits(
        torch.autograd.grad(op(leaf, labels, *each), leaf, strided)[0], ours(leaf.detach(), labels, strided, *each)
    )
    op(leaf, labels, reduction="sum").expand(3).sum().backward()
    assert leaf.grad is not None
    assert same_bits(leaf.grad, ours(leaf.detach(), labels, 3 * ONE, reduction="sum"))
    bf16 = op(leaf.detach().bfloat16(), labels)
    assert (bf16.dtype, bf16.requires_grad) == (torch.float32, False)


def test_autograd_takes_the_gradients_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the definition's vector-Jacobian product, which would hold the logits in float32 several times."""
    launched: list[str] = []
    run = launch.launch

    def recorded(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(module, "launch", recorded)
    leaf = draw(2, 8, dtype=torch.float32).requires_grad_()
    torch.ops.tritium.cross_entropy(leaf, labels_for(2, 8)).backward()
    assert launched == ["_cross_entropy_kernel", "_reduce_kernel", "_reduce_kernel", "_cross_entropy_backward_kernel"]


def test_the_gradient_can_be_differentiated() -> None:
    """Through the gradient's definition, against float64."""
    x, labels, found = draw(3, 8, dtype=torch.float32), labels_for(3, 8), []
    for function, dtype in ((torch.ops.tritium.cross_entropy, torch.float32), (cross_entropy_reference, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        loss = function(leaf, labels, IGNORE_INDEX, 0.1, 1e-2)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
