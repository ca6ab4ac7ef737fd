"""LoRA adapters against `peft` on the same weights: what they compute, what they learn, and the files of both."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.lora import adapters
from tritium.runtime.training.optimizer import build_optimizer

import tritium
from tests import oracle

from ..rule import DEVICE

QWEN3 = oracle.Case("qwen3", 6, 2, 16, tied=False, layers=2)
GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj")  # of packed layers not all the parts
GPT = ("c_attn", "c_proj", "c_fc")
# One of each layout: rows permuted at loading, biases, matrices stored [in, out], layers with experts among the others.
CASES = [
    (QWEN3, GATED),
    (QWEN3, SOME),
    (oracle.Case("llama", 6, 2, 8, tied=False, what="biased", layers=2), GATED),
    (oracle.Case("mobilellm", 6, 2, 16, tied=True, layers=2), GATED),
    (oracle.Case("mobilellm", 6, 2, 16, tied=True, layers=2), ("k_proj", "down_proj")),
    (oracle.Case("gpt", 4, 4, 12, tied=True, layers=2), GPT),
    (oracle.Case("gpt", 4, 4, 12, tied=True, layers=2), ("attn.c_proj",)),
    (oracle.Case("qwen3_moe", 4, 1, 16, tied=True, layers=4, sharded=True, what="mixed"), GATED[:4]),
]
IDS = [f"{case}-{'+'.join(targets)}" for case, targets in CASES]
A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[oracle.Case], Path]:
    """The checkpoint of a case."""
    made: dict[oracle.Case, Path] = {}

    def get(case: oracle.Case) -> Path:
        if case not in made:
            made[case] = oracle.save(case, oracle.build(case), tmp_path_factory.mktemp("base") / "model")
        return made[case]

    return get


def load(folder: Path, backend: str = "torch", dtype: str = "float32") -> Decoder:
    return tritium.load(folder, device=DEVICE, dtype=dtype, backend=backend, progress=False)[0]


def theirs_of(folder: Path) -> hf.PreTrainedModel:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.to(DEVICE).eval()


def peft_model(folder: Path, targets: tuple[str, ...], **changes: Any) -> peft.PeftModel:
    """The checkpoint with adapters of `peft`, A and B redrawn."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": list(targets), "task_type": "CAUSAL_LM", **changes}
    settings.setdefault("fan_in_fan_out", "c_attn" in targets or "attn.c_proj" in targets)
    model = peft.get_peft_model(theirs_of(folder), peft.LoraConfig(**settings))
    redraw({name: parameter for name, parameter in model.named_parameters() if "lora_" in name})
    return model.eval()


@torch.no_grad()
def redraw(parameters: Mapping[str, Tensor], strength: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters.values():
        parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))


def adapted(model: Decoder, targets: tuple[str, ...] = GATED, **changes: Any) -> Decoder:
    """A model with adapters whose B is not zero."""
    tritium.add_lora(model, **{"rank": 4, "alpha": 12, "targets": targets, **changes})
    redraw({name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad})
    return model


def close(found: Tensor, expected: Tensor, what: str = "") -> None:
    allowed = 1e-5 * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(found, expected, atol=allowed, rtol=0, msg=lambda text: f"{what}: {text}")


