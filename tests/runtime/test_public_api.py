"""The names, arguments and defaults that the project promises, used as its users would."""

import inspect
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from tritium.models import MobileLLM, MobileLLMConfig, get_mobilellm_config
from tritium.models.attention import FeedForward, MultiHeadAttention, RMSNorm
from tritium.models.transformer import TransformerBlock, TransformerDecoder
from tritium.runtime import layers
from tritium.runtime.errors import TritiumError

import tritium

SMALL: dict[str, Any] = {
    "num_layers": 2, "num_heads": 6, "num_kv_heads": 2, "embed_dim": 48, "hidden_dim": 64, "vocab_size": 101,
    "max_seq_len": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> MobileLLM:
    torch.manual_seed(0)
    model = MobileLLM(MobileLLMConfig(**SMALL))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.2)
    return model


def test_config_attributes_and_defaults() -> None:
    defaults = {field.name: field.default for field in fields(MobileLLMConfig)}
    promised = {
        "vocab_size": 128256, "max_seq_len": 32768, "rope_base": 500000, "use_qk_norm": True,
        "tie_word_embeddings": True, "dropout": 0.0, "norm_eps": 1e-5,
    }  # fmt: skip
    for name, value in promised.items():
        assert defaults[name] == value
    for name in ("num_layers", "num_heads", "num_kv_heads", "embed_dim", "hidden_dim"):
        assert defaults[name] is MISSING
    config = MobileLLMConfig(**SMALL)
    assert config["vocab_size"] == config.vocab_size == 101
    with pytest.raises(KeyError):
        config["to_spec"]


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width"),
    [("140m", 15, 9, 576), ("360m", 15, 16, 1024), ("950m", 22, 24, 1536), ("7b", 32, 32, 4096), ("70b", 80, 64, 8192)],
)
def test_predefined_configs(name: str, layers: int, heads: int, width: int) -> None:
    config = get_mobilellm_config(name)
    assert (config.num_layers, config.num_heads, config.embed_dim) == (layers, heads, width)
    assert (config.max_seq_len, config.rope_base, config.vocab_size) == (32768, 500000, 128256)
    assert get_mobilellm_config(name.upper()) == config


def test_the_documented_950m() -> None:
    """The example of the documentation is the predefined configuration."""
    written = MobileLLMConfig(
        vocab_size=128256, num_layers=22, num_heads=24, num_kv_heads=6, embed_dim=1536, hidden_dim=6144,
        max_seq_len=32768, rope_base=500000, use_qk_norm=True, tie_word_embeddings=True,
    )  # fmt: skip
    assert written.to_spec() == get_mobilellm_config("950m").to_spec()


def test_wrong_configs() -> None:
    with pytest.raises(TritiumError, match="unknown size '951m'; did you mean 950m"):
        get_mobilellm_config("951m")
    with pytest.raises(TritiumError, match=r"dropout must be 0 or more and below 1, got 1\.0"):
        MobileLLM(MobileLLMConfig(**SMALL, dropout=1.0))
    with pytest.raises(TritiumError, match=r"embed_dim \(50\) must be a multiple of num_heads \(6\)"):
        MobileLLM(MobileLLMConfig(**{**SMALL, "embed_dim": 50}))
    with pytest.raises(TritiumError, match=r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"):
        MobileLLM(MobileLLMConfig(**{**SMALL, "num_kv_heads": 4}))


def test_forward_gives_loss_logits_and_hidden_states(model: MobileLLM) -> None:
    x = torch.randint(0, 101, (2, 9))
    out = model(x, attention_mask=torch.ones_like(x), labels=x)
    assert out.logits.shape == (2, 9, 101)
    torch.testing.assert_close(out.logits, out.hidden_states @ model.embedding.weight.t())
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert model(x).loss is None
    assert list(inspect.signature(model.forward).parameters) == [
        "input_ids",
        "attention_mask",
        "labels",
        "return_logits",
    ]
    without = model(x, labels=x, return_logits=False)
    assert without.logits is None
    torch.testing.assert_close(without.loss, expected)
    torch.testing.assert_close(without.hidden_states, out.hidden_states)
    assert torch.equal(model(x, return_logits=False).hidden_states, out.hidden_states)


def test_nothing_to_predict_is_a_loss_of_zero(model: MobileLLM) -> None:
    x = torch.randint(0, 101, (2, 5))
    assert model(x, labels=torch.full_like(x, -100)).loss == 0
    assert model(x[:, :1], labels=x[:, :1]).loss == 0


def test_generate_signature(model: MobileLLM) -> None:
    parameters = inspect.signature(model.generate).parameters
    assert list(parameters)[:4] == ["input_ids", "max_new_tokens", "temperature", "top_p"]
    assert [parameters[name].default for name in list(parameters)[1:4]] == [100, 1.0, 0.9]
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, temperature=1.0, top_p=0.9)
    assert out.shape == (1, 8)
    assert out[0, :3].tolist() == [1, 2, 3]


def test_num_parameters(model: MobileLLM) -> None:
    layer = 48 * (6 + 2 * 2) * 8 + 48 * 48 + 3 * 48 * 64 + 2 * 48
    assert model.num_parameters() == 101 * 48 + 2 * layer + 48


