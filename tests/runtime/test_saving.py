"""Saving refuses what it cannot express, and leaves nothing of an earlier save behind."""

from pathlib import Path

import pytest
import torch
from tritium.models import MobileLLM, MobileLLMConfig
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import generate
from tritium.runtime.kv_cache import KVCache

import tritium

SMALL = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "hidden_dim": 48, "vocab_size": 90}


def small(seed: int) -> Decoder:
    return MobileLLM(MobileLLMConfig(**SMALL, max_seq_len=64)).initialise(0.2, seed)


@pytest.mark.parametrize(("first", "second"), [(10_000, 10**9), (10**9, 10_000)])
def test_the_last_save_is_what_loads(tmp_path: Path, first: int, second: int) -> None:
    """Shards of an earlier save, or its single file, do not outlive a save in the other form."""
    from transformers import Llama4ForCausalLM

    old, new = small(1), small(2)
    tritium.save_pretrained(old, tmp_path, torch.float32, first)
    tritium.save_pretrained(new, tmp_path, torch.float32, second)
    loaded, _, _ = tritium.load(tmp_path, device="cpu")
    assert torch.equal(loaded.embedding.weight, new.embedding.weight)
    theirs = Llama4ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.get_input_embeddings().weight, new.embedding.weight)


def test_a_trait_without_a_config_key_is_refused(tmp_path: Path) -> None:
    model = MobileLLM(MobileLLMConfig(**SMALL, max_seq_len=64, use_qk_norm=False))
    with pytest.raises(TritiumError, match=r"mobilellm: its config\.json cannot express this model's qk_norm"):
        tritium.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_dtypes(tmp_path: Path) -> None:
    model = small(1)
    for name in ("bfloat16", torch.bfloat16):
        tritium.save_pretrained(model, tmp_path, name)
        assert tritium.load(tmp_path, device="cpu")[2].dtype == "bfloat16"
    with pytest.raises(TritiumError, match="dtype: checkpoints are written as bfloat16, float16, float32"):
        tritium.save_pretrained(model, tmp_path, "int8")
    with pytest.raises(TritiumError, match="dtype: checkpoints are written as bfloat16, float16, float32"):
        tritium.save_pretrained(model.double(), tmp_path)


def test_broken_weights_are_named_not_sampled() -> None:
    """Logits that are no numbers end generation with one line, greedy or sampled."""
    model = small(1)
    with torch.no_grad():
        model.stack.norm.weight[3] = float("nan")
    for temperature in (0.0, 1.0):
        options = tritium.SamplingOptions(3, temperature=temperature)
        with pytest.raises(TritiumError, match="the logits are not numbers"):
            list(generate(model, [[1, 2]], options))


def test_inference_mode_ends_at_each_token() -> None:
    """Whoever takes tokens one by one can train between two of them."""
    model = small(1)
    for _ in generate(model, [[1, 2]], tritium.SamplingOptions(3, temperature=0)):
        assert not torch.is_inference_mode_enabled()
        model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_out_of_memory_for_the_cache_says_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    config = small(1).config
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(TritiumError, match=r"keys and values of 3 x 60 tokens need 0\.0 GiB on cpu"):
        KVCache(config, 3, 60, torch.float32)


def test_without_a_number_the_context_is_the_limit() -> None:
    """The bundled model's context is no longer than chat's usual answer: its default must still answer."""
    model, tokenizer, spec = tritium.load("mobilellm:shakespeare", device="cpu")
    generator = tritium.TextGenerator(model, tokenizer, device="cpu")
    assert len(generator.chat("To be, or not to be", temperature=0)) > 100
    long = "thee " * 480
    assert spec.context_length - 60 < len(tokenizer.encode(long)) < spec.context_length
    assert isinstance(generator.generate(long, temperature=0), str)
    with pytest.raises(TritiumError, match="exceed the context length of 512"):
        generator.generate(long, max_new_tokens=100)
    with pytest.raises(TritiumError, match="exceed the context length of 512"):
        generator.generate(long * 2)
    with pytest.raises(TritiumError, match="device: meta holds no values"):
        tritium.TextGenerator(model, tokenizer, device="meta")


def test_chunked_attention_as_long_as_the_context_is_full() -> None:
    """A llama4_text config without layer_types means chunks; it loads only where chunks cover the context."""
    from tritium.runtime.hf_config import config_from_spec, spec_from_config
    from tritium.runtime.registry import get_family

    family, spec = get_family("mobilellm"), small(1).config
    config = {**config_from_spec(family, spec), "attention_chunk_size": 64}
    del config["layer_types"]
    assert spec_from_config(family, config, "config.json") == spec
    for size in (63, None):
        with pytest.raises(TritiumError, match="layer_types has 'chunked_attention'; only 'full_attention'"):
            spec_from_config(family, {**config, "attention_chunk_size": size}, "config.json")