def logits_of(model: Decoder, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits is not None
    return logits


@torch.no_grad()
def gradients_of(model: Decoder, folder: Path) -> dict[str, Tensor]:
    """The gradients of A and B as `peft` calls and orders them: written in the place of A and B."""
    twin = copy.deepcopy(model)
    for mine, parameter in zip(model.parameters(), twin.parameters(), strict=True):
        if mine.grad is not None:
            parameter.copy_(mine.grad)
    tritium.save_adapter(twin, folder)
    return load_file(folder / "adapter_model.safetensors", device=DEVICE)


@pytest.mark.parametrize(("case", "targets"), CASES, ids=IDS)
def test_an_adapter_of_peft_computes_and_learns_what_it_does_there(
    case: oracle.Case, targets: tuple[str, ...], base: Callable[[oracle.Case], Path], tmp_path: Path
) -> None:
    """Logits, gradients of every A and B, and the files written back."""
    theirs = peft_model(base(case), targets)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(base(case))
    plain = logits_of(ours, tokens := oracle.tokens(2, 9).to(DEVICE))
    names = tritium.load_adapter(ours, tmp_path / "theirs")
    assert names == [name for name, parameter in ours.named_parameters() if parameter.requires_grad]
    assert all(name.endswith((".adapter.a", ".adapter.b")) for name in names)

    loss = theirs(tokens, labels=tokens).loss
    loss.backward()
    with torch.no_grad():
        expected = theirs(tokens).logits
    found = logits_of(ours, tokens)
    close(found, expected, "logits")
    assert (found - plain).abs().max() > 0.1  # the adapter does something

    mine = ours(tokens, labels=tokens, return_logits=False).loss
    mine.backward()
    close(mine.detach(), loss.detach(), "loss")
    assert all(parameter.grad is None for name, parameter in ours.named_parameters() if name not in names)
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    own = gradients_of(ours, tmp_path / "gradients")
    assert set(own) == set(gradients)
    for name, gradient in gradients.items():
        close(own[name], gradient, name)

    tritium.save_adapter(ours, tmp_path / "ours")
    said, written = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    said |= {"target_modules": sorted(said["target_modules"])}
    written |= {"target_modules": sorted(written["target_modules"]), "base_model_name_or_path": base(case).as_posix()}
    assert {name: said[name] for name in written} == written
    before, after = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert set(before) == set(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("case", "targets"), [*CASES, (QWEN3, ("all-linear",))], ids=[*IDS, "all-linear"])
def test_an_adapter_of_ours_opens_in_peft_and_merged_in_transformers(
    case: oracle.Case, targets: tuple[str, ...], base: Callable[[oracle.Case], Path], tmp_path: Path
) -> None:
    model = adapted(load(base(case)), targets, rslora=True)
    expected = logits_of(model, tokens := oracle.tokens(2, 9).to(DEVICE))
    tritium.save_adapter(model, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs_of(base(case)), tmp_path / "adapter").eval()
    with torch.no_grad():
        close(opened(tokens).logits, expected, "peft")

    tritium.save_pretrained(model, tmp_path / "written", merge=True)
    assert adapters(model)
    names = tritium.merge_lora(model)
    assert names is model
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    close(logits_of(model, tokens), expected, "merged")
    tritium.save_pretrained(model, tmp_path / "merged")
    with torch.no_grad():
        close(theirs_of(tmp_path / "merged")(tokens).logits, expected, "transformers")
    for path in (tmp_path / "merged").glob("*.safetensors"):
        first, second = load_file(path), load_file(tmp_path / "written" / path.name)
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize(
    "case",
    [oracle.Case("qwen1", 3, 3, 16, tied=False), oracle.Case("mobilellm1", 6, 2, 8, tied=True, layers=2)],
    ids=str,
)
def test_families_that_transformers_does_not_have(
    case: oracle.Case, base: Callable[[oracle.Case], Path], tmp_path: Path
) -> None:
    """Their adapters are called as their checkpoints' tensors are, and come back."""
    model = adapted(load(base(case)), ("all-linear",))
    tritium.save_adapter(model, tmp_path)
    stored = set(load_file(tmp_path / "adapter_model.safetensors"))
    checkpoint = set(load_file(base(case) / "model.safetensors"))
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in stored}
    assert {f"{name}.weight" for name in layers} <= checkpoint
    assert len(layers) == case.layers * (5 if case.family == "qwen1" else 7)
    again = load(base(case))
    tritium.load_adapter(again, tmp_path)
    tokens = oracle.tokens(2, 9).to(DEVICE)
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    tritium.merge_lora(model)
    close(logits_of(model, tokens), logits_of(again, tokens))


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_draws(base: Callable[[oracle.Case], Path]) -> None:
    model = load(base(QWEN3))
    tokens = oracle.tokens(2, 9).to(DEVICE)
    before = logits_of(model, tokens)
    names = tritium.add_lora(model, rank=16, seed=3)
    assert len(names) == 2 * 2 * 4  # A and B, two layers, four linears
    assert torch.equal(logits_of(model, tokens), before)
    a = model.stack.layers[0].attention.qkv.adapter.a
    bound = 48**-0.5
    assert 0.98 * bound < a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    twin, other = load(base(QWEN3)), load(base(QWEN3))
    tritium.add_lora(twin, rank=16, seed=3)
    tritium.add_lora(other, rank=16, seed=4)
    assert torch.equal(twin.get_parameter(names[0]), model.get_parameter(names[0]))
    assert not torch.equal(other.get_parameter(names[0]), model.get_parameter(names[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss_and_leaves_the_weights(
    dtype: str, base: Callable[[oracle.Case], Path], tmp_path: Path
) -> None:
    """Over bfloat16 weights too, where A and B are float32."""
    model = load(base(QWEN3), dtype=dtype).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = tritium.add_lora(model, rank=4, dropout=0.1)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float32}
    from tritium.runtime.training.config import Optimizer

    optimizer = build_optimizer(model, Optimizer(learning_rate=1e-2, weight_decay=0.0))
    tokens = oracle.tokens(4, 16).to(DEVICE)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name
    expected = logits_of(model, tokens)
    tritium.save_adapter(model, tmp_path)
    again = load(base(QWEN3), dtype=dtype)
    tritium.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again, tokens), expected)
    merged = {
        f"{name}.weight": (before[f"{name}.weight"].double() + _delta(adapter)).to(model.dtype)
        for name, adapter in adapters(model).items()
    }
    tritium.merge_lora(model)
    for name, value in merged.items():  # once rounded, from float32
        torch.testing.assert_close(
            model.get_parameter(name), value, rtol=1e-2 if dtype == "bfloat16" else 1e-6, atol=1e-6
        )
        if dtype == "bfloat16":
            assert (model.get_parameter(name) == value).float().mean() > 0.999


