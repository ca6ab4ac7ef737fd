"""MobileLLM by its own names: a config dataclass, the predefined sizes and the model class."""

from dataclasses import dataclass
from typing import Any

from .decoder import Decoder
from .errors import TritiumError
from .registry import get_family
from .spec import ModelSpec


@dataclass
class MobileLLMConfig:
    """A MobileLLM architecture. `config["embed_dim"]` reads the same as `config.embed_dim`."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    hidden_dim: int  # of the feed-forward
    vocab_size: int = 128256
    max_seq_len: int = 32768
    rope_base: float = 500000.0
    use_qk_norm: bool = True
    tie_word_embeddings: bool = True
    dropout: float = 0.0  # in training: of the embedding and of what each layer adds to the stream
    norm_eps: float = 1e-5
    head_dim: int | None = None  # None: embed_dim / num_heads
    num_experts: int = 0  # above 0: every layer is a mixture of them instead of a feed-forward of hidden_dim
    experts_per_token: int = 0
    expert_dim: int = 0  # width of one expert

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.__dataclass_fields__

    def to_spec(self) -> ModelSpec:
        """The spec that the decoder is built from. Raises TritiumError for sizes that do not fit together."""
        where = "MobileLLMConfig"
        if self.num_heads < 1:
            raise TritiumError(f"{where}: num_heads must be above 0, got {self.num_heads}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise TritiumError(
                f"{where}: embed_dim ({self.embed_dim}) must be a multiple of num_heads ({self.num_heads})"
            )
        values = {
            "vocab_size": self.vocab_size,
            "context_length": self.max_seq_len,
            "embedding_dim": self.embed_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim or self.embed_dim // self.num_heads,
            "hidden_dim": self.hidden_dim,
            "norm_eps": self.norm_eps,
            "rope_base": self.rope_base,
            "rope_scaling": None,
            "tie_embeddings": self.tie_word_embeddings,
            "dropout": self.dropout,
            "dtype": "bfloat16",
        }
        if not self.use_qk_norm:
            values["qk_norm"] = "none"
        if self.num_experts or self.experts_per_token or self.expert_dim:
            values |= {
                "expert_layers": True,
                "num_experts": self.num_experts,
                "experts_per_token": self.experts_per_token,
                "expert_dim": self.expert_dim,
                "renormalise_experts": True,
            }
        return get_family("mobilellm").spec_from(values, where)


def get_mobilellm_config(name: str) -> MobileLLMConfig:
    """The predefined configuration of a size such as "950m". Raises TritiumError for an unknown one, and for a size of
    the first generation, which is another architecture: `tritium.load_config` reads those.
    """
    family = get_family("mobilellm")
    size = family.size_name(name)
    spec = family.spec(size)
    if spec.family != family.name:
        raise TritiumError(f"{size} is of the first generation: tritium.load_config('models/mobilellm/{size}.yaml')")
    return MobileLLMConfig(
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        embed_dim=spec.embedding_dim,
        hidden_dim=spec.hidden_dim,
        max_seq_len=spec.context_length,
        rope_base=spec.rope_base,
        use_qk_norm=spec.qk_norm != "none",
        tie_word_embeddings=spec.tie_embeddings,
        norm_eps=spec.norm_eps,
        head_dim=spec.head_dim,
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_dim=spec.expert_dim,
        dropout=spec.dropout,
    )


class MobileLLM(Decoder):
    """The decoder, built from a MobileLLMConfig with random weights; `tritium.load_mobilellm` gives trained ones."""

    def __init__(self, config: MobileLLMConfig, backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.initialise()
