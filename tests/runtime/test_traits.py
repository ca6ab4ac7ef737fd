"""Traits that Qwen3 and MobileLLM do not use, each against an independent implementation of the same architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tritium.runtime import checkpoint, registry
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.rope import RopeScaling, inverse_frequencies

import tritium
from tests import oracle

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotations(family: str, scaling: str, tmp_path: Path) -> None:
    """transformers' logits at positions on both sides of the trained length, and the scaling survives saving."""
    case = oracle.Case(family, 6, 2, 8, tied=True, layers=2)
    rule = {"rope_theta": 10000.0, **SCALINGS[scaling]}
    theirs = oracle.build(case, rope_parameters=rule, max_position_embeddings=256)
    oracle.redraw(theirs, 0, strength=1.0)
    ours, _, spec = tritium.load(oracle.save(case, theirs, tmp_path / "checkpoint"), device="cpu")
    assert (spec.rope_scaling is None) == (scaling == "default")
    x = oracle.tokens(2, 90)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=1e-5)
    tritium.save_pretrained(ours, tmp_path / "again")
    assert checkpoint.read_spec(tmp_path / "again") == spec


def test_yarn_published_values() -> None:
    """YaRN for Qwen3 (head 128, base 1e6, factor 4, trained to 32768), against values worked out by hand."""
    scaling = RopeScaling.parse({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "test")
    frequencies, factor = inverse_frequencies(128, 1e6, scaling)
    assert factor == pytest.approx(1.138629436, rel=1e-9)
    expected = {0: 1.0, 20: 1.333521432e-2, 24: 5.375321491e-3, 39: 6.490394321e-5, 63: 3.102344402e-7}
    for index, value in expected.items():
        assert float(frequencies[index]) == pytest.approx(value, rel=1e-6)


def test_llama3_published_values() -> None:
    """Llama-3.2-1B's rule (head 64, base 5e5, factor 32), against values worked out by hand."""
    rule = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    frequencies, factor = inverse_frequencies(64, 5e5, RopeScaling.parse({"rope_type": "llama3", **rule}, "test"))
    assert factor == 1.0
    for index, value in {14: 3.211446e-3, 15: 1.290548e-3, 16: 4.295568e-4, 17: 9.708288e-5, 18: 1.946164e-5}.items():
        assert float(frequencies[index]) == pytest.approx(value, rel=1e-5)


def classic(**changes: Any) -> Decoder:
    """A small decoder with the traits asked for, float32, redrawn."""
    values: dict[str, Any] = {
        "vocab_size": 53, "context_length": 300, "embedding_dim": 32, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 4, "head_dim": 8, "hidden_dim": 40, "dtype": "float32", "norm": "layer", "norm_eps": 1e-5,
        "residual": "pre_norm", "positions": "learned", "rope_base": 1e4, "rope_dtype": "model", "rope_scaling": None,
        "rope_layers": True, "qk_norm": "none", "qk_norm_position": "before_rope", "qk_norm_layers": True,
        "windows": None, "qkv_bias": True, "out_bias": True, "mlp": "plain", "activation": "gelu", "mlp_bias": True,
        "tie_embeddings": False, "layer_repeat": 1,
    }  # fmt: skip
    spec = registry.get_family("qwen3").spec_from({**values, **changes}, "test")
    model = Decoder(spec, "torch")
    oracle.redraw(model, 5)
    return model.eval()


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("residual", ["pre_norm", "post_norm"])
def test_classic_transformer(residual: str, activation: str) -> None:
    """LayerNorm, learned positions, biases, plain feed-forward, pre- and post-norm, against torch's own layer."""
    model = classic(residual=residual, activation=activation)
    x = torch.randint(0, 53, (3, 17))
    with torch.no_grad():
        stream = model.embedding(x) + model.position_embedding.weight[: x.shape[1]]
        for block in model.stack.layers:
            layer = nn.TransformerEncoderLayer(
                32, 4, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=residual == "pre_norm"
            ).eval()
            pairs = {
                "self_attn.in_proj_": block.attention.qkv,
                "self_attn.out_proj.": block.attention.out,
                "linear1.": block.mlp.up,
                "linear2.": block.mlp.down,
                "norm1.": block.attention_norm,
                "norm2.": block.mlp_norm,
            }
            state = {name + part: getattr(ours, part) for name, ours in pairs.items() for part in ("weight", "bias")}
            layer.load_state_dict(state)
            alone = block(stream)
            stream = layer(stream, src_mask=nn.Transformer.generate_square_subsequent_mask(17), is_causal=True)
            torch.testing.assert_close(alone, stream, atol=1e-5, rtol=1e-5)
        if residual == "pre_norm":
            stream = torch.nn.functional.layer_norm(stream, (32,), model.stack.norm.weight, model.stack.norm.bias, 1e-5)
        expected = stream @ model.head.weight.t()
    assert (model.stack.norm is None) == (residual == "post_norm")
    torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("residual", ["pre_norm", "post_norm"])
def test_a_repeated_layer_is_two_layers_with_the_same_weights(residual: str) -> None:
    """layer_repeat runs each block twice in succession, each time with a cache slot of its own."""
    shared = classic(layer_repeat=2, norm="rms", positions="rope", residual=residual)
    apart = classic(num_layers=4, norm="rms", positions="rope", residual=residual)
    state = apart.state_dict()
    for key, value in shared.state_dict().items():
        if key.startswith("stack.layers."):
            _, _, layer, *rest = key.split(".")
            for copy in (0, 1):
                state[".".join(["stack.layers", str(2 * int(layer) + copy), *rest])] = value
        else:
            state[key] = value
    apart.load_state_dict(state)
    x = torch.randint(0, 53, (2, 11))
    assert torch.equal(shared(x).logits, apart(x).logits)
    assert torch.equal(shared.generate(x, 12, temperature=0), apart.generate(x, 12, temperature=0))
    assert KVCache(shared.config, 1, 10, torch.float32).keys[3].shape == (4, 1, 256, 8)


@pytest.mark.parametrize("residual", ["pre_norm", "post_norm"])
def test_learned_positions_go_on_in_decode(residual: str) -> None:
    model = classic(residual=residual)
    x = torch.randint(0, 53, (1, 12))
    expected = model(x).logits[0]
    cache, plan = KVCache(model.config, 1, 20, torch.float32), model.bind()
    with torch.inference_mode():
        for start, count in ((0, 5), *((position, 1) for position in range(5, 12))):
            _, logits = model.run(plan, x[0, start : start + count], Batch.appended(cache, [0], [count]))
            torch.testing.assert_close(logits, expected[start : start + count], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("windows", [5, [None, 3]], ids=str)
def test_windows_and_layers_without_rotation(windows: Any) -> None:
    """A token further back than every layer's window together changes nothing; cached decode sees the same window."""
    model = classic(windows=windows, positions="rope", rope_layers=[True, False])
    x = torch.randint(0, 53, (1, 40))
    expected = model(x).logits
    other = x.clone()
    other[0, :20] = (other[0, :20] + 1) % 53
    unseen = torch.equal(model(other).logits[:, 30:], expected[:, 30:])
    assert unseen == (windows == 5)  # two layers of 5 reach back 8 tokens; a layer without a window reaches all
    cache, plan = KVCache(model.config, 1, 60, torch.float32), model.bind()
    with torch.inference_mode():
        for start, count in ((0, 20), (20, 7), *((position, 1) for position in range(27, 40))):
            batch = Batch.appended(cache, [0], [count])
            _, logits = model.run(plan, x[0, start : start + count], batch)
            torch.testing.assert_close(logits, expected[0, start : start + count], atol=1e-5, rtol=1e-5)
