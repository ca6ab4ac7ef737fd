"""GPT by its own names: a config dataclass and the model class."""

from dataclasses import dataclass
from typing import Any, Literal

from .decoder import Decoder
from .errors import TritiumError
from .registry import get_family
from .spec import ModelSpec


@dataclass
class GPTConfig:
    """A GPT architecture. `config["n_embd"]` reads the same as `config.n_embd`.

    Learned positions, layer norm before (or after) each half of a block, and a feed-forward of two layers.
    """

    vocab_size: int
    block_size: int  # longest sequence, in tokens
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int | None = None  # width of the feed-forward; None: 4 * n_embd
    activation: Literal["relu", "gelu", "gelu_tanh"] = "relu"
    residual: Literal["pre_norm", "post_norm"] = "pre_norm"
    bias: bool = True  # in the projections; layer norms have one always
    tie_word_embeddings: bool = True
    dropout: float = 0.0  # in training: of the embedding and of what each layer adds to the stream
    norm_eps: float = 1e-5

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in self.__dataclass_fields__

    def to_spec(self) -> ModelSpec:
        """The spec that the decoder is built from. Raises TritiumError for sizes that do not fit together."""
        where = "GPTConfig"
        if self.n_head < 1 or self.n_embd % self.n_head:
            raise TritiumError(f"{where}: n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        values = {
            "vocab_size": self.vocab_size,
            "context_length": self.block_size,
            "embedding_dim": self.n_embd,
            "num_layers": self.n_layer,
            "num_heads": self.n_head,
            "num_kv_heads": self.n_head,
            "head_dim": self.n_embd // self.n_head,
            "hidden_dim": 4 * self.n_embd if self.n_inner is None else self.n_inner,
            "activation": self.activation,
            "residual": self.residual,
            "qkv_bias": self.bias,
            "out_bias": self.bias,
            "mlp_bias": self.bias,
            "norm_eps": self.norm_eps,
            "tie_embeddings": self.tie_word_embeddings,
            "dropout": self.dropout,
            "dtype": "float32",
        }
        return get_family("gpt").spec_from(values, where)


class GPT(Decoder):
    """The decoder, built from a GPTConfig with random weights; `tritium.load_gpt` gives GPT-2's."""

    def __init__(self, config: GPTConfig, backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.initialise()
