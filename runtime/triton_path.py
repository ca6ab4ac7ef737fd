"""The phases of kernel_set.py composed of single operations: the Triton path, and whatever else has the operations.

With a cache, new keys and values go there and only there, and attention reads them there: the phases hand on None in
their place. Beyond what a batch and a table of angles hand to the device at first use, nothing here copies from the
host or waits for the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..kernels.linear import linear_reference, linear_residual_reference
from .batch import Batch
from .kernel_set import PLAIN_ACTIVATIONS, KernelSet, Loss, adapted, head_loss, mixture
from .plan import Attention, Dense, Experts, LowRank, Mlp, Norm, QuantisedDense

if TYPE_CHECKING:
    from .operations import Operations


@dataclass(frozen=True)
class Modes:
    """What is promised of bits. Same inputs give the same bits in every mode.

    batch_invariant: a sequence's bits do not depend on what else is in the batch. Without it, the linear layers are the
    vendor's, which choose another order of summation for another batch.
    sampler_equals_trainer: besides (it implies the former), a token decoded is the token prefilled and the token
    trained on, to the bit: decode attention then runs as a prefill of one query, in its order, and the loss's logits
    are no product of the vendor's.
    """

    batch_invariant: bool = True
    sampler_equals_trainer: bool = False


def compose(name: str, operations: "Operations", modes: Modes) -> KernelSet:
    """The phases over these operations."""
    own_linear = modes.batch_invariant or modes.sampler_equals_trainer
    product = operations.linear if own_linear else linear_reference
    product_onto = operations.linear_residual if own_linear else linear_residual_reference

    def normalise(x: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor]:
        if norm is None:
            return x, x
        if norm.kind == "rms":
            y = operations.rms_norm(x, norm.weight, norm.eps)
        else:
            y = operations.layer_norm(x, norm.weight, norm.bias, norm.eps)
        return (y if norm.replaces_stream else x), y

    def project(x: Tensor, linear: Dense) -> Tensor:
        if isinstance(linear, QuantisedDense):
            return operations.quantised_linear(x, linear.weight, linear.scale, linear.bias)
        return adapted(product(x, linear.weight, linear.bias), x, linear, product, product_onto)

    def norm_linear(x: Tensor, norm: Norm | None, linear: Dense) -> tuple[Tensor, Tensor]:
        stream, y = normalise(x, norm)
        return stream, project(y, linear)

    def qk_norm_rope_cache(
        qkv: Tensor, attention: Attention, batch: Batch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        table = positions = scale = None
        if attention.rotary is not None:
            table, positions, scale = batch.angles(attention.rotary)
        how = (
            qkv,
            attention.num_heads,
            attention.num_kv_heads,
            table,
            positions,
            attention.rope_dtype,
            attention.qk_norm,
            attention.qk_norm_weight,
            attention.eps,
            attention.qk_norm_first,
            scale,
        )
        if batch.cache is None:
            return operations.qk_norm_rope(*how)
        keys, values = batch.cache.keys[attention.slot], batch.cache.values[attention.slot]
        return operations.qk_norm_rope_cache(*how, keys, values, batch.slots), None, None

    def attend(q: Tensor, k: Tensor | None, v: Tensor | None, attention: Attention, batch: Batch) -> Tensor:
        scale, window = attention.scale, attention.window
        if batch.cache is None:
            return operations.attention(q, k, v, batch.device_starts, scale, window).flatten(1)
        keys, values = batch.cache.keys[attention.slot], batch.cache.values[attention.slot]
        table, lengths = batch.page_table, batch.device_lengths
        if batch.is_decode and not modes.sampler_equals_trainer:
            out = operations.decode_attention(q, keys, values, table, lengths, scale, window, batch.longest)
        else:
            out = operations.paged_attention(q, keys, values, table, batch.device_starts, lengths, scale, window)
        return out.flatten(1)

    def linear_residual(x: Tensor, linear: Dense, stream: Tensor) -> Tensor:
        if isinstance(linear, QuantisedDense):
            return stream + project(x, linear)
        return adapted(product_onto(x, linear.weight, linear.bias, stream), x, linear, product, product_onto)

    def norm_gate_up_act(x: Tensor, norm: Norm | None, mlp: Mlp) -> tuple[Tensor, Tensor]:
        stream, y = normalise(x, norm)
        if mlp.kind == "gated" and own_linear and not isinstance(mlp.up, LowRank | QuantisedDense):
            return stream, operations.linear_swiglu(y, mlp.up.weight, mlp.up.bias)
        hidden = project(y, mlp.up)
        if mlp.kind == "gated":
            return stream, operations.swiglu(hidden)
        return stream, PLAIN_ACTIVATIONS[mlp.activation](hidden)

    def norm_experts(x: Tensor, norm: Norm | None, experts: Experts, residual: Tensor | None) -> Tensor:
        stream, y = normalise(x, norm)
        return mixture(operations, y, project(y, experts.router), experts, stream if residual is None else residual)

    def norm_head(x: Tensor, norm: Norm | None, head: Dense) -> tuple[Tensor, Tensor]:
        _, hidden = normalise(x, norm)
        return hidden, project(hidden, head)

    def norm_head_loss(x: Tensor, norm: Norm | None, head: Dense, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        _, hidden = normalise(x, norm)
        # A mean over the batch is the batch's own; what each token has is not to depend on its neighbours.
        invariant = modes.sampler_equals_trainer or (own_linear and loss.reduction == "none")
        return hidden, head_loss(operations, hidden, head, labels, loss, invariant)

    def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None) -> Tensor:
        return operations.sample(logits, temperature, top_k, top_p, uniform)

    return KernelSet(
        name=name,
        norm=normalise,
        norm_linear=norm_linear,
        qk_norm_rope_cache=qk_norm_rope_cache,
        attention=attend,
        linear_residual=linear_residual,
        norm_gate_up_act=norm_gate_up_act,
        norm_experts=norm_experts,
        norm_head=norm_head,
        cross_entropy=operations.cross_entropy,
        norm_head_loss=norm_head_loss,
        sample=sample,
    )
