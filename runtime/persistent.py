"""A decode step as one launch, for the models that kernels/decode_step.py has a kernel for: see
docs/architecture/decoding.md.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import tuning
from ..kernels.decode_attention import most_splits
from ..kernels.decode_step import decode_step
from ..kernels.rope_decode_attention import holds
from ..kernels.step_tables import StepLayers, misplaced, step_scratch, step_tables
from .batch import Batch
from .errors import TritiumError
from .fused import FUSED, Workspace, holds_norm, stored
from .kernel_set import KernelSet
from .kv_cache import PAGE_SIZE
from .plan import Dense, Experts, Layer, Norm, Plan, QuantisedDense

FORMS = ("fused", "persistent")


def persists(form: str | None, plan: Plan) -> bool:
    """Whether a model's steps are one launch each: by the name of the form, or, where that is None, by the table.

    Never by the number of rows, on which a row's bits may not depend. Raises TritiumError for an unknown form, and for
    `persistent` where it does not fit.
    """
    if form is not None and form not in FORMS:
        raise TritiumError(f"form: must be one of {', '.join(FORMS)} or None, got {form!r}")
    why = fits(plan)
    if form == "persistent" and why is not None:
        raise TritiumError(f"form 'persistent' does not fit this model: {why}; use form 'fused'")
    if form is None:
        width, layers = plan.embedding.shape[1], len(plan.layers)
        form = tuning.config("decode_form", plan.embedding.device, width=width, layers=layers)["FORM"]
    return form == "persistent" and why is None


def fits(plan: Plan) -> str | None:
    """Why the kernel does not have this model, in words; None where it does."""
    if not tuning.config("decode_step", plan.embedding.device, itemsize=plan.embedding.itemsize, rows=1):
        return "there is no kernel of it for this GPU"
    if not plan.layers:
        return "it has no layers"
    if plan.positions is not None:
        return "its positions are learned"
    for layer in plan.layers:
        if (why := _layer_obstacle(layer)) is not None:
            return why
    head = plan.head
    eight = not isinstance(head, QuantisedDense) or head.weight.dtype == torch.int8
    if not _has(plan.norm) or type(head) not in FUSED or head.bias is not None or not eight:
        return "its last norm or projection is another"
    if len({_shape(layer) for layer in plan.layers}) > 1:
        return "its layers are not alike"
    attentions = [layer.attention for layer in plan.layers]
    if len({attention.rotary for attention in attentions} - {None}) > 1:
        return "its layers rotate by several rules"
    if len({(attention.rotary is None, attention.qk_norm) for attention in attentions}) > len(
        {attention.rotary is None for attention in attentions}
    ):
        return "q and k are normalised in some layers, whether they rotate or not"
    epsilons = {attention.eps for attention in attentions if attention.qk_norm}
    for norm in (plan.norm, *(norm for layer in plan.layers for norm in (layer.attention_norm, layer.mlp_norm))):
        assert norm is not None
        epsilons.add(norm.eps)
    if len(epsilons) > 1:
        return "its norms have several epsilons"
    tensors = [plan.embedding, plan.norm.weight, *_tensors(plan.head)]  # type: ignore[union-attr]
    for layer in plan.layers:
        assert not isinstance(layer.mlp, Experts)
        for linear in (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down):
            tensors += _tensors(linear)
        tensors += [norm.weight for norm in (layer.attention_norm, layer.mlp_norm) if norm is not None]
        tensors += [] if layer.attention.qk_norm_weight is None else [layer.attention.qk_norm_weight]
    for tensor in tensors:
        if (wrong := misplaced(tensor)) is not None:
            return f"a weight {list(tensor.shape)} {wrong}"
    return None


def _layer_obstacle(layer: Layer) -> str | None:
    if isinstance(layer.mlp, Experts):
        return "it has experts"
    if layer.mlp.kind != "gated":
        return "its feed-forward is not gated"
    if layer.exchange is not None:
        return "processes share its weights"
    if not (_has(layer.attention_norm) and _has(layer.mlp_norm)):
        return "its layers are not normalised by RMS norms that the stream passes by"
    assert layer.attention_norm is not None
    attention, itemsize = layer.attention, layer.attention_norm.weight.itemsize
    head_dim = layer.qkv.weight.shape[0] // (attention.num_heads + 2 * attention.num_kv_heads)
    if not holds(attention.num_heads // attention.num_kv_heads, head_dim, itemsize):
        return "too many wide query heads share a key/value head"
    if any(type(linear) not in FUSED for linear in (layer.qkv, layer.out, layer.mlp.up, layer.mlp.down)):
        return "it has adapters"
    return None


def _has(norm: Norm | None) -> bool:
    return norm is not None and holds_norm(norm)


def _tensors(linear: Dense) -> list[Tensor]:
    return [tensor for tensor in stored(linear) if tensor is not None]


def _shape(layer: Layer) -> tuple[Any, ...]:
    """What all layers must have in common."""
    attention, mlp = layer.attention, layer.mlp
    assert not isinstance(mlp, Experts)
    linears = [
        (linear.weight.shape, linear.weight.dtype, linear.bias is None)
        for linear in (layer.qkv, layer.out, mlp.up, mlp.down)
    ]
    bits = {linear[1] for linear in linears}
    how = (attention.num_heads, attention.num_kv_heads, attention.scale, attention.rope_dtype, attention.qk_norm_first)
    return *linears, len(bits), how, attention.qk_norm_weight is None


def gathered(plan: Plan, keys: Sequence[Tensor], values: Sequence[Tensor]) -> StepLayers:
    """The layers of a plan that fits, as the kernel takes them, with the caches of all slots."""
    layers = plan.layers
    linears: dict[str, Any] = {}
    for name in ("qkv", "out", "up", "down"):
        found = [getattr(layer if name in ("qkv", "out") else layer.mlp, name) for layer in layers]
        linears[f"{name}_weights"] = [linear.weight for linear in found]
        linears[f"{name}_biases"] = None if found[0].bias is None else [linear.bias for linear in found]
        quantised = isinstance(found[0], QuantisedDense)
        linears[f"{name}_scales"] = [linear.scale for linear in found] if quantised else None
    attentions = [layer.attention for layer in layers]
    weighted = attentions[0].qk_norm_weight is not None
    return StepLayers(
        attention_norms=[layer.attention_norm.weight for layer in layers if layer.attention_norm is not None],
        mlp_norms=[layer.mlp_norm.weight for layer in layers if layer.mlp_norm is not None],
        k_caches=[keys[attention.slot] for attention in attentions],
        v_caches=[values[attention.slot] for attention in attentions],
        rotates=[attention.rotary is not None for attention in attentions],
        qk_norms=[attention.qk_norm for attention in attentions],
        windows=[attention.window or 0 for attention in attentions],
        qk_norm_weights=[a.qk_norm_weight for a in attentions if a.qk_norm_weight is not None] if weighted else None,
        **linears,
    )


def persist(fused: KernelSet, workspace: Workspace) -> KernelSet:
    """The fused set with whole steps besides, for a plan that fits; a workspace is for one plan and one cache."""

    def step(plan: Plan, tokens: Tensor, batch: Batch) -> Tensor:
        assert batch.cache is not None
        assert batch.slots is not None
        assert plan.norm is not None
        keys, values = batch.cache.keys, batch.cache.values
        layers, tables = workspace.hold(("step",), lambda: _with_tables(gathered(plan, keys, values)))
        attention = plan.layers[0].attention
        rotary = next((layer.attention.rotary for layer in plan.layers if layer.attention.rotary is not None), None)
        table = positions = scale = None
        if rotary is not None:
            table, positions, scale = batch.angles(rotary)
        rows, heads = tokens.shape[0], (attention.num_heads, attention.num_kv_heads)
        windows = layers.windows
        pages = most_splits(batch.page_table.shape[1], PAGE_SIZE, max(windows) if all(windows) else None, batch.longest)
        logits = workspace.tensor("logits", plan.embedding, rows, plan.head.weight.shape[0])
        workspace.begun = True
        decode_step(
            plan.embedding,
            tokens,
            layers,
            plan.norm.weight,
            plan.head.weight,
            plan.norm.eps,
            *heads,
            table,
            positions,
            attention.rope_dtype,
            attention.qk_norm_first,
            scale,
            batch.slots,
            batch.page_table,
            batch.device_lengths,
            attention.scale,
            batch.longest,
            workspace.limit,
            plan.head.scale if isinstance(plan.head, QuantisedDense) else None,
            out=logits,
            best=workspace.scratch_of(logits).work[:, 0],
            tables=tables,
            scratch=workspace.hold(
                ("step", rows, pages), lambda: step_scratch(plan.embedding, layers, rows, *heads, pages)
            ),
        )
        return logits

    return replace(fused, step=step)


def _with_tables(layers: StepLayers) -> tuple[StepLayers, Any]:
    return layers, step_tables(layers)
