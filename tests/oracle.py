"""Tiny checkpoints made by `transformers` with every parameter redrawn: the truth that the runtime must reproduce.

A freshly initialised model hides defects: its norms are all one, its logits nearly flat. Here norms vary by 0.3 around
one, attention is far from uniform, and logits have a spread above one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

VOCAB = 211
CONTEXT = 400


@dataclass(frozen=True)
class Case:
    """One shape of one family."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    sharded: bool = False
    hidden: int = 48
    ffn: int = 72
    layers: int = 3

    def __str__(self) -> str:
        tied, sharded = "tied" if self.tied else "untied", "-sharded" if self.sharded else ""
        return f"{self.family}-{self.heads}x{self.kv_heads}x{self.head_dim}-{tied}{sharded}"


CASES = [
    Case("qwen3", 4, 4, 16, tied=True),
    Case("qwen3", 6, 2, 64, tied=False),
    Case("qwen3", 4, 1, 56, tied=True, sharded=True),
    Case("qwen3", 8, 1, 128, tied=False, sharded=True),
    Case("mobilellm", 4, 4, 16, tied=True),
    Case("mobilellm", 9, 3, 64, tied=True),
    Case("mobilellm", 8, 2, 56, tied=False, sharded=True),
    Case("mobilellm", 8, 1, 128, tied=True),
]


def build(case: Case, seed: int = 0, no_rope_layers: list[int] | None = None) -> PreTrainedModel:
    """A float32 `transformers` model of this shape, redrawn."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": case.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    model: PreTrainedModel
    if case.family == "qwen3":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        model = Qwen3ForCausalLM(Qwen3Config(intermediate_size=case.ffn, rope_parameters=rope, **shape))
    else:
        config = Llama4TextConfig(
            intermediate_size=8 * case.ffn,  # a decoy, as in the published files
            intermediate_size_mlp=case.ffn,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
            use_qk_norm=True,
            attn_temperature_tuning=False,
            moe_layers=[],
            interleave_moe_layer_step=0,
            num_local_experts=0,
            num_experts_per_tok=0,
            no_rope_layers=no_rope_layers
            or [1] * (case.layers + 2),  # longer than the layers, as in the published 360M
            layer_types=["full_attention"] * case.layers,
            **shape,
        )
        model = Llama4ForCausalLM(config)
    redraw(model, seed)
    return model.float().eval()


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int, strength: float = 1.2) -> None:
    """Every parameter anew: norms 1 +- 0.3, biases +- 0.3, matrices so that each layer changes its stream by a lot."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
        else:
            # The head sets the logits' spread; strong projections keep the stream from being its own embedding.
            gain = 1.15 if "embed" in name or "lm_head" in name else strength
            parameter.copy_(gain * noise / parameter.shape[-1] ** 0.5)


def save(case: Case, model: PreTrainedModel, directory: Path) -> Path:
    """The checkpoint as `transformers` writes it, in several shards where the case says so."""
    model.save_pretrained(directory, max_shard_size="40KB" if case.sharded else "5GB")
    assert (directory / "model.safetensors.index.json").is_file() == case.sharded
    return directory


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
