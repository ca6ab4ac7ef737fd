"""The decoder's building blocks as modules: usable alone, and what the decoder is assembled from."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from ..kernels.rms_norm import scaled
from . import plan
from .backend import Backend
from .batch import Batch, Padding
from .errors import TritiumError, nearest
from .kernel_set import KernelSet, normalise
from .parallel.exchange import Exchange
from .quantisation import QuantisedLinear
from .rope import RotaryEmbedding
from .spec import ModelSpec

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]  # of a layer's forward, of its recomputation
KEPT = ("nothing", "attention", "products")
"""What gradient checkpointing may keep of a layer besides its input."""

AUTO = Backend()
"""What a layer used alone runs on, but for a norm of its own or at its end: those are plain PyTorch."""


def as_spec(config: Any) -> ModelSpec:
    """A ModelSpec from a spec or from anything with `to_spec()`, such as MobileLLMConfig."""
    return config if isinstance(config, ModelSpec) else config.to_spec()


class Layer(nn.Module):
    """What a block is made of: its plans hold the parameters as they are, or in the dtype that was asked for."""

    compute_dtype: torch.dtype | None = None
    """What plans hold, where that is not the parameters' own dtype: training computes in bfloat16 over float32 ones."""

    def cast(self, parameter: Tensor) -> Tensor:
        return parameter if self.compute_dtype is None else parameter.to(self.compute_dtype)

    def dense(self, linear: nn.Linear | QuantisedLinear) -> plan.Dense:
        if isinstance(linear, QuantisedLinear):
            return linear.bind()
        weight, bias = self.cast(linear.weight), None if linear.bias is None else self.cast(linear.bias)
        adapter = getattr(linear, "adapter", None)
        return plan.Dense(weight, bias) if adapter is None else adapter.bind(weight, bias)


class RMSNorm(Layer):
    """Root-mean-square norm over the last dimension, `dim` wide: see kernels/rms_norm.py."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return normalise(x, self.bind())[1]

    def bind(self, replaces_stream: bool = False) -> plan.Norm:
        weight = self.cast(self.weight)
        prepared = scaled(weight, self.eps, weight, weight.shape[0])
        return plan.Norm("rms", weight, None, self.eps, prepared, replaces_stream)


class LayerNorm(Layer):
    """Layer norm over the last dimension, `dim` wide: see kernels/layer_norm.py."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return normalise(x, self.bind())[1]

    def bind(self, replaces_stream: bool = False) -> plan.Norm:
        return plan.Norm("layer", self.cast(self.weight), self.cast(self.bias), self.eps, None, replaces_stream)


class MultiHeadAttention(Layer):
    """Causal self-attention with grouped key/value heads, rotary positions and QK-norm.

    `num_kv_heads=None` gives every query head its own. The keyword-only arguments are the traits in which families
    differ; their defaults are MobileLLM's. `rotary` shares one table of angles between layers.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        use_qk_norm: bool = True,
        rope_base: float = 500000.0,
        max_seq_len: int = 32768,
        *,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        qk_norm_weighted: bool = False,
        qk_norm_first: bool = False,
        use_rope: bool = True,
        rope_in_float32: bool = True,
        qkv_bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim ({embed_dim}) must be a multiple of num_heads ({num_heads})")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.norm_eps = norm_eps
        self.use_qk_norm = use_qk_norm
        self.qk_norm_first = qk_norm_first
        self.rope_in_float32 = rope_in_float32
        self.window = window
        self.rotary = (rotary or RotaryEmbedding(self.head_dim, rope_base, max_seq_len)) if use_rope else None
        packed = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.qkv: nn.Linear | QuantisedLinear = nn.Linear(embed_dim, packed, bias=qkv_bias)
        self.out = nn.Linear(self.num_heads * self.head_dim, embed_dim, bias=out_bias)
        weighted = use_qk_norm and qk_norm_weighted
        self.q_norm = RMSNorm(self.head_dim, norm_eps) if weighted else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps) if weighted else None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S, embed_dim], mask [B, S] with 1 at real tokens -> [B, S, embed_dim], zeros at the padding."""
        padding = Padding.of(hidden_states, attention_mask)
        batch = Batch.fresh(padding.counts, hidden_states.device)
        attention = self.bind(0)
        kernels = AUTO.kernels(hidden_states, self.parameters())
        _, qkv = kernels.norm_linear(padding.pack(hidden_states), None, self.dense(self.qkv))
        out = kernels.attention(*kernels.qk_norm_rope_cache(qkv, attention, batch), attention, batch)
        return padding.unpack(kernels.norm_linear(out, None, self.dense(self.out))[1])

    def bind(self, slot: int) -> plan.Attention:
        weight = None
        if self.q_norm is not None and self.k_norm is not None:
            weight = torch.cat(
                (self.q_norm.weight.expand(self.num_heads, -1), self.k_norm.weight.expand(self.num_kv_heads, -1))
            )
        like = self.qkv.like if isinstance(self.qkv, QuantisedLinear) else self.qkv.weight
        like = like if self.compute_dtype is None else like.new_empty(0, dtype=self.compute_dtype)
        weight = None if weight is None else self.cast(weight)
        return plan.Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            scale=self.head_dim**-0.5,
            rotary=self.rotary,
            rope_dtype=torch.float32 if self.rope_in_float32 and like.dtype != torch.float64 else like.dtype,
            qk_norm=self.use_qk_norm,
            qk_norm_first=self.qk_norm_first,
            qk_norm_weight=weight,
            qk_norm_scaled=scaled(weight, self.norm_eps, like, self.head_dim) if self.use_qk_norm else None,
            eps=self.norm_eps,
            window=self.window,
            slot=slot,
        )


