"""Tiny checkpoints made by `transformers` with every parameter redrawn: the truth that the runtime must reproduce.

A freshly initialised model hides defects: its norms are all one, its logits nearly flat. Here norms vary by 0.3 around
one, attention is far from uniform, and logits have a spread above one.

Two families are not in `transformers`. Qwen1 is its Qwen2, the first MobileLLM its Llama, on the same weights: their
checkpoints are written here, in their own layout (`own_layout`).
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor

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
    what: str = ""  # what else is special of it: see `build`

    def __str__(self) -> str:
        tied, sharded = "tied" if self.tied else "untied", "-sharded" if self.sharded else ""
        what = f"-{self.what}" if self.what else ""
        return f"{self.family}-{self.heads}x{self.kv_heads}x{self.head_dim}-{tied}{sharded}{what}"

    @property
    def rotates_in_float32(self) -> bool:
        return self.family in ("mobilellm", "qwen1")


CASES = [
    Case("qwen3", 4, 4, 16, tied=True),
    Case("qwen3", 6, 2, 64, tied=False),
    Case("qwen3", 4, 1, 56, tied=True, sharded=True),
    Case("qwen3", 8, 1, 128, tied=False, sharded=True),
    Case("mobilellm", 4, 4, 16, tied=True),
    Case("mobilellm", 9, 3, 64, tied=True),
    Case("mobilellm", 8, 2, 56, tied=False, sharded=True),
    Case("mobilellm", 8, 1, 128, tied=True),
    Case("mobilellm1", 3, 1, 16, tied=True),
    Case("mobilellm1", 6, 2, 8, tied=True, layers=2, what="shared"),
    Case("llama", 3, 3, 16, tied=True, sharded=True),
    Case("llama", 6, 2, 8, tied=False, what="biased"),
    Case("qwen2", 6, 2, 8, tied=False),
    Case("qwen2", 4, 1, 12, tied=True),
    Case("qwen1", 3, 3, 16, tied=False),
    Case("qwen3_moe", 6, 2, 16, tied=False),
    Case("qwen3_moe", 4, 1, 16, tied=True, sharded=True, layers=4, what="mixed"),
    Case("gpt", 4, 4, 12, tied=True),
    Case("gpt", 3, 3, 16, tied=False, sharded=True, what="relu"),
]


def build(case: Case, seed: int = 0, no_rope_layers: list[int] | None = None, **changes: Any) -> hf.PreTrainedModel:
    """A float32 `transformers` model of this shape, redrawn. `changes` are laid over its configuration."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "intermediate_size": case.ffn,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": case.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_implementation": "eager",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kinds: dict[str, tuple[type, type]] = {
        "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config),
        "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig),
        "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
        "qwen1": (hf.Qwen2ForCausalLM, hf.Qwen2Config),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig),
        "mobilellm1": (hf.LlamaForCausalLM, hf.LlamaConfig),
        "mobilellm": (hf.Llama4ForCausalLM, hf.Llama4TextConfig),
        "gpt": (hf.GPT2LMHeadModel, hf.GPT2Config),
    }
    if case.family == "mobilellm":
        shape |= {
            "intermediate_size": 8 * case.ffn,  # a decoy, as in the published files
            "intermediate_size_mlp": case.ffn,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
            "use_qk_norm": True,
            "attn_temperature_tuning": False,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            # longer than the layers, as in the published 360M
            "no_rope_layers": no_rope_layers or [1] * (case.layers + 2),
            "layer_types": ["full_attention"] * case.layers,
        }
    elif case.family == "qwen3_moe":
        mixed = {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False, "num_experts_per_tok": 2}
        shape |= {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
        shape |= mixed if case.what == "mixed" else {}
    elif case.family == "gpt":
        for name in ("num_key_value_heads", "head_dim", "intermediate_size", "rope_parameters"):
            del shape[name]
        shape |= {"n_inner": case.ffn if case.what == "relu" else None}
        shape |= {"activation_function": "relu" if case.what == "relu" else "gelu_new"}
    elif case.what == "biased":
        shape |= {"attention_bias": True, "mlp_bias": True}
    elif case.what == "shared":
        shape["num_hidden_layers"] *= 2
    model_kind, config_kind = kinds[case.family]
    model: hf.PreTrainedModel = model_kind(config_kind(**{**shape, **changes}))
    # Twice the layers add to the rounding; a layer norm leaves less of a layer's work in the stream.
    redraw(model, seed, {"shared": 1.0}.get(case.what, 2.0 if case.family == "gpt" else 1.2))
    if case.what == "shared":  # every second layer is the one before it
        for first, second in zip(model.model.layers[::2], model.model.layers[1::2], strict=True):
            for name, parameter in first.named_parameters():
                module = second.get_submodule(name.rpartition(".")[0])
                setattr(module, name.rpartition(".")[2], parameter)
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
            ends = any(word in name for word in ("embed", "lm_head", "wte", "wpe"))
            width = parameter.shape[0 if ".c_" in name else -1]  # GPT-2's are [in, out]
            parameter.copy_((1.15 if ends else strength) * noise / width**0.5)


def own_layout(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's named tensors (parameters or gradients) as the family's published checkpoints call and shape them."""
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if case.family == "gpt":
            own[name.removeprefix("transformer.")] = tensor
        elif case.family == "qwen3_moe" and ".mlp.experts." in name:
            for expert, matrix in enumerate(tensor):
                stem = name.replace("experts.", f"experts.{expert}.")
                if name.endswith("gate_up_proj"):
                    for part, rows in zip(("gate", "up"), matrix.chunk(2), strict=True):
                        own[stem.replace("gate_up_proj", f"{part}_proj.weight")] = rows
                else:
                    own[f"{stem}.weight"] = matrix
        elif case.what == "shared" and name.startswith("model.layers."):
            number = name.split(".")[2]
            own[name.replace(f"layers.{number}.", f"layers.{int(number) // 2}.")] = tensor
        else:
            own[name] = tensor
    return _qwen1(case, own) if case.family == "qwen1" else own


QWEN1 = {
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip


def _qwen1(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for layer in range(case.layers):
        ours, theirs = f"transformer.h.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            own[f"{ours}attn.c_attn.{kind}"] = torch.cat(parts)
        own |= {f"{ours}{to}.weight": tensors[f"{theirs}{name}.weight"] for name, to in QWEN1.items()}
    return own


def own_config(case: Case) -> dict[str, Any] | None:
    """The config.json of a family that `transformers` does not have, with the published files' decoys."""
    if case.family == "mobilellm1":
        return {
            "model_type": "mobilellm", "hidden_size": case.hidden, "num_hidden_layers": case.layers,
            "num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "head_dim": case.head_dim,
            "intermediate_size": case.ffn, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT,
            "rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "share_embedding": True,
            "layer_sharing": case.what == "shared", "use_cache": False, "torch_dtype": "float32",
        }  # fmt: skip
    if case.family == "qwen1":
        return {
            "model_type": "qwen", "hidden_size": case.hidden, "num_hidden_layers": case.layers,
            "num_attention_heads": case.heads, "kv_channels": case.head_dim, "intermediate_size": 2 * case.ffn,
            "vocab_size": VOCAB, "seq_length": 128, "max_position_embeddings": CONTEXT, "rotary_emb_base": 10000,
            "rotary_pct": 1.0, "no_bias": True, "scale_attn_weights": True, "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-6, "use_dynamic_ntk": True, "use_logn_attn": True, "bf16": False, "fp16": False,
            "fp32": False, "use_flash_attn": "auto", "torch_dtype": "float32",
        }  # fmt: skip
    return None


def save(case: Case, model: hf.PreTrainedModel, directory: Path) -> Path:
    """The checkpoint as `transformers`, or whoever published the family, writes it; in several shards where the case
    says so.
    """
    if (config := own_config(case)) is None:
        model.save_pretrained(directory, max_shard_size="40KB" if case.sharded else "5GB")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        state = own_layout(case, dict(model.named_parameters()))
        save_file({name: tensor.detach().clone() for name, tensor in state.items()}, directory / "model.safetensors")
    assert (directory / "model.safetensors.index.json").is_file() == case.sharded
    return directory


def again(case: Case, model: hf.PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """What `transformers` reads from a saved checkpoint, or the file's tensors where it does not know the family."""
    if own_config(case) is None:
        read = type(model).from_pretrained(directory, attn_implementation="eager")
        return own_layout(case, dict(read.named_parameters()))
    from safetensors.torch import load_file

    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def copied(model: hf.PreTrainedModel, dtype: torch.dtype) -> hf.PreTrainedModel:
    """The model in another dtype, the first as it was."""
    return copy.deepcopy(model).to(dtype)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
