"""Adapters of PEFT on an accelerated model, and an accelerated model under adapters."""

import copy
from typing import Any

import peft
import pytest
import torch

import tritium
from tests import oracle
from tests.dropin.accelerated import SMALL, assert_near, build, launch, results

X = oracle.tokens(2, 9)


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")


def adapted(model: Any, **options: Any) -> Any:
    names = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    names = {"gpt2": ["c_attn", "c_fc"], "qwen3_moe": ["q_proj", "v_proj"]}.get(model.config.model_type, names)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=9, target_modules=names, task_type="CAUSAL_LM", fan_in_fan_out="c_fc" in names, **options
    )
    found = peft.get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return found


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_adapters_before_and_after(case: oracle.Case) -> None:
    model = build(case)
    plain = adapted(copy.deepcopy(model))
    expected = results(plain, X)
    assert {name.rpartition(".")[2] for name in expected[2]} == {"weight"}
    assert all("lora" in name for name in expected[2])
    tokens = plain.generate(input_ids=X, max_new_tokens=5, do_sample=False)
    base = plain.base_model.model(X).logits

    before = adapted(copy.deepcopy(model))
    report = tritium.accelerate(before)
    assert report.patched
    after = copy.deepcopy(model)
    tritium.accelerate(after)
    after = adapted(after)
    for found in (before, after):
        assert_near(results(found, X), expected)
        assert torch.equal(found.generate(input_ids=X, max_new_tokens=5, do_sample=False), tokens)
        with found.disable_adapter():
            torch.testing.assert_close(found(X).logits, model(X).logits, atol=1e-5, rtol=1e-5)
    report.undo()
    assert torch.equal(before(X).logits, base)

    merged = after.merge_and_unload()
    assert tritium.accelerate(merged).already
    torch.testing.assert_close(merged(X).logits, base, atol=2e-5, rtol=2e-5)


def test_a_whole_module_that_an_adapter_trains_is_seen() -> None:
    """PEFT puts a wrapper in the place of a norm: the layer's fused sum and norm may not read beside it."""
    model = build(SMALL[1])
    tritium.accelerate(model)
    found = adapted(model, modules_to_save=["post_attention_layernorm", "q_norm"])
    copies = [p for name, p in found.named_parameters() if "modules_to_save" in name]
    assert len(copies) == 4
    before = found(X).logits
    with torch.no_grad():
        for parameter in copies:
            parameter.mul_(1.5)
    assert (found(X).logits - before).abs().max() > 1e-2
    expected = adapted(build(SMALL[1]), modules_to_save=["post_attention_layernorm", "q_norm"])
    expected.load_state_dict(found.state_dict())
    assert_near(results(found, X), results(expected, X))
    report = tritium.accelerate(expected)
    assert "ModulesToSaveWrapper" in str(report)
    assert_near(results(expected, X), results(found, X))


def test_a_saved_adapter_fits_either(tmp_path: Any) -> None:
    model = build(SMALL[3])
    found = adapted(copy.deepcopy(model))
    tritium.accelerate(found)
    found.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(again(X).logits, found(X).logits, atol=1e-5, rtol=1e-5)
