"""A model of `transformers` as our decoder and back: the same memory, bits and tokens; one line for what cannot be."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import tritium
from tests import oracle

CASES = [case for case in oracle.CASES if oracle.own_config(case) is None]  # transformers has the family
EXACT = {"atol": 1e-5, "rtol": 1e-5}
TURNED_OR_JOINED = {"qwen3", "qwen3_moe", "qwen2", "llama", "gpt"}  # whose parameters can all be views


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> oracle.Case:
    found: oracle.Case = request.param
    return found


def storages(*tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of all the memory that tensors lie in."""
    found = [tensor.untyped_storage() for group in tensors for tensor in group]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@torch.no_grad()
def logits(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model(x).logits
    return found


def test_same_objects_memory_and_tokens(case: oracle.Case) -> None:
    theirs = oracle.build(case)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in theirs.named_parameters()}
    x = oracle.tokens(2, 11)
    expected, generated = logits(theirs, x), theirs.generate(x, max_new_tokens=16, do_sample=False)
    ours = tritium.from_transformers(theirs)

    assert [name for name, _ in theirs.named_parameters()] == list(before)
    for name, parameter in theirs.named_parameters():
        assert parameter is before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
    torch.testing.assert_close(logits(ours, x), expected, **EXACT)
    torch.testing.assert_close(logits(theirs, x), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.generate(x, 16, temperature=0), generated)
    assert all(parameter.is_contiguous() for parameter in ours.parameters())

    total = sum(parameter.nbytes for parameter in theirs.parameters())
    doubled = sum(before[name][0].nbytes for name in ours.copied)
    assert sum(storages(theirs.parameters(), ours.parameters()).values()) == total + doubled
    assert bool(ours.copied) == (case.family not in TURNED_OR_JOINED)
    assert all("q_proj" in name or "k_proj" in name or "v_proj" in name for name in ours.copied)


def test_a_change_of_either_is_seen_by_the_other(case: oracle.Case) -> None:
    theirs = oracle.build(case)
    ours = tritium.from_transformers(theirs)
    x = oracle.tokens(1, 7)
    ours.generate(x, 3, temperature=0)  # leaves a session that goes by the weights
    at_first = logits(ours, x)
    for changed in (theirs, ours):
        before = logits(changed, x)
        names = {"qkv.weight"} | set(ours.copied) if ours.copied else set()
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if not any(name.endswith(copied) for copied in names):
                    parameter.mul_(0.95).add_(0.01)
        assert (logits(changed, x) - before).abs().max() > 0.1
        torch.testing.assert_close(logits(ours, x), logits(theirs, x), atol=3e-5, rtol=1e-5)
    assert torch.equal(ours.generate(x, 8, temperature=0), theirs.generate(x, max_new_tokens=8, do_sample=False))
    assert not torch.equal(logits(ours, x), at_first)


def test_a_second_conversion_shares_with_the_first(case: oracle.Case) -> None:
    theirs = oracle.build(case)
    first, second = tritium.from_transformers(theirs), tritium.from_transformers(theirs)
    apart = [
        name for name, tensor in first.named_parameters() if tensor.data_ptr() != second.get_parameter(name).data_ptr()
    ]
    assert apart == [f"stack.layers.{layer}.attention.qkv.weight" for layer in range(case.layers) if first.copied]


def test_there_and_back(case: oracle.Case, tmp_path: Path) -> None:
    """The round trip keeps bits and shares; what `save_pretrained` writes of either is what it was."""
    theirs = oracle.build(case)
    before = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    ours = tritium.from_transformers(theirs)
    again = tritium.to_transformers(ours)
    assert type(again) is type(theirs)
    assert {name: tuple(tensor.shape) for name, tensor in again.named_parameters()} == {
        name: tuple(tensor.shape) for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.named_parameters())
    assert all(not buffer.is_meta for buffer in again.buffers())
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) == case.tied
    apart = set(storages(again.parameters())) - set(storages(ours.parameters()))
    assert len(apart) == len(ours.copied)
    x = oracle.tokens(2, 9)
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again, x), logits(theirs, x))
    for number, model in enumerate((theirs, again)):
        model.save_pretrained(tmp_path / str(number))
        read = type(theirs).from_pretrained(tmp_path / str(number))
        assert all(torch.equal(tensor, before[name]) for name, tensor in read.named_parameters())


