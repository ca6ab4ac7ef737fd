"""What `accelerate` puts in the place of a module's forward, for each kind of module of `transformers`.

A patch is a plain function of (module, inputs) with the signature and the return type of the forward that it replaces.
It goes on calling the submodules that have weights of their own (projections, experts, adapters around them) and reads
the weights of norms, if those are what they were: each call asks. What the operations do not take (another dtype under
autocast, a norm with hooks, gradient checkpointing around a whole layer) runs by the class's own forward.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import layer_norm, qk_norm_rope, rms_norm  # noqa: F401 - registers the operations
from ...kernels.launch import DTYPES
from ...kernels.qk_norm_rope import WIDEST as WIDEST_HEAD
from ...kernels.rms_norm import WIDEST
from .attention import additive

Forward = Callable[..., Any]
OPERATIONS = torch.ops.tritium


@dataclass(frozen=True)
class Kind:
    """How the modules of one class are patched."""

    what: str  # it becomes
    make: Callable[[type[nn.Module]], Forward]
    check: Callable[[Any], str | None]  # why this module is left alone


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes the module's calls: then they must go through it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "_hf_hook" in module.__dict__


def is_bare(module: Any, cls: type[nn.Module], like: Tensor) -> bool:
    """Whether a caller may do the work of a norm of class `cls` on `like`, with its weight."""
    weight: Tensor | None = getattr(module, "weight", None)
    return type(module) is cls and not has_hooks(module) and fits(like, weight)


def norm_class(names: Any, cls: type[nn.Module], suffix: str) -> type[nn.Module]:
    """The RMSNorm beside Qwen3Attention is Qwen3RMSNorm."""
    found: type[nn.Module] = getattr(names, f"{cls.__name__.removesuffix(suffix)}RMSNorm")
    return found


def fits(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the operations take x with these weights."""
    return x.dtype in DTYPES and all(weight is None or weight.dtype == x.dtype for weight in weights)


def eps_of(norm: Any) -> float:
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


# Norms


def _rms_norm(cls: type[nn.Module]) -> Forward:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if fits(hidden_states, self.weight):
            found: Tensor = OPERATIONS.rms_norm(hidden_states, self.weight, eps_of(self))
            return found
        if fits(hidden_states):  # in autocast: a product of two dtypes is of the wider one
            return self.weight * OPERATIONS.rms_norm(hidden_states, None, eps_of(self))
        return cls.forward(self, hidden_states)

    return forward


def _layer_norm(cls: type[nn.Module]) -> Forward:
    def forward(self: Any, input: Tensor) -> Tensor:
        if not fits(input, self.weight, self.bias):
            return cls.forward(self, input)
        found: Tensor = OPERATIONS.layer_norm(input, self.weight, self.bias, self.eps)
        return found

    return forward


def _check_norm(module: Any) -> str | None:
    if module.weight is None or module.weight.dim() != 1:
        return "it has no weight of one dimension"
    width = module.weight.shape[0]
    return f"its rows of {width} are wider than the {WIDEST} of one program" if width > WIDEST else None


# Feed-forward


def _mlp(cls: type[nn.Module]) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        activation = OPERATIONS.silu_mul if fits(gate, up) else _silu_mul
        found: Tensor = self.down_proj(activation(gate, up))
        return found

    return forward


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def check_silu(module: Any) -> str | None:
    activation = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    return None if silu else f"its activation is {type(activation).__name__}, not silu"


# Rotation