def _delta(adapter: Any) -> Tensor:
    a, b = adapter.matrices()
    return b.double() @ a.double()


def test_dropout_is_of_what_adapters_are_given(base: Callable[[oracle.Case], Path]) -> None:
    model, twin = (adapted(load(base(QWEN3)), dropout=dropout) for dropout in (0.5, 0.0))
    tokens = oracle.tokens(1, 9).to(DEVICE)
    assert torch.equal(logits_of(model, tokens), logits_of(twin, tokens))
    model.train()
    torch.manual_seed(0)
    first = logits_of(model, tokens)
    torch.manual_seed(0)
    assert torch.equal(logits_of(model, tokens), first)
    assert not torch.equal(logits_of(model, tokens), first)
    for adapter in adapters(model).values():
        adapter.b.data.zero_()
    assert torch.equal(logits_of(model, tokens), logits_of(load(base(QWEN3)), tokens))  # nothing else is dropped


def test_gradient_checkpointing_and_compute_in(base: Callable[[oracle.Case], Path]) -> None:
    """The same gradients whatever is kept; in bfloat16 over float32 weights they come in float32."""
    model = adapted(load(base(QWEN3)))
    tokens = oracle.tokens(2, 9).to(DEVICE)
    found: dict[str, list[Tensor]] = {}
    for keep in ("", "nothing", "attention", "products"):
        model.enable_gradient_checkpointing(bool(keep), keep or "nothing")
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found[keep] = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    for keep, gradients in found.items():
        for gradient, expected in zip(gradients, found[""], strict=True):
            assert torch.equal(gradient, expected), keep
    model.compute_in(torch.bfloat16)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    for parameter, expected in zip((p for p in model.parameters() if p.requires_grad), found[""], strict=True):
        assert parameter.grad.dtype is torch.float32
        assert (parameter.grad - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("case", [QWEN3, oracle.Case("gpt", 4, 4, 12, tied=True, layers=2)], ids=str)
def test_the_triton_path(case: oracle.Case, base: Callable[[oracle.Case], Path]) -> None:
    """Forward, generation and gradients, of a gated and of a plain feed-forward; with a layer that has no adapter."""
    targets = ("v_proj", "o_proj", "gate_proj") if case is QWEN3 else ("c_attn", "c_fc")
    plain, triton = (adapted(load(base(case), backend=backend), targets) for backend in ("torch", "triton"))
    tokens = oracle.tokens(1, 8).to(DEVICE)
    close(logits_of(triton, tokens), logits_of(plain, tokens))
    assert triton.kernels.name == "triton"
    generated = [model.generate(tokens, 3, temperature=0.0) for model in (plain, triton)]
    assert torch.equal(*generated)
    merged = tritium.merge_lora(copy.deepcopy(plain))
    assert torch.equal(generated[0], merged.generate(tokens, 3, temperature=0.0))
    assert not torch.equal(generated[0], load(base(case)).generate(tokens, 3, temperature=0.0))
    for model in (plain, triton):
        model(tokens, labels=tokens, return_logits=False).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            close(triton.get_parameter(name).grad, parameter.grad, name)


# What is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora: is not supported"),
    "bias": ({"bias": "all"}, "bias: trained biases are not supported"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save: is not supported"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: is not supported"),
    "some layers": ({"layers_to_transform": [0]}, "layers_to_transform: is not supported"),
    "of the future": ({"use_something": 1}, "use_something: is not supported"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base weights"),
    "another method": ({"peft_type": "LOHA"}, "peft_type: only 'LORA' is read, got 'LOHA'"),
    "rank 0": ({"r": 0}, "rank: must be a whole number above 0, got 0"),
    "rank of another": ({"r": 8}, r"wrong shape 28: .*q_proj\.lora_A\.weight is \[4, 48\], expected \[8, 48\]"),
    "vast rank": ({"r": 10**15}, "wrong shape"),
    "no alpha": ({"lora_alpha": None}, "missing lora_alpha"),
    "alpha": ({"lora_alpha": "12"}, "alpha: must be a number above 0"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "alpha: must be a number above 0"),
    "dropout": ({"lora_dropout": 1.5}, "dropout: must be a number of 0 or more and below 1"),
    "rslora": ({"use_rslora": "yes"}, "rslora: must be true or false"),
    "unknown target": (
        {"target_modules": [*GATED, "w_proj"]},
        "target_modules: targets: no layer is called 'w_proj'; did you mean",
    ),
    "no target": ({"target_modules": []}, "targets: must be names"),
    "a pattern": ({"target_modules": ".*proj"}, "target_modules: must be a list of names, got '.*proj'"),
    "one target less": ({"target_modules": list(GATED[1:])}, "unknown 4: .*q_proj"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "'embed_tokens' is model.embed_tokens.weight, and experts"),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(base: Callable[[oracle.Case], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter's folder."""
    folder: Path = tmp_path_factory.mktemp("adapter")
    tritium.save_adapter(adapted(load(base(QWEN3))), folder)
    return folder


def copied(adapter: Path, folder: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((adapter / name).read_bytes())
    return folder


def refused(model: Decoder, folder: Path, message: str) -> None:
    """One line, and the model as it was."""
    with pytest.raises(TritiumError, match=message) as raised:
        tritium.load_adapter(model, folder)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    assert not adapters(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_stranger_s_configuration_is_checked(
    base: Callable[[oracle.Case], Path], adapter: Path, tmp_path: Path
) -> None:
    model = load(base(QWEN3))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for changes, message in REFUSED.values():
        copied(adapter, tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        refused(model, tmp_path, message)
    # What says "not used" is no obstacle.
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False, "rank_pattern": {}}))
    assert len(tritium.load_adapter(model, tmp_path)) == 16


def test_a_stranger_s_tensors_are_checked(base: Callable[[oracle.Case], Path], adapter: Path, tmp_path: Path) -> None:
    model = load(base(QWEN3))
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.self_attn.k_proj.{B}"
    extra = f"base_model.model.model.layers.7.self_attn.k_proj.{A}"
    cases: dict[str, dict[str, Tensor]] = {
        rf"missing 1: {re.escape(name)}": {key: value for key, value in tensors.items() if key != name},
        rf"unknown 1: {re.escape(extra)}": {**tensors, extra: torch.zeros(4, 48)},
        r"k_proj.lora_B.weight is \[32, 3\], expected \[32, 4\]": {**tensors, name: torch.zeros(32, 3)},
        "k_proj.lora_B.weight is I64; only F64": {**tensors, name: torch.zeros(32, 4, dtype=torch.int64)},
    }
    for message, changed in cases.items():
        copied(adapter, tmp_path)
        save_file(changed, tmp_path / "adapter_model.safetensors")
        refused(model, tmp_path, message)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    refused(model, tmp_path, "not a whole safetensors file")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    refused(model, tmp_path, r"adapter_model\.bin is a pickle, which can run code and is refused")
    (tmp_path / "adapter_config.json").unlink()
    refused(model, tmp_path, r"not an adapter, it has no adapter_config\.json")
    refused(model, tmp_path / "nowhere", "no such adapter folder")


def test_an_adapter_of_another_model_is_refused(
    base: Callable[[oracle.Case], Path], adapter: Path, tmp_path: Path
) -> None:
    refused(load(base(oracle.Case("gpt", 4, 4, 12, tied=True, layers=2))), adapter, "no layer is called 'q_proj'")


def test_what_takes_no_adapter_is_named(base: Callable[[oracle.Case], Path]) -> None:
    experts = oracle.Case("qwen3_moe", 6, 2, 16, tied=False)
    without = "experts, router, embeddings and head take no adapter"
    mixed = oracle.Case("qwen3_moe", 4, 1, 16, tied=True, layers=4, sharded=True, what="mixed")
    for case, target, message in (
        (QWEN3, "lm_head", f"'lm_head' is lm_head.weight, and {without}; .*known: all-linear, q_proj, k_proj"),
        (QWEN3, "input_layernorm", rf"'input_layernorm' is model\.layers\.0\.input_layernorm\.weight, and {without}"),
        (QWEN3, "proj", "no layer is called 'proj'"),
        (QWEN3, "qproj", "no layer is called 'qproj'; did you mean q_proj"),
        (experts, "gate", rf"'gate' is model\.layers\.0\.mlp\.gate\.weight, and {without}"),
        (mixed, "gate_proj", rf"'gate_proj' is model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight, and {without}"),
        (experts, "gate_proj", rf"'gate_proj' is model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight, and {without}"),
    ):
        model = load(base(case))
        with pytest.raises(TritiumError, match=f"targets: {message}"):
            tritium.add_lora(model, targets=("o_proj", target))
        assert not adapters(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(tritium.add_lora(load(base(experts)))) == 3 * 2 * 2  # attention alone


def test_values_out_of_range_and_models_in_another_state(base: Callable[[oracle.Case], Path], tmp_path: Path) -> None:
    model = load(base(QWEN3))
    for changes, message in (
        ({"rank": 0}, "rank: must be a whole number above 0, got 0"),
        ({"rank": True}, "rank: must be"),
        ({"alpha": -1}, "alpha: must be"),
        ({"dropout": 1.0}, "dropout: must be"),
        ({"targets": ()}, "targets: must be names"),
    ):
        with pytest.raises(TritiumError, match=message):
            tritium.add_lora(model, **changes)
    with pytest.raises(TritiumError, match="no LoRA adapters to merge"):
        tritium.merge_lora(model)
    with pytest.raises(TritiumError, match="no LoRA adapters to save"):
        tritium.save_adapter(model, tmp_path / "x")
    tritium.add_lora(model)
    with pytest.raises(TritiumError, match="has LoRA adapters already: merge_lora first"):
        tritium.add_lora(model)
    with pytest.raises(TritiumError, match="has LoRA adapters already: merge_lora first"):
        tritium.load_adapter(model, tmp_path)
    with pytest.raises(TritiumError, match=r"has LoRA adapters: merge them .* or save_adapter"):
        tritium.save_pretrained(model, tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(TritiumError, match="is a file; give a folder"):
        tritium.save_adapter(model, tmp_path / "file")
    assert not (tmp_path / "x").exists()