class FeedForward(Layer):
    """The position-wise network: gated (SwiGLU, gate and up packed in one projection) or plain (one activation)."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        mlp: Literal["gated", "plain"] = "gated",
        activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.activation = activation
        self.up = nn.Linear(embed_dim, 2 * hidden_dim if mlp == "gated" else hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, embed_dim, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., embed_dim] -> [..., embed_dim]."""
        kernels = AUTO.kernels(hidden_states, self.parameters())
        _, hidden = kernels.norm_gate_up_act(hidden_states.flatten(0, -2), None, self.bind())
        out = kernels.norm_linear(hidden, None, self.dense(self.down))[1]
        return out.unflatten(0, hidden_states.shape[:-1])

    def bind(self) -> plan.Mlp:
        return plan.Mlp(self.mlp, self.activation, self.dense(self.up), self.dense(self.down))


class MixtureOfExperts(Layer):
    """Gated feed-forwards, `experts_per_token` of which a router picks for each token: see kernels/routing.py."""

    def __init__(
        self, embed_dim: int, expert_dim: int, num_experts: int, experts_per_token: int, renormalise: bool = True
    ) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.renormalise = renormalise
        self.router = nn.Linear(embed_dim, num_experts, bias=False)
        self.up = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, embed_dim))
        self.down = nn.Parameter(torch.empty(num_experts, embed_dim, expert_dim))
        for weight in (self.up, self.down):  # as nn.Linear draws its own
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., embed_dim] -> [..., embed_dim]."""
        kernels = AUTO.kernels(hidden_states, self.parameters())
        flat = hidden_states.flatten(0, -2)
        out = kernels.norm_experts(flat, None, self.bind(), flat.new_zeros(flat.shape))
        return out.view(hidden_states.shape)

    def bind(self) -> plan.Experts:
        router, up, down = self.dense(self.router), self.cast(self.up), self.cast(self.down)
        return plan.Experts(router, up, down, self.experts_per_token, self.renormalise)


class TransformerBlock(Layer):
    """One decoder layer: attention and feed-forward, each with its norm and residual connection."""

    def __init__(self, config: Any, layer_idx: int = 0, *, rotary: RotaryEmbedding | None = None) -> None:
        super().__init__()
        spec = as_spec(config)
        if not 0 <= layer_idx < spec.num_layers:
            raise TritiumError(f"layer_idx: must be 0 to {spec.num_layers - 1}, got {layer_idx}")
        norm = RMSNorm if spec.norm == "rms" else LayerNorm
        self.post_norm = spec.residual == "post_norm"
        self.dropout = spec.dropout
        self.repeats = spec.layer_repeat
        self.recomputing: Callable[[], Contexts] | None = None
        self.exchange: Exchange | None = None
        self.attention_norm = norm(spec.embedding_dim, spec.norm_eps)
        self.attention = MultiHeadAttention(
            spec.embedding_dim,
            spec.num_heads,
            spec.num_kv_heads,
            use_qk_norm=spec.qk_norm != "none" and spec.qk_norm_layers[layer_idx],
            head_dim=spec.head_dim,
            norm_eps=spec.norm_eps,
            qk_norm_weighted=spec.qk_norm == "weighted",
            qk_norm_first=spec.qk_norm_position == "before_rope",
            use_rope=spec.positions == "rope" and spec.rope_layers[layer_idx],
            rope_in_float32=spec.rope_dtype == "float32",
            qkv_bias=spec.qkv_bias,
            out_bias=spec.out_bias,
            window=spec.windows[layer_idx],
            rotary=rotary or rotary_of(spec),
        )
        self.mlp_norm = norm(spec.embedding_dim, spec.norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if spec.expert_layers[layer_idx]:
            self.mlp = MixtureOfExperts(
                spec.embedding_dim,
                spec.expert_dim,
                spec.num_experts,
                spec.experts_per_token,
                spec.renormalise_experts,
            )
        else:
            self.mlp = FeedForward(
                spec.embedding_dim, spec.hidden_dim, mlp=spec.mlp, activation=spec.activation, bias=spec.mlp_bias
            )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, S, embed_dim], mask [B, S] with 1 at real tokens -> [B, S, embed_dim], zeros at the padding."""
        padding = Padding.of(hidden_states, attention_mask)
        batch = Batch.fresh(padding.counts, hidden_states.device)
        layer, pending = self.bind(None, 0)
        x = run_layer(padding.pack(hidden_states), layer, batch, AUTO.kernels(hidden_states, self.parameters()))
        return padding.unpack(normalise(x, pending)[1])

    def bind(self, pending: plan.Norm | None, slot: int) -> tuple[plan.Layer, plan.Norm | None]:
        """This block's plan, and the norm that it leaves for whatever comes next.

        A post-norm block is a pre-norm block shifted by one: each norm moves to the start of the following phase,
        where its result also becomes the stream. `pending` is the norm that the block before left.
        """
        first, second = self.attention_norm.bind(self.post_norm), self.mlp_norm.bind(self.post_norm)
        norms = (pending, first, second) if self.post_norm else (first, second, None)
        layer = plan.Layer(
            attention_norm=norms[0],
            qkv=self.dense(self.attention.qkv),
            attention=self.attention.bind(slot),
            out=self.dense(self.attention.out),
            mlp_norm=norms[1],
            mlp=self.mlp.bind(),
            dropout=self.dropout if self.training else 0.0,
            exchange=self.exchange,
        )
        return layer, norms[2]

    def advance(
        self, x: Tensor, pending: plan.Norm | None, batch: Batch, kernels: KernelSet
    ) -> tuple[Tensor, plan.Norm | None]:
        """The stream [T, E] through all repeats of this block, and the norm that they leave.

        A forward without a cache goes from block to block by this, and not by one plan of all: each block reads its
        parameters inside its own call, where whatever shards, gathers or recomputes them can be at work.
        """
        if self.recomputing is None or not torch.is_grad_enabled():
            return self._advance(x, pending, batch, kernels)
        found: tuple[Tensor, plan.Norm | None] = checkpoint(
            self._advance, x, pending, batch, kernels, use_reentrant=False, context_fn=self.recomputing
        )
        return found

    def _advance(
        self, x: Tensor, pending: plan.Norm | None, batch: Batch, kernels: KernelSet
    ) -> tuple[Tensor, plan.Norm | None]:
        for _ in range(self.repeats):
            layer, pending = self.bind(pending, 0)
            x = run_layer(x, layer, batch, kernels)
        return x, pending