def _rotary(cls: type[nn.Module]) -> Forward:
    """(cos, sin, table, rows), or for Llama 4 (frequencies, table, rows): once a forward pass, for all layers."""

    def forward(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        found = cls.forward(self, x, position_ids)
        whole = (found,) if isinstance(found, Tensor) else tuple(found)
        return (*whole, *rotations(whole, x.shape[0]))

    return forward


def rotations(embeddings: tuple[Tensor, ...], batch: int) -> tuple[Tensor, Tensor]:
    """The operation's table [T, 2, D/2] and each token's row of it, [batch * S].

    embeddings is `transformers`' (cos, sin), [B, S, D] of two equal halves, or complex frequencies [B, S, D/2]; B is 1
    where all rows of the batch have the same positions.
    """
    if embeddings[0].is_complex():
        table = torch.view_as_real(embeddings[0]).transpose(-1, -2)
    else:
        cos, sin = embeddings[:2]
        half = cos.shape[-1] // 2
        table = torch.stack((cos[..., :half], sin[..., :half]), -2)
    count, length = table.shape[:2]
    rows = torch.arange(count * length, device=table.device).view(count, length)
    rows = rows.expand(batch, length).reshape(-1)
    # Rounded to the model's dtype already: the operation rounds it there once more, which changes nothing.
    return table.flatten(0, 1).float().contiguous(), rows


# Attention


def _turned(
    x: Tensor,  # [B, S, H * D]
    norm: Any,
    place: Sequence[Tensor],  # the table, and each token's row of it
    rope_dtype: torch.dtype,
    head_dim: int,
    weight: Tensor | None,
    norm_first: bool,
) -> Tensor:
    """One projection, normalised per head and rotated: [B, H, S, D], a view of [B, S, H, D]."""
    batch, length, width = x.shape
    heads = width // head_dim
    gain = None if weight is None else weight.expand(heads, head_dim)
    how = (*place, rope_dtype, norm is not None, gain, 0.0 if norm is None else eps_of(norm), norm_first)
    turned: Tensor = OPERATIONS.qk_norm_rope(x.reshape(-1, width), heads, 0, *how)[0]
    return turned.view(batch, length, heads, head_dim).transpose(1, 2)


def _attention(cls: type[nn.Module]) -> Forward:
    """Qwen's and Llama's: [QK-norm,] rotation, cache, then whatever function the config names."""
    names = sys.modules[cls.__module__]
    norm_kind = norm_class(names, cls, "Attention")

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        v = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        norms = (self.q_norm, self.k_norm) if hasattr(self, "q_norm") else (None, None)
        if not all(norm is None or is_bare(norm, norm_kind, q) for norm in norms):
            q, k = (
                norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2) for norm, x in zip(norms, (q, k), strict=True)
            )
            norms = (None, None)
        cos = position_embeddings[0]
        if fits(q, k) and cos.dtype in (q.dtype, torch.float32):
            place = position_embeddings[2:] or rotations(position_embeddings, shape[0])
            q, k = (
                _turned(x, norm, place, cos.dtype, self.head_dim, None if norm is None else norm.weight, True)
                for x, norm in zip((q, k), norms, strict=True)
            )
        else:
            q, k = (x.view(*shape, -1, self.head_dim).transpose(1, 2) for x in (q, k))
            q, k = names.apply_rotary_pos_emb(q, k, *position_embeddings[:2])
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        return attend(self, names, q, k, v, attention_mask, past_key_values, shape, kwargs)

    return forward


