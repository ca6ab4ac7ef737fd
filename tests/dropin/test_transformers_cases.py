"""What the tests of `transformers` itself ask of a model, asked of an accelerated one: suite.py runs those."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

import tritium
from tests import oracle
from tests.dropin.accelerated import SMALL, build, launch

X = oracle.tokens(2, 7)
LIMITS = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations run their definitions: what is tested is where they are put."""
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")


def pair(case: oracle.Case) -> tuple[Any, Any]:
    """A model as it is, and its accelerated copy."""
    untouched = build(case)
    ours = deepcopy(untouched)
    tritium.accelerate(ours)
    return untouched, ours


def assert_same(found: CausalLMOutputWithPast, expected: CausalLMOutputWithPast) -> None:
    torch.testing.assert_close(found.logits, expected.logits, **LIMITS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_embeddings_instead_of_tokens(case: oracle.Case) -> None:
    """In a forward and in `generate`."""
    untouched, ours = pair(case)
    inputs = untouched.get_input_embeddings()(X).detach()
    with torch.no_grad():
        assert_same(ours(inputs_embeds=inputs), untouched(X))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = untouched.generate(X, **options)[:, X.shape[1] :]
    assert ours.generate(inputs_embeds=inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_generation_goes_on_from_its_cache(case: oracle.Case) -> None:
    untouched, ours = pair(case)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = untouched.generate(X, max_new_tokens=5, **options)
    first = ours.generate(X, max_new_tokens=2, return_dict_in_generate=True, **options)
    mask = torch.ones_like(first.sequences)
    found = ours.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3, **options
    )
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_attention_is_set_to_another_and_back(case: oracle.Case) -> None:
    """By transformers' own means; `undo` afterwards leaves what was set."""
    untouched, ours = pair(case)
    report = tritium.accelerate(ours)
    assert report.already
    with torch.no_grad():
        expected = untouched(X)
        for name in ("sdpa", "eager", "tritium", "sdpa"):
            ours.set_attn_implementation(name)
            assert ours.config._attn_implementation == name
            assert_same(ours(X), expected)
        with pytest.raises(ValueError, match="nonsense"):
            ours.set_attn_implementation("nonsense")
        report.undo()
        assert ours.config._attn_implementation == "sdpa"
        assert_same(ours(X), expected)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_embeddings_are_resized(case: oracle.Case) -> None:
    """After the model was accelerated: the head, the loss and the tied weight follow."""
    untouched, ours = pair(case)
    size = untouched.get_input_embeddings().weight.shape[0] + 5
    for model in (untouched, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(size)
    labels = X.clone()
    labels[0, -1] = size - 1
    found, expected = ours(X, labels=labels), untouched(X, labels=labels)
    assert found.logits.shape[-1] == size
    assert_same(found, expected)
    torch.testing.assert_close(found.loss, expected.loss, **LIMITS)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hidden_states_keep_their_gradients(case: oracle.Case) -> None:
    """Of each layer's states, those between layers included, which a fused sum and norm must not bypass."""
    gradients = []
    for model in pair(case):
        out = model(X, labels=X, output_hidden_states=True)
        for state in out.hidden_states:
            state.retain_grad()
        out.loss.backward()
        gradients.append([state.grad for state in out.hidden_states])
    for expected, found in zip(*gradients, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected, **LIMITS)


def test_attention_weights_by_the_config_are_refused() -> None:
    """As transformers refuses them for every attention but its eager one; by the call they are given."""
    untouched, ours = pair(SMALL[0])
    with pytest.raises(ValueError, match="output_attentions"):
        ours.config.output_attentions = True
    untouched.set_attn_implementation("eager")
    with torch.no_grad():
        expected = untouched(X, output_attentions=True).attentions
        tritium.accelerate(untouched)
        found = untouched(X, output_attentions=True).attentions
    for weights, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(weights, theirs, **LIMITS)
