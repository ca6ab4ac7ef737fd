"""An accelerated model against the untouched one: logits, loss, gradients, and every bit back by `undo`."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tritium
from tests import oracle
from tests.dropin.accelerated import GRID, SMALL, assert_near, build, launch, name, results
from tests.rule import assert_rule, needs_gpu

X = oracle.tokens(2, 9)
LEFT = torch.ones(2, 9, dtype=torch.int64)
LEFT[0, :4] = 0
POSITIONS = (LEFT.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
LABELS = X.clone()
LABELS[0, :5] = -100  # what padding predicts is nobody's concern


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations run their definitions: what is tested is where they are put."""
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize(("case", "changes"), GRID, ids=name)
def test_logits_loss_and_gradients(case: oracle.Case, changes: dict[str, Any]) -> None:
    model = build(case, **changes)
    parameters, state = dict(model.named_parameters()), {key: x.clone() for key, x in model.state_dict().items()}
    expected = results(model, X, attention_mask=LEFT, position_ids=POSITIONS, labels=LABELS)
    with torch.no_grad():
        before = model(X).logits
    report = tritium.accelerate(model)
    found = results(model, X, attention_mask=LEFT, position_ids=POSITIONS, labels=LABELS)
    assert_near((real(found[0]), *found[1:]), (real(expected[0]), *expected[1:]))
    report.undo()
    with torch.no_grad():
        assert torch.equal(model(X).logits, before)
    assert all(parameter is parameters[key] for key, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def real(logits: Tensor | None) -> Tensor:
    """Those of tokens, not of padding."""
    assert logits is not None
    return logits[LEFT.bool()]


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_logits(case: oracle.Case) -> None:
    """Head and loss in one where there are labels, and logits as ever where there are none."""
    model = build(case)
    labels = X.clone()
    labels[:, :3] = -100
    expected = model(X, labels=labels, num_items_in_batch=torch.tensor(7))
    whole, logits = results(model, X), model(X).logits
    shifted = model(X, labels=X, shift_labels=X).loss
    report = tritium.accelerate(model, logits=False)
    assert report.patched[""] == "head and loss in one operation"
    found = model(X, labels=labels, num_items_in_batch=torch.tensor(7), output_hidden_states=True)
    assert found.logits is None
    assert len(found.hidden_states) == 3
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(X, labels=X, shift_labels=X).loss, shifted, atol=1e-5, rtol=1e-5)
    assert_near(results(model, X), whole)
    torch.testing.assert_close(model(X).logits, logits, atol=1e-5, rtol=1e-5)
    assert isinstance(model(X, labels=X, return_dict=False), tuple)
    report.undo()
    assert torch.equal(model(X).logits, logits)
    assert torch.equal(model(X, labels=X).logits, logits)
    tritium.accelerate(model)  # the loss alone
    found = model(X, labels=labels, num_items_in_batch=7)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("definitions")
def test_the_routers_loss_needs_the_logits() -> None:
    """Head and loss are not one where more than a loss is asked for."""
    model = build(SMALL[2], router_aux_loss_coef=0.5)
    expected = model(X, labels=X, output_router_logits=True)
    tritium.accelerate(model, logits=False)
    found = model(X, labels=X, output_router_logits=True)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert model(X, labels=X, logits_to_keep=9).logits.shape == (2, 9, oracle.VOCAB)
    assert model(X, labels=X).logits is None


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_by_the_kernels(case: oracle.Case) -> None:
    """Interpreted, or on the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(case, num_hidden_layers=2).to(device)
    x = oracle.tokens(1, 8).to(device)
    expected = results(model, x)
    tritium.accelerate(model)
    assert_near(results(model, x), expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("case", "changes"), GRID, ids=name)
def test_the_rule_in_full(case: oracle.Case, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(case, **changes).to(dtype)
    x = oracle.tokens(3, 70)
    with torch.no_grad():
        truth = oracle.copied(model, torch.float64)(x).logits
        model, x = model.cuda(), x.cuda()
        expected = model(x).logits
        tritium.accelerate(model)
        assert_rule(model(x).logits.cpu(), expected.cpu(), truth)
