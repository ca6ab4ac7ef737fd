"""Cross-entropy's definition against a naive one in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from tritium.kernels.cross_entropy import IGNORE_INDEX, cross_entropy_backward_reference, cross_entropy_reference


def naive(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> float:
    """The mean of -log softmax over the rows that count, in Python's own float64."""
    losses = []
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label != ignore_index:
            top = max(row)
            losses.append(math.log(math.fsum(math.exp(value - top) for value in row)) + top - row[label])
    return math.fsum(losses) / max(len(losses), 1)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("vocab", [1, 2, 257])
def test_is_the_formula_in_float64(rows: int, vocab: int) -> None:
    """The base of the logarithm, the sign and the mean."""
    torch.manual_seed(0)
    logits, labels = torch.randn(rows, vocab, dtype=torch.float64) * 3, torch.randint(vocab, (rows,))
    loss = cross_entropy_reference(logits, labels)
    assert (loss.shape, loss.dtype) == ((), torch.float64)
    assert loss.item() == pytest.approx(naive(logits, labels), rel=1e-12, abs=1e-14)


def test_ignored_rows_neither_count_nor_divide() -> None:
    """Dividing by all rows would shrink the loss of a padded batch; their logits must not matter, even when NaN."""
    torch.manual_seed(1)
    logits, labels = torch.randn(6, 11, dtype=torch.float64), torch.tensor([3, -100, 0, -100, 10, -100])
    logits[1] = math.nan
    expected = naive(logits[::2], labels[::2])
    assert cross_entropy_reference(logits, labels).item() == pytest.approx(expected, rel=1e-13)
    other = torch.where(labels == IGNORE_INDEX, 7, labels)
    assert cross_entropy_reference(logits, other, ignore_index=7).item() == pytest.approx(expected, rel=1e-13)


def test_nothing_to_predict_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    """0 / 0 would poison a whole training run."""
    logits = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy_reference(logits, torch.full((3,), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 5))
    assert cross_entropy_reference(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_widened_first(dtype: torch.dtype) -> None:
    """The loss is float32 and exact to it: rounding inside would cost three digits."""
    torch.manual_seed(2)
    logits, labels = (torch.randn(5, 300) * 4).to(dtype), torch.randint(300, (5,))
    loss = cross_entropy_reference(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive(logits, labels), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_large_logits_do_not_overflow(shift: float) -> None:
    """exp(10000) is infinite: the maximum must be taken out first. Adding a constant changes nothing."""
    logits = torch.tensor([[0.0, 1.0, 2.0]]) + shift
    assert cross_entropy_reference(logits, torch.tensor([1])).item() == pytest.approx(1.4076059644443804, rel=1e-6)


def test_extreme_magnitudes_in_float32() -> None:
    """Tiny logits are uniform; huge ones are the plain difference."""
    assert cross_entropy_reference(torch.full((2, 8), 1e-20), torch.tensor([0, 7])).item() == pytest.approx(math.log(8))
    assert cross_entropy_reference(torch.tensor([[1e15, 0.0]]), torch.tensor([1])).item() == pytest.approx(1e15)
    assert cross_entropy_reference(torch.tensor([[1e15, 0.0]]), torch.tensor([0])).item() == 0.0


def test_minus_infinity_is_a_probability_of_zero() -> None:
    """Masked vocabulary entries drop out of the sum."""
    logits = torch.tensor([[0.5, -math.inf, 0.5]], dtype=torch.float64)
    assert cross_entropy_reference(logits, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-15)


def test_non_contiguous_logits() -> None:
    """A transposed view gives what its copy gives."""
    torch.manual_seed(3)
    logits, labels = torch.randn(9, 4, dtype=torch.float64).t(), torch.tensor([0, 8, 3, -100])
    assert cross_entropy_reference(logits, labels).item() == pytest.approx(naive(logits, labels), rel=1e-13)


def test_gradients() -> None:
    """Against finite differences and (softmax - one-hot) / rows, and the same when taken twice."""
    torch.manual_seed(4)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 5, 0])
    assert torch.autograd.gradcheck(lambda x: cross_entropy_reference(x, labels), (logits,))
    loss = cross_entropy_reference(logits, labels)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    expected = logits.detach().softmax(-1)
    for row in (0, 2, 3):
        expected[row, labels[row]] -= 1
    expected[1] = 0
    torch.testing.assert_close(first, expected / 3, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_and_reduction_are_pytorchs(smoothing: float, reduction: str) -> None:
    """Which smooths towards the uniform distribution, the label included."""
    torch.manual_seed(5)
    logits, labels = torch.randn(6, 11, dtype=torch.float64) * 3, torch.tensor([3, -100, 0, 10, 10, -100])
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction=reduction)
    loss = cross_entropy_reference(logits, labels, label_smoothing=smoothing, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)


def test_z_loss_is_the_square_of_logsumexp() -> None:
    """Added to each row that counts, whatever the smoothing; by hand: two words of logit 1 have ln(2) + 1."""
    logits, labels = torch.ones(3, 2, dtype=torch.float64), torch.tensor([0, 1, IGNORE_INDEX])
    extra = 0.5 * (math.log(2) + 1) ** 2
    for smoothing in (0.0, 0.3):
        loss = cross_entropy_reference(logits, labels, label_smoothing=smoothing, z_loss=0.5)
        assert loss.item() == pytest.approx(math.log(2) + extra, rel=1e-14)
    loss = cross_entropy_reference(logits, labels, z_loss=0.5, reduction="sum")
    assert loss.item() == pytest.approx(2 * (math.log(2) + extra), rel=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.01), (0.2, 0.01)])
@pytest.mark.parametrize("vocab", [1, 7])
def test_the_backward_is_autograds(vocab: int, smoothing: float, z_loss: float, reduction: str) -> None:
    """In float64; exactly 0 in ignored rows, those that hold no numbers too; and it is itself differentiable."""
    torch.manual_seed(6)
    logits = torch.randn(5, vocab, dtype=torch.float64) * 3
    labels = torch.tensor([0, -100, vocab - 1, -100, vocab // 2])
    logits[3] = math.nan
    options = (IGNORE_INDEX, smoothing, z_loss, reduction)
    leaf, share = logits.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    share = torch.arange(1, 6, dtype=torch.float64) if reduction == "none" else share
    (expected,) = torch.autograd.grad(cross_entropy_reference(leaf, labels, *options), leaf, share)
    found = cross_entropy_backward_reference(logits, labels, share, *options)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    assert torch.equal(found[1::2], torch.zeros(2, vocab, dtype=torch.float64))
    half = cross_entropy_backward_reference(logits.half(), labels, share.float(), *options)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), expected, rtol=0.02, atol=1e-3)
