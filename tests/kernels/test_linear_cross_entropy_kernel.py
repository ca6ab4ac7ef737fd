"""The projected loss in chunks: the rule, chunks of any size, what is wanted, memory, what it refuses."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.cross_entropy import cross_entropy
from tritium.kernels.linear import linear
from tritium.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_reference,
    linear_cross_entropy_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits

module = import_module("tritium.kernels.linear_cross_entropy")  # the package has the function of this name

pytestmark = pytest.mark.usefixtures("poisoned")
OPTIONS: Any = (-100, 0.1, 1e-3)
SHARE = torch.tensor(0.7, device=DEVICE)


def inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    labels[1::4] = -100
    return draw(tokens, width, dtype=dtype), draw(vocabulary, width, dtype=dtype, seed=1, scale=0.3), labels


def check(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, reduction: str, invariant: bool = False
) -> None:
    args = inputs(tokens, width, vocabulary, dtype)
    options: Any = (*OPTIONS, reduction, invariant)
    share = draw(tokens, dtype=torch.float32, seed=2) if reduction == "none" else SHARE
    leaves = [x.double().requires_grad_() for x in args[:2]]
    truth = linear_cross_entropy_reference(leaves[0], leaves[1], args[2], *options)
    # The definition's logits round as ours do: what is left is the order of summation.
    expected = linear_cross_entropy_reference(*args, *options)
    torch.testing.assert_close(linear_cross_entropy(*args, *options), expected, rtol=1e-5, atol=1e-6)
    exact = torch.autograd.grad(truth, leaves, share.double())
    definition = linear_cross_entropy_backward_reference(*args, share, *options)
    found = linear_cross_entropy_backward(*args, share, *options)
    for name, got, at_dtype, right in zip(("dx", "dweight"), found, definition, exact, strict=True):
        assert_rule(got, at_dtype, right, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "chunk"), [(1, 4), (4, 4), (9, 4)])
def test_rule(tokens: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than a chunk, exactly one, several with the last not full; the mean is over all of them."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    check(tokens, 32, 1100, dtype, "mean")
    check(tokens, 32, 50, dtype, "sum")
    check(tokens, 32, 50, dtype, "none", invariant=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_invariant_loss_is_that_of_whole_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, row by row, in chunks and alone: what makes a sampler's log-probabilities a trainer's."""
    x, weight, labels = inputs(7, 32, 50, dtype)
    whole = cross_entropy(linear(x, weight), labels, reduction="none")
    monkeypatch.setattr(module, "CHUNK", 3)
    found = linear_cross_entropy(x, weight, labels, reduction="none", invariant=True)
    assert same_bits(found, whole)
    for row in (0, 6):
        part = slice(row, row + 1)
        alone = linear_cross_entropy(x[part], weight, labels[part], reduction="none", invariant=True)
        assert same_bits(alone, whole[part])
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # the vendor's is not asked, backward neither
    linear_cross_entropy_backward(x, weight, labels, torch.ones_like(whole), reduction="none", invariant=True)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_in_full(dtype: torch.dtype) -> None:
    check(2 * module.CHUNK + 7, 1024, 50257, dtype, "mean")


def test_nothing_to_predict() -> None:
    x, weight, labels = inputs(3, 16, 40, torch.float32)
    for tokens, ignored in ((0, labels[:0]), (3, torch.full_like(labels, -100))):
        assert linear_cross_entropy(x[:tokens], weight, ignored).item() == 0
        dx, dweight = linear_cross_entropy_backward(x[:tokens], weight, ignored, SHARE)
        assert (dx.shape, dweight.shape) == ((tokens, 16), (40, 16))
        assert dx.eq(0).all()
        assert dweight.eq(0).all()


def test_logits_never_stand_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is wider than a chunk; and nothing that came in is written over."""
    monkeypatch.setattr(module, "CHUNK", 2)
    seen: list[int] = []
    linear = torch.nn.functional.linear

    def recorded(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(x))
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    args = inputs(5, 16, 40, torch.float32)
    before = [x.clone() for x in args]
    linear_cross_entropy(*args)
    linear_cross_entropy_backward(*args, SHARE)
    assert seen == [2, 2, 1, 2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_refuses_what_does_not_fit() -> None:
    x, weight, labels = inputs(3, 16, 40, torch.float32)
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((x.double(), weight, labels), TypeError, "float64"),
        ((x[0], weight, labels), ValueError, r"x must be \[tokens, K\], got \[16\]"),
        ((x, weight[:, :8], labels), ValueError, r"weight must be \[vocabulary, 16\] torch.float32 .* got \[40, 8\]"),
        ((x, weight.half(), labels), ValueError, r"weight must be .* got \[40, 16\] torch.float16"),
        ((x, weight[:0], labels), ValueError, r"weight must be .* got \[0, 16\]"),
        ((x, weight, labels[:2]), ValueError, r"labels must be \[3\] torch.int64, .* got \[2\]"),
        ((x, weight, labels.int()), ValueError, r"labels must be .* got \[3\] torch.int32"),
        ((x, weight.clone().requires_grad_(), labels), RuntimeError, "computes no gradients"),
    ]
    for args, error, message in wrong:
        with pytest.raises(error, match=message):
            linear_cross_entropy(*args)
        with pytest.raises(error, match=message):
            linear_cross_entropy_backward(*(*args, SHARE))
    with pytest.raises(ValueError, match="reduction must be mean or sum or none, got all"):
        linear_cross_entropy(x, weight, labels, reduction="all")
    with pytest.raises(ValueError, match=r"gradient must be a torch.float32 scalar, got \[1\]"):
        linear_cross_entropy_backward(x, weight, labels, SHARE.reshape(1))


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_registered(definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd, twice, each input's gradient alone and both, compiled as one graph."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, backward = torch.ops.tritium.linear_cross_entropy, torch.ops.tritium.linear_cross_entropy_backward
    x, weight, labels = inputs(4, 16, 40, torch.float32)
    ours = linear_cross_entropy_backward_reference if definition else linear_cross_entropy_backward
    expected = ours(x, weight, labels, SHARE, *OPTIONS)
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, labels))
    torch.library.opcheck(backward, (x, weight, labels, SHARE, *OPTIONS, "sum", False, [True, False]))
    torch.library.opcheck(op, (x.clone().requires_grad_(), weight, labels, *OPTIONS, "none", True))
    for wanted in ((True, True), (True, False), (False, True)):
        given = [tensor.clone().requires_grad_(want) for tensor, want in zip((x, weight), wanted, strict=True)]
        leaves = [tensor for tensor in given if tensor.requires_grad]
        right = [tensor for tensor, want in zip(expected, wanted, strict=True) if want]
        compiled = torch.compile(lambda *args: op(*args, *OPTIONS), fullgraph=True, backend="aot_eager")
        for function in (lambda *args: op(*args, *OPTIONS), compiled):
            loss = function(*given, labels)
            for _ in range(2):
                found = torch.autograd.grad(loss, leaves, SHARE, retain_graph=True)
                assert all(same_bits(a, b) for a, b in zip(found, right, strict=True))
