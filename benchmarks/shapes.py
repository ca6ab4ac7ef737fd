"""The shapes that are measured: those of published models, read from models/, and those of published figures."""

from functools import cache

from tritium.runtime.registry import get_family
from tritium.runtime.spec import ModelSpec

MODELS = {"qwen3 0.6B": ("qwen3", "0.6B"), "qwen3 8B": ("qwen3", "8B"), "mobilellm 950m": ("mobilellm", "950m")}
DECODED = {
    "qwen3 0.6B": ("qwen3", "0.6B"),
    "mobilellm 950m": ("mobilellm", "950m"),
    "qwen3 1.7B": ("qwen3", "1.7B"),
    "qwen3 8B": ("qwen3", "8B"),
    "qwen3 30B-A3B": ("qwen3", "30B-A3B"),
}
"""Whose decode steps are measured, the smallest first."""

SMALL = {"num_layers": 2, "vocab_size": 96, "context_length": 512, "embedding_dim": 32, "hidden_dim": 48}
TINY = {**SMALL, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
MIXTURE = {"num_experts": 8, "experts_per_token": 2, "expert_dim": 24}

ITEM = 2
"""Bytes an element as floors count them: bfloat16."""


@cache
def spec(name: str) -> ModelSpec:
    """A model of the lists by its name; `tiny` is a Qwen3 that a CPU manages in no time, and so is `tiny mixture`."""
    if name == "tiny":
        return get_family("qwen3").spec("0.6B").replace(**TINY)
    if name == "tiny mixture":
        return get_family("qwen3").spec("30B-A3B").replace(**TINY, **MIXTURE)
    family, size = {**MODELS, **DECODED}[name]
    return get_family(family).spec(size)


def projections(name: str) -> dict[str, tuple[int, int]]:
    """Each weight matrix of a layer and the head: (output features, input features)."""
    model = spec(name)
    return {
        "qkv": (model.query_dim + 2 * model.kv_dim, model.embedding_dim),
        "out": (model.embedding_dim, model.query_dim),
        "gate_up": (2 * model.hidden_dim, model.embedding_dim),
        "down": (model.embedding_dim, model.hidden_dim),
        "head": (model.vocab_size, model.embedding_dim),
    }