def run_layer(x: Tensor, layer: plan.Layer, batch: Batch, kernels: KernelSet) -> Tensor:
    """The stream [T, E] through one layer."""
    if layer.dropout or layer.exchange is not None:
        return _run_apart(x, layer, batch, kernels)
    stream, qkv = kernels.norm_linear(x, layer.attention_norm, layer.qkv)
    q, k, v = kernels.qk_norm_rope_cache(qkv, layer.attention, batch)
    stream = kernels.linear_residual(kernels.attention(q, k, v, layer.attention, batch), layer.out, stream)
    if isinstance(layer.mlp, plan.Experts):
        return kernels.norm_experts(stream, layer.mlp_norm, layer.mlp, None)
    stream, hidden = kernels.norm_gate_up_act(stream, layer.mlp_norm, layer.mlp)
    return kernels.linear_residual(hidden, layer.mlp.down, stream)


def _run_apart(x: Tensor, layer: plan.Layer, batch: Batch, kernels: KernelSet) -> Tensor:
    """The same where what each half adds to the stream must be made apart: it is dropped in training, or other
    processes hold the rest of it.
    """
    stream, y = _enter(x, layer.attention_norm, layer, kernels)
    _, qkv = kernels.norm_linear(y, None, layer.qkv)
    q, k, v = kernels.qk_norm_rope_cache(qkv, layer.attention, batch)
    attended = kernels.attention(q, k, v, layer.attention, batch)
    stream = stream + _added(attended, layer.out, layer, kernels)
    stream, y = _enter(stream, layer.mlp_norm, layer, kernels)
    if isinstance(layer.mlp, plan.Experts):
        given = kernels.norm_experts(y, None, layer.mlp, torch.zeros_like(y))
        given = given if layer.exchange is None else layer.exchange.leave(given)
        return stream + F.dropout(given, layer.dropout)
    _, hidden = kernels.norm_gate_up_act(y, None, layer.mlp)
    return stream + _added(hidden, layer.mlp.down, layer, kernels)