def test_gradients_agree(case: oracle.Case) -> None:
    """Both train: each has the gradients of its own parameters, in the places of the weight map."""
    theirs = oracle.build(case).train()
    for name, value in (("resid_pdrop", 0.0), ("embd_pdrop", 0.0), ("attn_pdrop", 0.0)):
        setattr(theirs.config, name, value)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours = tritium.from_transformers(theirs)
    assert ours.training
    x = oracle.tokens(2, 9)
    theirs(x, labels=x, use_cache=False).loss.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    for parameter in theirs.parameters():
        parameter.grad = None
    ours(x, labels=x).loss.backward()
    again = tritium.to_transformers(oracle_of_gradients(ours))
    for name, gradient in again.named_parameters():
        torch.testing.assert_close(gradient.detach(), wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def oracle_of_gradients(model: tritium.Decoder) -> tritium.Decoder:
    """A model whose parameters are the gradients of this one's."""
    found = tritium.load_model(model.config, device="cpu")
    for name, parameter in found.named_parameters():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        parameter.copy_(gradient)
    return found


@pytest.mark.parametrize("family", ["qwen3", "mobilellm", "qwen3_moe", "gpt"])
def test_an_accelerated_model(family: str) -> None:
    """Goes on with its patches on the joined weights, and without them when they are undone."""
    theirs = oracle.build(next(case for case in CASES if case.family == family))
    x = oracle.tokens(2, 9)
    expected = logits(theirs, x)
    report = tritium.accelerate(theirs)
    ours = tritium.from_transformers(theirs)
    for model in (ours, theirs):
        torch.testing.assert_close(logits(model, x), expected, **EXACT)
    report.undo()
    torch.testing.assert_close(logits(theirs, x), expected, **EXACT)


def test_what_the_model_is_is_taken_over() -> None:
    """Its dtype, frozen weights and mode; torch.compile's wrapper is looked through."""
    theirs = oracle.build(CASES[0]).to(torch.bfloat16)
    theirs.requires_grad_(False)
    theirs.lm_head.weight.requires_grad_(True)
    ours = tritium.from_transformers(torch.compile(theirs))
    assert ours.dtype == torch.bfloat16
    assert ours.config.dtype == "bfloat16"
    assert not ours.training
    trained = [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert trained == ["embedding.weight"]
    again = tritium.to_transformers(ours)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert [name for name, parameter in again.named_parameters() if parameter.requires_grad] == [
        "model.embed_tokens.weight"
    ]


def quantised(theirs: hf.PreTrainedModel) -> Any:
    theirs.config.quantization_config = {"bits": 4}
    return theirs


def untied(theirs: hf.PreTrainedModel) -> Any:
    theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    return theirs


def mixed(theirs: hf.PreTrainedModel) -> Any:
    theirs.lm_head.to(torch.bfloat16)
    theirs.model.layers.to(torch.bfloat16)
    return theirs


def extended(theirs: hf.PreTrainedModel) -> Any:
    theirs.model.layers[1].mlp.gate_proj = nn.Linear(48, 73, bias=True)
    return theirs


def offloaded(theirs: hf.PreTrainedModel) -> Any:
    theirs.model.layers[0].to("meta")
    return theirs


REFUSED = {
    "merge_and_unload": lambda theirs: peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj"])),
    "adapter of PEFT": lambda theirs: theirs.add_adapter(peft.LoraConfig(target_modules=["q_proj"])) or theirs,
    "is quantised": quantised,
    "ties it": untied,
    "torch.bfloat16, torch.float32": mixed,
    "has torch.float64": lambda theirs: theirs.double(),
    "mlp.gate_proj.bias": extended,
    "offloaded": offloaded,
    "no language modelling head": lambda theirs: theirs.model,
    "no model of transformers": lambda theirs: nn.Linear(2, 2),
    "unknown model_type 'opt'": lambda theirs: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=9, hidden_size=8, ffn_dim=8, num_attention_heads=2, num_hidden_layers=1, word_embed_proj_dim=8
        )
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_converted_is_refused_and_left(said: str) -> None:
    theirs = oracle.build(CASES[0])
    model = REFUSED[said](theirs)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(tritium.TritiumError, match=said) as error:
        tritium.from_transformers(model)
    assert "\n" not in str(error.value)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_what_cannot_go_back_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for case in oracle.CASES:
        if oracle.own_config(case) is not None:
            ours, _, _ = tritium.load(oracle.save(case, oracle.build(case), tmp_path / str(case)), device="cpu")
            with pytest.raises(tritium.TritiumError, match=r"transformers has no '(qwen|mobilellm)'"):
                tritium.to_transformers(ours)
    ours = tritium.from_transformers(oracle.build(CASES[0]))
    with pytest.raises(tritium.TritiumError, match="takes bfloat16"):
        tritium.to_transformers(tritium.from_transformers(oracle.build(CASES[0])).double())
    few, _, _ = tritium.load("mobilellm:shakespeare", device="cpu", quantise="int8")
    with pytest.raises(tritium.TritiumError, match="quantised"):
        tritium.to_transformers(few)

    def absent(name: str) -> Any:
        raise ImportError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", absent)
        with pytest.raises(tritium.TritiumError, match="needs transformers"):
            tritium.to_transformers(ours)
    tritium.add_lora(ours, rank=2)
    with pytest.raises(tritium.TritiumError, match="merge_lora"):
        tritium.to_transformers(ours)