def _llama4_attention(cls: type[nn.Module]) -> Forward:
    """Llama 4's, of a layer with positions: pairs of neighbours are turned, then normalised.

    Each head's elements are first put in halves. Scores do not change under a permutation common to q and k.
    """
    names = sys.modules[cls.__module__]
    norm_kind = names.Llama4TextL2Norm

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        found = (position_embeddings,) if isinstance(position_embeddings, Tensor) else position_embeddings
        norm = getattr(self, "qk_norm", None)
        watched = norm is not None and (type(norm) is not norm_kind or has_hooks(norm))
        if watched or not fits(hidden_states):
            return cls.forward(self, hidden_states, found[0], attention_mask, past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]
        q, k = (_in_halves(x(hidden_states), self.head_dim) for x in (self.q_proj, self.k_proj))
        v = self.v_proj(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
        place = [x.to(q.device) for x in found[1:] or rotations(found, shape[0])]
        q, k = (_turned(x, norm, place, torch.float32, self.head_dim, None, False) for x in (q, k))
        return attend(self, names, q, k, v, attention_mask, past_key_values, shape, kwargs)

    return forward


def _in_halves(x: Tensor, head_dim: int) -> Tensor:
    """[B, S, H * D] with each head's even elements before its odd ones."""
    return x.unflatten(-1, (-1, head_dim // 2, 2)).transpose(-1, -2).flatten(-3)


def attend(
    module: Any,
    names: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Any,
    past_key_values: Any,
    shape: torch.Size,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """From rotated q, k and v [B, H, S, D] on, as all of `transformers`' decoders go on."""
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    implementation = module.config._attn_implementation
    function = names.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, names.eager_attention_forward)
    dropout = module.attention_dropout if module.training else 0.0
    out, weights = function(
        module, q, k, v, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
    )  # fmt: skip
    return module.o_proj(out.reshape(*shape, -1).contiguous()), weights


def _check_attention(module: Any) -> str | None:
    if module.head_dim % 2 or module.head_dim > WIDEST_HEAD:
        return f"its heads have {module.head_dim} elements: the operation takes an even number up to {WIDEST_HEAD}"
    parts = [part for part in ("q_norm", "k_norm") if hasattr(module, part)]
    other = next((part for part in parts if kind_of(getattr(module, part)) is not _RMS), None)
    return f"its {other} is a {type(getattr(module, other)).__name__}" if other else None


def _check_llama4_attention(module: Any) -> str | None:
    if not module.use_rope:
        return "it has neither positions nor a norm to fuse"
    return _check_attention(module)


# Layers


def _layer(cls: type[nn.Module]) -> Forward:
    """Sum and second norm in one; the rest as the class has it. With checkpointing the class's own, which does that."""

    norm_kind = norm_class(sys.modules[cls.__module__], cls, "DecoderLayer")
    keeps_positions = "Llama4" not in cls.__name__  # from the attention

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        norm = self.post_attention_layernorm
        if args or (self.gradient_checkpointing and self.training) or not is_bare(norm, norm_kind, hidden_states):
            return cls.forward(self, hidden_states, *args, **kwargs)
        if not keeps_positions:
            kwargs.pop("position_ids", None)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        if attended.dtype == hidden_states.dtype and attended.device == hidden_states.device:
            hidden, stream = OPERATIONS.add_rms_norm(attended, hidden_states, norm.weight, eps_of(norm))
        else:
            stream = hidden_states + attended
            hidden = norm(stream)
        found = self.mlp(hidden) if hasattr(self, "mlp") else self.feed_forward(hidden)
        found = found[0] if getattr(self, "is_moe_layer", False) else found
        total: Tensor = stream + found.view(stream.shape)
        return total

    return forward


def _check_layer(module: Any) -> str | None:
    norm = module.post_attention_layernorm
    if kind_of(norm) is not _RMS:
        return f"its post_attention_layernorm is a {type(norm).__name__}"
    return "its post_attention_layernorm has hooks, which must see its calls" if has_hooks(norm) else None


def _always(module: Any) -> str | None:
    return None


_RMS = Kind("RMSNorm in one kernel", _rms_norm, _check_norm)
_LAYER_NORM = Kind("layer norm in one kernel", _layer_norm, _check_norm)
_MLP = Kind("silu(gate) * up in one kernel", _mlp, check_silu)
_ROTARY = Kind("the rotation's table once a forward pass", _rotary, _always)
_ATTENTION = Kind("rotation in one kernel a projection", _attention, _check_attention)
_NORMED = Kind("QK-norm and rotation in one kernel a projection", _attention, _check_attention)
_TURNED = Kind("QK-norm and rotation in one kernel a projection", _llama4_attention, _check_llama4_attention)
_LAYER = Kind("sum and second norm in one kernel", _layer, _check_layer)

_FAMILIES = {  # transformers' module, its prefix, what its attention becomes
    "llama": ("Llama", _ATTENTION),
    "qwen2": ("Qwen2", _ATTENTION),
    "qwen3": ("Qwen3", _NORMED),
    "qwen3_moe": ("Qwen3Moe", _NORMED),
    "llama4": ("Llama4Text", _TURNED),
    "gpt2": ("GPT2", None),
}
KNOWN = "Qwen2, Qwen3, Qwen3-MoE, Llama, Llama 4 (text) and GPT-2"


def part_of(module: nn.Module) -> tuple[str, str]:
    """(family, part) of a module of this very class: ("qwen3", "Attention"); ("", "") of any other, a subclass too."""
    cls = type(module)
    for family, (prefix, _) in _FAMILIES.items():
        if cls.__module__ == f"transformers.models.{family}.modeling_{family}":
            return family, cls.__name__.removeprefix(prefix if cls.__name__.startswith(prefix) else "Llama4")
    return "", ""


def kind_of(module: nn.Module, parent: nn.Module | None = None) -> Kind | None:
    """How a module is patched, None of one that is not known. A LayerNorm is known by its parent."""
    if type(module) is nn.LayerNorm:
        known = parent is not None and part_of(parent)[0] == "gpt2"
        return _LAYER_NORM if known else None
    family, part = part_of(module)
    if family in ("", "gpt2"):
        return None
    kinds = {"RMSNorm": _RMS, "MLP": _MLP, "RotaryEmbedding": _ROTARY, "DecoderLayer": _LAYER}
    return kinds.get(part, _FAMILIES[family][1] if part == "Attention" else None)


def _for_others(model: Any, prepared: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The masks that `generate` made for our attention, before the model was called, for the function it had before."""
    inputs = args[0] if args else kwargs.get("input_ids")
    length = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[1]
    cache = kwargs.get("past_key_values")

    def turned(mask: Any, layer: int) -> Any:
        keys = length if cache is None else cache.get_mask_sizes(length, layer)[0]
        return additive(mask, length, keys, model.dtype)

    if not isinstance(prepared, dict):
        return turned(prepared, 0)
    kinds = list(model.config.layer_types)
    return {kind: turned(mask, kinds.index(kind)) for kind, mask in prepared.items() if kind in kinds}


def body(cls: type[nn.Module]) -> Forward:
    """The model without its head: a call that asks for the attention's weights has them by the function of before."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        wanted = kwargs.get("output_attentions")
        if not (config.output_attentions if wanted is None else wanted):
            return cls.forward(self, *args, **kwargs)
        if isinstance(prepared := kwargs.get("attention_mask"), dict) or getattr(prepared, "ndim", 2) == 4:
            kwargs["attention_mask"] = _for_others(self, prepared, args, kwargs)
        ours = config._attn_implementation
        config._attn_implementation = self._tritium_attention
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            config._attn_implementation = ours

    return forward
