"""experts_implementation="tritium": Qwen3-MoE against its eager self, values and gradients, and what is handed on."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.integrations import moe
from tritium.kernels import launch
from tritium.runtime.dropin import experts

import tritium

from ..oracle import CASES, Case, build, tokens

MIXTURES = [case for case in CASES if case.family == "qwen3_moe"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def registered() -> None:
    tritium.register_transformers()


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The experts that transformers' own computed."""
    found: list[Any] = []
    for name in ("grouped_mm", "batched_mm"):

        def note(module: Any, *args: Tensor, original: Any = moe.ALL_EXPERTS_FUNCTIONS[name]) -> Tensor:
            found.append(module)
            output: Tensor = original(module, *args)
            return output

        monkeypatch.setitem(moe.ExpertsInterface._global_mapping, name, note)
    return found


def everything(model: hf.PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Loss, logits and the gradient of each parameter."""
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    ("case", "form"), [*((case, "definitions") for case in MIXTURES), (MIXTURES[0], "kernels")], ids=str
)
def test_values_and_gradients(case: Case, form: str, handed_on: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "definitions":
        monkeypatch.setattr(launch, "obstacle", lambda *args: "not here")
    model, ids = build(case), tokens(2, 4)
    model.set_experts_implementation("eager")
    expected = everything(model, ids)
    model.set_experts_implementation("tritium")
    for mine, eager in zip(everything(model, ids), expected, strict=True):
        torch.testing.assert_close(mine, eager, **CLOSE)
    assert not handed_on


def test_one_token_and_none() -> None:
    model = build(MIXTURES[0])
    layer = model.model.layers[0].mlp.experts
    for count in (1, 0):
        x, index = torch.randn(count, 48), torch.tensor([[5, 0, 2]])[:count]
        weights = torch.tensor([[0.5, 0.3, 0.2]])[:count]
        model.set_experts_implementation("eager")
        expected = layer(x, index, weights)
        model.set_experts_implementation("tritium")
        torch.testing.assert_close(layer(x, index, weights), expected, **CLOSE)


class Odd:
    """Ways in which experts are not ours to compute."""

    activation = ("act_fn", torch.nn.GELU())
    spread = ("_is_expert_parallel", True)
    biased = ("has_bias", True)
    transposed = ("is_transposed", True)
    interleaved = ("is_concatenated", False)
    normed = ("has_post_expert_norm", True)
    plain = ("has_gate", False)


@pytest.mark.parametrize("what", [name for name in vars(Odd) if not name.startswith("_")])
def test_other_kinds_have_no_kernels(what: str) -> None:
    layer = build(MIXTURES[0]).model.layers[0].mlp.experts
    assert experts.has_kernels(layer)
    name, value = getattr(Odd, what)
    setattr(layer, name, value)
    assert not experts.has_kernels(layer)


def test_a_gate_of_ones_own_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(MIXTURES[0]).model.layers[0].mlp.experts
    monkeypatch.setattr(type(layer), "_apply_gate", lambda self, x: x)
    assert not experts.has_kernels(layer)


def test_what_is_handed_on_is_computed(handed_on: list[Any]) -> None:
    """Another activation, and float64, by transformers' own; an index beyond the last expert adds nothing."""
    for model in (build(MIXTURES[0], hidden_act="gelu"), build(MIXTURES[0]).double()):
        ids = tokens(2, 4)
        model.set_experts_implementation("eager")
        expected = model(ids).logits
        model.set_experts_implementation("tritium")
        handed_on.clear()
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        assert len(handed_on) == 3
    layer = build(MIXTURES[0]).model.layers[0].mlp.experts
    layer.config._experts_implementation, layer._is_expert_parallel = "tritium", True
    x, weights = torch.randn(1, 48), torch.tensor([[0.5, 0.3, 0.0]])
    given = layer(x, torch.tensor([[5, 0, 6]]), weights)
    layer._is_expert_parallel = False
    torch.testing.assert_close(given, layer(x, torch.tensor([[5, 0, 0]]), weights), **CLOSE)
