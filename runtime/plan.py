"""What the phases of a forward are given: the tensors and constants of one place in the decoder, as plain values.

Modules hold parameters; a plan holds references to them. A forward makes its plan first (`bind`), so that a hot decode
loop reads no module attribute, and nothing goes stale: the next `bind` sees whatever the parameters are by then.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.rms_norm import Scaled
from .parallel.exchange import Exchange
from .rope import RotaryEmbedding


@dataclass(frozen=True, slots=True)
class Dense:
    """An ordinary weight [N, K] and its bias [N], in the model's dtype."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class QuantisedDense(Dense):
    """A weight of 8 or 4 bits: `weight` has its values, as kernels/quantised_linear.py stores them."""

    scale: Tensor


@dataclass(frozen=True, slots=True)
class LowRank(Dense):
    """A weight with an adapter beside it: y = x W^T + bias + (dropout(x) A^T) B^T, from equation 3 of Hu et al. 2021
    (arXiv:2106.09685). The adapter's scale is in A.

    The parts of a packed weight have adapters of their own: their A lie one above the other, and each part's rows of B
    are zero but in the columns of its own A.
    """

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    dropout: float  # of what the adapter is given; 0 but in training


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation. With `replaces_stream` (post-norm) the residual stream goes on from its result."""

    kind: Literal["rms", "layer"]
    weight: Tensor
    bias: Tensor | None
    eps: float
    scaled: Scaled | None  # weight and eps prepared, where the dtype is float32
    replaces_stream: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention between the projections."""

    num_heads: int
    num_kv_heads: int
    scale: float
    rotary: RotaryEmbedding | None
    rope_dtype: torch.dtype
    qk_norm: bool
    qk_norm_first: bool
    qk_norm_weight: Tensor | None  # [num_heads + num_kv_heads, head_dim]
    qk_norm_scaled: Scaled | None  # the same with eps, prepared, where the dtype is float32
    eps: float
    window: int | None
    slot: int  # in the KV cache


@dataclass(frozen=True, slots=True)
class Mlp:
    """A feed-forward; `up` holds gate and up packed when gated."""

    kind: Literal["gated", "plain"]
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    up: Dense
    down: Dense


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of E gated feed-forwards, of which each token takes `per_token`."""

    router: Dense  # [E, hidden]
    up: Tensor  # [E, 2 F, hidden], gate first
    down: Tensor  # [E, hidden, F]
    per_token: int
    renormalise: bool


@dataclass(frozen=True, slots=True)
class Layer:
    """One execution of a block. `None` for a norm: the stream is used as it is."""

    attention_norm: Norm | None
    qkv: Dense
    attention: Attention
    out: Dense
    mlp_norm: Norm | None
    mlp: Mlp | Experts
    dropout: float  # of what both halves add to the stream; 0 but in training
    exchange: Exchange | None  # with the processes that hold the other parts of these weights; None: they are whole


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole decoder."""

    embedding: Tensor  # [V, E]
    positions: Tensor | None  # [context, E], learned positions
    layers: tuple[Layer, ...]
    norm: Norm | None
    head: Dense