def test_gradient_checkpointing_keeps_loss_and_gradients(model: MobileLLM) -> None:
    x = torch.randint(0, 101, (2, 9))
    found = []
    for enable in (False, True):
        model.enable_gradient_checkpointing(enable)
        model.zero_grad()
        loss = model(x, labels=x).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    model.enable_gradient_checkpointing(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_gradient_checkpointing_recomputes(model: MobileLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    run = layers.run_layer
    monkeypatch.setattr(layers, "run_layer", lambda *arguments: calls.append(1) or run(*arguments))
    x = torch.randint(0, 101, (1, 5))
    for enable, expected in ((False, 2), (True, 4)):
        calls.clear()
        model.enable_gradient_checkpointing(enable)
        model(x, labels=x).loss.backward()
        assert len(calls) == expected
    model.enable_gradient_checkpointing(False)


def test_half_precision_activations_under_float32_weights() -> None:
    """Statistics are float32 whatever the weights are: squares of fp16 activations would overflow."""
    out = RMSNorm(4096)(torch.full((1, 4096), 1100.0, dtype=torch.float16))
    assert torch.equal(out, torch.ones_like(out))


def test_a_model_on_meta_and_a_traced_one() -> None:
    with torch.device("meta"):
        assert MobileLLM(MobileLLMConfig(**SMALL)).num_parameters() > 0
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    rotary = layers.RotaryEmbedding(8, 1e4, 16)
    with FakeTensorMode():
        assert isinstance(rotary.table(torch.device("cpu")), FakeTensor)
    assert not isinstance(rotary.table(torch.device("cpu")), FakeTensor)


def test_layers_alone(model: MobileLLM) -> None:
    """The promised constructors give layers that compose to the model."""
    norm = RMSNorm(dim=48, eps=1e-5)
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (48,), eps=1e-5))
    config = MobileLLMConfig(**SMALL)
    attention = MultiHeadAttention(
        embed_dim=48, num_heads=6, num_kv_heads=2, use_qk_norm=True, rope_base=500000, max_seq_len=128
    )
    ffn = FeedForward(embed_dim=48, hidden_dim=64)
    block = TransformerBlock(config, layer_idx=0)
    attention.load_state_dict(block.attention.state_dict())
    ffn.load_state_dict(block.mlp.state_dict())
    stream = x + attention(norm(x))
    torch.testing.assert_close(block(x), stream + ffn(norm(stream)), atol=1e-5, rtol=1e-5)
    decoder = TransformerDecoder(config)
    decoder.load_state_dict(model.stack.state_dict())
    ids = torch.randint(0, 101, (2, 7))
    torch.testing.assert_close(decoder(model.embedding(ids)), model(ids).hidden_states)


@pytest.mark.parametrize("make", [MultiHeadAttention, TransformerBlock, TransformerDecoder])
def test_layers_take_a_padding_mask(make: Any) -> None:
    """Padded rows equal the rows alone and are zero where padded, whatever lies there."""
    layer = make(48, 6, 2) if make is MultiHeadAttention else make(MobileLLMConfig(**SMALL))
    x, mask = torch.randn(2, 6, 48), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    x[mask == 0] = float("nan")
    out = layer(x, attention_mask=mask)
    torch.testing.assert_close(out[0, 2:], layer(x[:1, 2:])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[1, :3], layer(x[1:, :3])[0], atol=1e-5, rtol=1e-5)
    assert not out[mask == 0].any()
    with pytest.raises(TritiumError, match=r"attention_mask: must be \[batch, length\] = \[2, 6\], got \[2, 5\]"):
        layer(x, attention_mask=mask[:, 1:])


def test_multi_head_attention_defaults_to_as_many_kv_heads() -> None:
    assert MultiHeadAttention(48, 6).num_kv_heads == 6
    with pytest.raises(ValueError, match="must be a multiple"):
        MultiHeadAttention(48, 6, 4)
    with pytest.raises(ValueError, match="must be a multiple"):
        MultiHeadAttention(50, 6)


def test_public_names_resolve() -> None:
    for name in ("load", "load_pretrained_model", "load_config", "load_model", "TextGenerator", "load_qwen3",
                 "load_mobilellm", "SamplingOptions", "ModelSpec", "Tokenizer", "save_pretrained"):  # fmt: skip
        assert callable(getattr(tritium, name)), name
    assert tritium.load_qwen3.args == ("qwen3",)
    with pytest.raises(AttributeError, match="load_qwen4"):
        tritium.load_qwen4  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        tritium.lod  # noqa: B018
    assert list(inspect.signature(tritium.load_pretrained_model).parameters)[:3] == ["model_type", "size", "variant"]
    assert layers.RMSNorm is RMSNorm


def test_random_model_from_a_yaml() -> None:
    """load_config and load_model, as the documentation shows them; a spec reads like a mapping."""
    config = tritium.load_config("models/qwen3/0.6B.yaml")
    assert config["vocab_size"] == config.vocab_size == 151936
    small = config.replace(vocab_size=300, num_layers=2, embedding_dim=64, hidden_dim=96, context_length=64)
    model = tritium.load_model(small, "qwen3", device="cpu")
    x = torch.randint(0, config["vocab_size"] and 300, (2, 10))
    assert model(x).logits.shape == (2, 10, 300)
    again = tritium.load_model(small, "qwen3", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert 0.018 < model.embedding.weight.std().item() < 0.022