def _enter(x: Tensor, norm: plan.Norm | None, layer: plan.Layer, kernels: KernelSet) -> tuple[Tensor, Tensor]:
    """(stream, what a half of the layer takes)."""
    stream, y = kernels.norm(x, norm)
    return stream, y if layer.exchange is None else layer.exchange.enter(y)


def _added(x: Tensor, linear: plan.Dense, layer: plan.Layer, kernels: KernelSet) -> Tensor:
    """What a half's last projection adds to the stream. The bias is whole on every process: it comes after the sum."""
    if layer.exchange is None:
        added = kernels.norm_linear(x, None, linear)[1]
    else:
        added = layer.exchange.leave(kernels.norm_linear(x, None, replace(linear, bias=None))[1])
        added = added if linear.bias is None else added + linear.bias
    return F.dropout(added, layer.dropout)


def _keeping(what: str) -> Callable[[], Contexts]:
    """What `checkpoint` is to keep of a layer besides its input: the results of the operations named."""
    if what == "nothing":
        return noop_context_fn
    aten, ours = torch.ops.aten, torch.ops.tritium
    attention = [ours.attention_with_lse, aten._scaled_dot_product_flash_attention_for_cpu]
    attention += [aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention]
    attention += [aten._scaled_dot_product_cudnn_attention]
    products = [aten.mm, aten.addmm, ours.linear, ours.linear_residual, ours.grouped_linear]
    kept = attention if what == "attention" else [*attention, *products]

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = getattr(operation, "overloadpacket", None)
        return CheckpointPolicy.MUST_SAVE if packet in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def rotary_of(spec: ModelSpec) -> RotaryEmbedding:
    """The table of angles that all of a model's layers share."""
    return RotaryEmbedding(spec.head_dim, spec.rope_base, spec.context_length, spec.rope_scaling, spec.logn_length)


class TransformerDecoder(Layer):
    """The stack of blocks and the final norm (which a post-norm stack does not have: its last block ends in one)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        spec = as_spec(config)
        rotary = rotary_of(spec)
        self.layers = nn.ModuleList(TransformerBlock(spec, index, rotary=rotary) for index in range(spec.num_layers))
        self.norm: RMSNorm | LayerNorm | None = None
        if spec.residual == "pre_norm":
            self.norm = (RMSNorm if spec.norm == "rms" else LayerNorm)(spec.embedding_dim, spec.norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embedded tokens [B, S, embed_dim], mask [B, S] -> the same after the stack, zeros at the padding."""
        padding = Padding.of(hidden_states, attention_mask)
        batch = Batch.fresh(padding.counts, hidden_states.device)
        kernels = AUTO.kernels(hidden_states, self.parameters())
        x, norm = self.advance(padding.pack(hidden_states), batch, kernels)
        return padding.unpack(normalise(x, norm)[1])

    @property
    def blocks(self) -> Iterator[TransformerBlock]:
        for block in self.layers:
            assert isinstance(block, TransformerBlock)
            yield block

    def enable_gradient_checkpointing(self, enable: bool, keep: str) -> None:
        if keep not in KEPT:
            raise TritiumError(f"keep: unknown {keep!r}; {nearest(str(keep), KEPT)}")
        for block in self.blocks:
            block.recomputing = _keeping(keep) if enable else None

    def bind(self) -> tuple[tuple[plan.Layer, ...], plan.Norm | None]:
        """Every execution of a block in order, and the norm that comes last."""
        layers = []
        pending: plan.Norm | None = None
        for index, block in enumerate(self.blocks):
            for repeat in range(block.repeats):
                layer, pending = block.bind(pending, index * block.repeats + repeat)
                layers.append(layer)
        return tuple(layers), pending if self.norm is None else self.norm.bind()

    def run(self, x: Tensor, layers: tuple[plan.Layer, ...], batch: Batch, kernels: KernelSet) -> Tensor:
        """The stream [T, E] through all layers, before the final norm."""
        for layer in layers:
            x = run_layer(x, layer, batch, kernels)
        return x

    def advance(self, x: Tensor, batch: Batch, kernels: KernelSet) -> tuple[Tensor, plan.Norm | None]:
        """The same block by block, without a cache, and the norm that comes last: see TransformerBlock.advance."""
        pending: plan.Norm | None = None
        for block in self.blocks:
            x, pending = block.advance(x, pending, batch, kernels)
        return x, pending if self.norm is None else self.norm.bind()
