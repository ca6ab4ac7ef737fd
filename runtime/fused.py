"""The phases of a decode step, each one kernel where there is one for it: see docs/architecture/decoding.md.

A set of phases like any other, made from a composed one, whose phases stand wherever no fused kernel fits: layer norm,
an ungated feed-forward, experts, adapters. So all decode steps of one model run the same kernels, however many rows
they have: that is what a row's independence of its batch rests on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.decode_attention import most_splits
from ..kernels.rope_decode_attention import holds, rope_decode_attention_scratch
from ..kernels.sampling import Scratch, sample_scratch
from .batch import Batch
from .kernel_set import KernelSet
from .kv_cache import PAGE_SIZE
from .plan import Attention, Dense, Mlp, Norm, QuantisedDense

if TYPE_CHECKING:
    from .operations import Operations

FUSED = (Dense, QuantisedDense)  # exactly these: what is derived from them has more to it


@dataclass
class Workspace:
    """What a step that is run again and again writes into: allocated when first asked for, the same from then on."""

    limit: int | None = None  # only tokens below it are to be chosen
    sampling: tuple[float, int, float] = (0.0, 0, 1.0)  # temperature, top_k, top_p
    begun: bool = False  # the head puts each row's likeliest token into the scratch of sampling
    _held: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def hold(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._held:
            self._held[key] = make()
        return self._held[key]

    def tensor(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Of like's dtype, not initialised; one for each name and shape."""
        held: Tensor = self.hold((name, shape), lambda: torch.empty(shape, dtype=like.dtype, device=like.device))
        return held

    def begin(self) -> None:
        """To be called at the start of every step: sampling counts up from zero.

        At the start, where a kernel of the usual kind comes next: one that may start early needs a kernel before it.
        """
        for held in self._held.values():
            if isinstance(held, Scratch):
                held.work.zero_()

    def scratch_of(self, logits: Tensor) -> Scratch:
        """What sampling such logits works in."""
        held: Scratch = self.hold(("sampling", logits.shape), lambda: sample_scratch(logits, *self.sampling))
        return held


def fuse(plain: KernelSet, operations: "Operations", workspace: Workspace | None = None) -> KernelSet:
    """The phases of a decode step over these operations; with a workspace nothing is allocated, and the stream is
    added to in place.
    """

    def into(name: str, like: Tensor, width: int) -> dict[str, Tensor]:
        return {} if workspace is None else {"out": workspace.tensor(name, like, like.shape[0], width)}

    def norm_linear(x: Tensor, norm: Norm | None, linear: Dense) -> tuple[Tensor, Tensor]:
        if not (holds_norm(norm) and type(linear) in FUSED):
            return plain.norm_linear(x, norm, linear)
        return x, operations.norm_linear(x, *_norm(norm), *stored(linear), **into("qkv", x, linear.weight.shape[0]))

    def qk_norm_rope_cache(
        qkv: Tensor, attention: Attention, batch: Batch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # Where a kernel has room for the heads, `attend` does it all.
        return (qkv, None, None) if _attends(attention, batch) else plain.qk_norm_rope_cache(qkv, attention, batch)

    def attend(qkv: Tensor, k: Tensor | None, v: Tensor | None, attention: Attention, batch: Batch) -> Tensor:
        if not _attends(attention, batch):
            return plain.attention(qkv, k, v, attention, batch)
        assert batch.cache is not None
        table = positions = scale = None
        if attention.rotary is not None:
            table, positions, scale = batch.angles(attention.rotary)
        keys, values = batch.cache.keys[attention.slot], batch.cache.values[attention.slot]
        rows, heads, head_dim = qkv.shape[0], attention.num_heads, keys.shape[-1]
        given: dict[str, Any] = {}
        if workspace is not None:
            pages = most_splits(batch.page_table.shape[1], PAGE_SIZE, attention.window, batch.longest)
            shape = (rows, heads, attention.num_kv_heads, head_dim, pages)
            given["out"] = workspace.tensor("attended", qkv, rows, heads, head_dim)
            given["scratch"] = workspace.hold(
                ("attention", shape), lambda: rope_decode_attention_scratch(*shape, qkv.device)
            )
        return operations.rope_decode_attention(
            qkv,
            heads,
            attention.num_kv_heads,
            table,
            positions,
            attention.rope_dtype,
            attention.qk_norm,
            attention.qk_norm_weight,
            attention.eps,
            attention.qk_norm_first,
            scale,
            keys,
            values,
            batch.slots,
            batch.page_table,
            batch.device_lengths,
            attention.scale,
            attention.window,
            batch.longest,
            **given,
        ).flatten(1)

    def linear_residual(x: Tensor, linear: Dense, stream: Tensor) -> Tensor:
        if type(linear) not in FUSED:
            return plain.linear_residual(x, linear, stream)
        weight, bias, scale = stored(linear)
        given = {} if workspace is None else {"out": stream}
        return operations.decode_linear_residual(x, weight, bias, stream, scale, **given)

    def norm_gate_up_act(x: Tensor, norm: Norm | None, mlp: Mlp) -> tuple[Tensor, Tensor]:
        if not (holds_norm(norm) and mlp.kind == "gated" and type(mlp.up) in FUSED):
            return plain.norm_gate_up_act(x, norm, mlp)
        width = mlp.up.weight.shape[0] // 2
        return x, operations.norm_linear_swiglu(x, *_norm(norm), *stored(mlp.up), **into("hidden", x, width))

    def norm_head(x: Tensor, norm: Norm | None, head: Dense) -> tuple[Tensor | None, Tensor]:
        limit = None if workspace is None else workspace.limit
        if not (holds_norm(norm) and type(head) in FUSED):
            hidden, logits = plain.norm_head(x, norm, head)
            if limit is not None:
                logits[:, limit:] = float("-inf")
            return hidden, logits
        given: dict[str, Any] = into("logits", x, head.weight.shape[0])
        if workspace is not None:
            given["best"] = workspace.scratch_of(given["out"]).work[:, 0]
            workspace.begun = True
        weight, _, scale = stored(head)
        return None, operations.norm_head(x, *_norm(norm), weight, scale, limit, **given)[0]

    def sample(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None) -> Tensor:
        if workspace is None:
            return operations.sample(logits, temperature, top_k, top_p, uniform)
        rows = logits.shape[0]
        given = {
            "out": workspace.hold(("sampled", rows), lambda: logits.new_empty(rows, dtype=torch.int64)),
            "scratch": workspace.scratch_of(logits),
            "begun": workspace.begun,
        }
        return operations.sample(logits, temperature, top_k, top_p, uniform, **given)

    return replace(
        plain,
        norm_linear=norm_linear,
        qk_norm_rope_cache=qk_norm_rope_cache,
        attention=attend,
        linear_residual=linear_residual,
        norm_gate_up_act=norm_gate_up_act,
        norm_head=norm_head,
        sample=sample,
        decode=None,
    )


def holds_norm(norm: Norm | None) -> bool:
    """Whether the fused kernels have this norm: RMSNorm, with the stream going on as it was before."""
    return norm is None or (norm.kind == "rms" and not norm.replaces_stream)


def _attends(attention: Attention, batch: Batch) -> bool:
    assert batch.cache is not None
    keys = batch.cache.keys[attention.slot]
    return holds(attention.num_heads // attention.num_kv_heads, keys.shape[-1], keys.itemsize)


def _norm(norm: Norm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else (norm.weight, norm.eps)


def stored(linear: Dense) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(weight, bias, scale of what is quantised)."""
    return linear.weight, linear.bias, linear.scale if isinstance(linear, QuantisedDense) else None
