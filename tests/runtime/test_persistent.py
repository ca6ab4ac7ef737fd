"""Steps of one launch each: the tokens of the other forms, what they do not fit, and how they are chosen."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tritium.kernels import tuning
from tritium.runtime import persistent
from tritium.runtime import steps as stepping
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.persistent import fits, persists

import tritium
from tests.rule import DEVICE

from .test_triton_path import prompt, small

PROMPTS = [prompt(5), prompt(1, 1)]
SAMPLED = SamplingOptions(3, temperature=0.9, top_k=30, top_p=0.9, seed=3)
GREEDY = SamplingOptions(3, temperature=0)
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_embeddings": True},
    "mobilellm": {"rope_layers": [True, False], "qk_norm_layers": [True, False]},
    "qwen1": {"num_layers": 1},
}


def rows(model: Decoder, options: SamplingOptions, **how: Any) -> list[list[int | None]]:
    return [list(row) for row in zip(*generate(model, PROMPTS, options, **how), strict=True)]


def chosen(patch: pytest.MonkeyPatch, form: str) -> list[Any]:
    """Makes all decoding take this form; the steps of one launch, as they are made."""
    taken: list[Any] = []
    step = persistent.decode_step

    def noted(*args: Any, **how: Any) -> Any:
        taken.append(args)
        return step(*args, **how)

    patch.setattr(stepping, "persists", lambda _, plan: persists(form, plan))
    patch.setattr(persistent, "decode_step", noted)
    return taken


@pytest.mark.parametrize("family", MODELS)
def test_the_tokens_of_the_other_forms(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fused steps and of the PyTorch path, a ragged batch, sampled or greedy under a limit."""
    model = small(family, **MODELS[family])
    options, how = (GREEDY, {"vocabulary": 90}) if family == "qwen3" else (SAMPLED, {})
    expected = rows(copy.copy(model).use_backend("torch"), options, **how)
    for form, steps in (("fused", 0), ("persistent", 2)):
        with monkeypatch.context() as patch:
            taken = chosen(patch, form)
            assert rows(copy.deepcopy(model), options, **how) == expected
        assert len(taken) == steps


def test_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small(num_layers=1).config
    model = tritium.load_model(spec, "qwen3", device=DEVICE, dtype="float16", seed=3, quantise="int8")
    model.use_backend("triton")
    found = []
    for form, steps in (("fused", 0), ("persistent", 2)):
        with monkeypatch.context() as patch:
            taken = chosen(patch, form)
            found.append(rows(copy.deepcopy(model), GREEDY))
        assert len(taken) == steps
    assert found[0] == found[1]


def test_a_row_does_not_depend_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form is the model's: logits of a row alone and beside another, to the bit."""
    model = small(num_layers=1, dtype=torch.float16)
    taken = chosen(monkeypatch, "persistent")
    both = rows(model, SAMPLED)
    alone = [list(row) for row in zip(*generate(model, PROMPTS[:1], SAMPLED), strict=True)]
    assert both[:1] == alone
    assert {len(args[1]) for args in taken} == {1, 2}


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small().bind()
    assert fits(plan) is None
    assert persists("persistent", plan)
    assert not persists("fused", plan)
    first, second = plan.layers

    def with_first(**changes: Any) -> Any:
        return dataclasses.replace(plan, layers=(dataclasses.replace(first, **changes), second))

    norm, attention = first.attention_norm, first.attention
    assert norm is not None
    wider = dataclasses.replace(first.qkv, weight=torch.cat([first.qkv.weight] * 2))
    strided = dataclasses.replace(first.out, weight=first.out.weight.t().contiguous().t())
    reasons = {
        "its positions are learned": small("gpt").bind(),
        "it has experts": small("qwen3_moe").bind(),
        "it has no layers": dataclasses.replace(plan, layers=()),
        "processes share its weights": with_first(exchange=object()),
        "its layers are not normalised by RMS norms that the stream passes by": with_first(mlp_norm=None),
        "its layers are not alike": with_first(qkv=wider),
        "its norms have several epsilons": with_first(attention_norm=dataclasses.replace(norm, eps=0.5)),
        "is not contiguous": with_first(out=strided),
        "whether they rotate or not": with_first(attention=dataclasses.replace(attention, qk_norm=False)),
        "its last norm or projection is another": dataclasses.replace(plan, norm=None),
    }
    for form in ("fused", "persistent"):  # where nobody names one, the table does
        monkeypatch.setattr(tuning, "config", lambda *_, form=form, **key: {"FORM": form})
        assert persists(None, plan) == (form == "persistent")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "config", lambda *_, **key: {})  # a GPU whose tables have no row
        assert fits(plan) == "there is no kernel of it for this GPU"
    for why, other in reasons.items():
        assert why in str(fits(other)), why
        assert not persists(None, other)
        with pytest.raises(TritiumError, match="form 'persistent' does not fit this model"):
            persists("persistent", other)
    with pytest.raises(TritiumError, match="form: must be one of fused, persistent or None, got 'fast'"):
        persists("fast", plan)
