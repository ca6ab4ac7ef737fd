"""GPT by its own names: the config, initialisation, freezing by name, and checkpoints of what GPT-2 cannot express."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from tritium.models import GPT, GPTConfig
from tritium.models.config import ModelSpec
from tritium.models.model_utils import freeze, initialise, load_checkpoint, save_checkpoint, unfreeze
from tritium.runtime.checkpoint import read_spec
from tritium.runtime.errors import TritiumError

import tritium
from tests import oracle

SMALL: dict[str, Any] = {"vocab_size": 65, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 48}


def test_the_config_is_the_spec() -> None:
    spec = GPTConfig(**SMALL).to_spec()
    assert isinstance(spec, ModelSpec)
    assert (spec.vocab_size, spec.context_length, spec.num_layers) == (65, 32, 2)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.embedding_dim, spec.hidden_dim) == (
        4,
        4,
        12,
        48,
        192,
    )
    assert (spec.norm, spec.positions, spec.mlp, spec.activation, spec.residual) == (
        "layer", "learned", "plain", "relu", "pre_norm",
    )  # fmt: skip
    config = GPTConfig(**SMALL, n_inner=100, activation="gelu", residual="post_norm", bias=False)
    assert config["n_embd"] == config.n_embd == 48
    spec = config.to_spec()
    assert (spec.hidden_dim, spec.activation, spec.residual) == (100, "gelu", "post_norm")
    assert not spec.qkv_bias
    assert not spec.mlp_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 50}, r"n_embd \(50\) must be a multiple of n_head \(4\)"),
        ({"dropout": -0.1}, "dropout must be 0 or more and below 1, got -0.1"),
        ({"activation": "silu"}, "a plain mlp does not take the activation silu"),
        ({"n_layer": 0}, "num_layers must be above 0"),
    ],
)
def test_wrong_configs_say_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TritiumError, match=message):
        GPTConfig(**{**SMALL, **changes}).to_spec()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("residual", ["pre_norm", "post_norm"])
def test_saved_and_loaded(residual: Any, activation: Any, tmp_path: Path) -> None:
    """The same weights and logits; GPT-2's layout where that can express the model, Tritium's own where not."""
    model = GPT(GPTConfig(**SMALL, residual=residual, activation=activation))
    oracle.redraw(model, 1)
    save_checkpoint(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == ("gpt2" if residual == "pre_norm" else "tritium")
    again = load_checkpoint(tmp_path, device="cpu")
    assert again.config == model.config
    x = torch.randint(0, 65, (2, 20))
    assert torch.equal(again(x).logits, model(x).logits)


def test_the_own_layout_names_tensors_as_parameters(tmp_path: Path) -> None:
    """And keeps a model's dtype; a spec that is no spec is refused."""
    model = tritium.load_model(tritium.load_config("models/mobilellm/671b.yaml").replace(
        num_layers=2, embedding_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=16, expert_dim=12,
        num_experts=5, experts_per_token=2, vocab_size=40, context_length=64,
    ), device="cpu", dtype="bfloat16")  # fmt: skip
    with pytest.raises(TritiumError, match=r"cannot express .*; save it with layout=\"tritium\""):
        tritium.save_pretrained(model, tmp_path / "refused")
    tritium.save_pretrained(model, tmp_path, layout="tritium")
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == {name for name, _ in model.named_parameters()}
    again = load_checkpoint(tmp_path, device="cpu")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(again.get_parameter(name), value) for name, value in model.named_parameters())
    config = json.loads((tmp_path / "config.json").read_text())
    for spoilt, message in (
        ({}, "needs a spec"),
        ({"spec": {**config["spec"], "norm": "none"}}, "norm: must be one of"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "tritium", **spoilt}))
        with pytest.raises(TritiumError, match=message):
            read_spec(tmp_path)
    with pytest.raises(TritiumError, match="layout: unknown 'native'"):
        tritium.save_pretrained(model, tmp_path, layout="native")  # type: ignore[arg-type]


def test_initialisation() -> None:
    model = GPT(GPTConfig(**SMALL))
    weight = model.stack.layers[0].mlp.up.weight  # [192, 48]
    initialise(model, std=0.05, seed=3)
    assert weight.std().item() == pytest.approx(0.05, rel=0.03)
    first = weight.clone()
    initialise(model, std=0.05, seed=3)
    assert torch.equal(weight, first)
    initialise(model, "xavier", seed=3)
    bound = (6 / (192 + 48)) ** 0.5
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
    with pytest.raises(TritiumError, match="method: unknown 'kaiming'; known: normal, xavier"):
        initialise(model, "kaiming")


def test_freezing_by_name() -> None:
    """Frozen parameters get no gradient; the others do; unfrozen ones do again."""
    model = GPT(GPTConfig(**SMALL))
    names = {name for name, _ in model.named_parameters()}
    assert freeze(model, "embedding.*", "stack.layers.0.*") == [
        name for name, _ in model.named_parameters() if name.startswith(("embedding.", "stack.layers.0."))
    ]
    x = torch.randint(0, 65, (2, 9))
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(("embedding.", "stack.layers.0.")), name
    assert set(unfreeze(model)) == names
    model.zero_grad()
    model(x, labels=x).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(TritiumError, match=r"no parameter matches 'stack.layer.0.\*'"):
        freeze(model, "stack.layer.0.*")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_learn() -> None:
    """A mixture's parameters all get gradients, those of experts that no token took a zero one."""
    spec = tritium.load_config("models/qwen3/30B-A3B.yaml").replace(
        num_layers=1, embedding_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=16, expert_dim=8,
        num_experts=12, experts_per_token=2, vocab_size=40, context_length=32, dtype="float32",
    )  # fmt: skip
    model = tritium.load_model(spec, "qwen3", device="cpu")
    oracle.redraw(model, 0)
    x = torch.randint(0, 40, (1, 3))
    model(x, labels=x).loss.backward()
    moe = model.stack.layers[0].mlp
    assert isinstance(moe.up, nn.Parameter)
    touched = moe.up.grad.abs().amax((1, 2)) > 0
    assert 2 <= int(touched.sum()) <= 6
    assert torch.equal(touched, moe.down.grad.abs().amax((1, 2)) > 0)
    assert moe.router.weight.grad.abs().sum() > 0
