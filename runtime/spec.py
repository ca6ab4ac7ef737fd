"""ModelSpec: everything that makes one decoder differ from another, as one frozen, checked value.

A family's traits (models/<family>/family.yaml) and a size's numbers (models/<family>/<size>.yaml, or a checkpoint's
config.json) together fill every field; no field has a default and none is inferred from another.
"""

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from .errors import TritiumError, nearest
from .rope import RopeScaling

MAX_LAYERS = 10_000  # bounds on what one wrong number can allocate
MAX_SIZE = 2**31
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder's architecture. `spec["vocab_size"]` reads the same as `spec.vocab_size`."""

    family: str
    # Sizes
    vocab_size: int
    context_length: int  # tokens, prompt and generated together
    embedding_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # equal to num_heads: multi-head; fewer: grouped-query; 1: multi-query
    head_dim: int
    hidden_dim: int  # width of the feed-forward
    dtype: Literal["bfloat16", "float16", "float32"]
    # Normalisation
    norm: Literal["rms", "layer"]
    norm_eps: float
    residual: Literal["pre_norm", "post_norm"]
    # Positions
    positions: Literal["rope", "learned"]
    rope_base: float
    rope_dtype: Literal["model", "float32"]  # in which q and k are rotated
    rope_scaling: RopeScaling | None
    rope_layers: tuple[bool, ...]  # per layer: whether it rotates
    logn_length: int | None  # trained length beyond which the query grows with the logarithm of its position, or null
    # Attention
    qk_norm: Literal["none", "weighted", "unweighted"]
    qk_norm_position: Literal["before_rope", "after_rope"]
    qk_norm_layers: tuple[bool, ...]  # per layer: whether it normalises q and k
    windows: tuple[int | None, ...]  # per layer: how many last positions a query sees, or null for all
    qkv_bias: bool
    out_bias: bool
    # Feed-forward
    mlp: Literal["gated", "plain"]
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    mlp_bias: bool
    # Mixture of experts: gated ones, without biases, in the layers that have them instead of the above
    expert_layers: tuple[bool, ...]  # per layer
    num_experts: int  # 0: none
    experts_per_token: int
    expert_dim: int  # width of one expert
    renormalise_experts: bool  # the chosen experts' probabilities are made to sum to 1
    # Whole
    tie_embeddings: bool
    layer_repeat: int  # times each stored layer runs in succession, each time with a cache slot of its own
    # Training alone
    dropout: float  # chance that an element of the embedding, or of what a layer adds to the stream, is dropped

    def __getitem__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise KeyError(name)
        return getattr(self, name)

    def __contains__(self, name: object) -> bool:
        return name in _FIELDS

    @property
    def query_dim(self) -> int:
        """Width of the concatenated query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the concatenated key (or value) heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_cache_slots(self) -> int:
        """Layers as the KV cache counts them."""
        return self.num_layers * self.layer_repeat

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __post_init__(self) -> None:
        _check_consistency(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "ModelSpec":
        """Checks names, types and divisibility. A per-layer field may be one value for all layers.

        Raises TritiumError, naming `where` and the key.
        """
        unknown = [key for key in values if key not in _FIELDS]
        if unknown:
            raise TritiumError(f"{where}: unknown key {unknown[0]!r}; {nearest(str(unknown[0]), _FIELDS)}")
        missing = [key for key in _FIELDS if key not in values]
        if missing:
            raise TritiumError(f"{where}: missing {', '.join(missing)}")
        layers = values["num_layers"]
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise TritiumError(f"{where}: num_layers must be at most {MAX_LAYERS}, got {layers}")
        checked: dict[str, Any] = {}
        for name, kind in _FIELDS.items():
            value = values[name]
            if name == "rope_scaling" and isinstance(value, Mapping):
                value = RopeScaling.parse(dict(value), f"{where}: {name}")
            elif get_origin(kind) is tuple and isinstance(layers, int):
                value = tuple(value) if isinstance(value, list | tuple) else (value,) * layers
            checked[name] = checked_value(value, kind, f"{where}: {name}")
        try:
            return cls(**checked)
        except TritiumError as error:
            raise TritiumError(f"{where}: {error}") from None

    def replace(self, **changes: Any) -> "ModelSpec":
        """A copy with other values, checked like any spec. A per-layer field that is the same in all layers stays so
        when `num_layers` changes; one that is not must be given anew.
        """
        values = self.as_dict()
        for name, kind in _FIELDS.items():
            if get_origin(kind) is tuple and len(set(values[name])) == 1:
                values[name] = values[name][0]
        return ModelSpec.from_dict({**values, **changes}, f"{self.family} spec")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        values = {name: getattr(self, name) for name in _FIELDS}
        values["rope_scaling"] = self.rope_scaling.as_dict() if self.rope_scaling else None
        return values


_FIELDS: dict[str, Any] = dict(get_type_hints(ModelSpec))
assert list(_FIELDS) == [field.name for field in dataclasses.fields(ModelSpec)]


def checked_value(value: Any, kind: Any, where: str) -> Any:
    """`value` if it is of type `kind`, with an int widened where a float is asked for."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise TritiumError(f"{where}: must be one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TritiumError(f"{where}: must be a list with one entry a layer, got {value!r}")
        return tuple(checked_value(entry, arguments[0], f"{where}[{index}]") for index, entry in enumerate(value))
    if origin in (Union, types.UnionType):
        return None if value is None else checked_value(value, arguments[0], where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint = ""
        if isinstance(value, str) and kind in (int, float):
            hint = _number_hint(value)
        raise TritiumError(f"{where}: must be {_NAMES.get(kind, kind)}, got {value!r}{hint}")
    return value


def _number_hint(text: str) -> str:
    """What to say of a text where a number was wanted: nothing, unless the text spells a number."""
    try:
        float(text)
    except ValueError:
        return ""
    return " (YAML reads 1e-6 as text: write 1.0e-6)" if "e" in text.lower() else " (remove the quotes)"


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    RopeScaling: "null or a mapping with a rope_type",
}


def _check_consistency(spec: ModelSpec) -> None:
    sizes = ("vocab_size", "context_length", "embedding_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    for name in (*sizes, "hidden_dim", "layer_repeat", "norm_eps", "rope_base"):
        if not spec[name] > 0:
            raise TritiumError(f"{name} must be above 0, got {spec[name]}")
        if not spec[name] < MAX_SIZE:
            raise TritiumError(f"{name} must be below {MAX_SIZE}, got {spec[name]}")
    if not 0 <= spec.dropout < 1:
        raise TritiumError(f"dropout must be 0 or more and below 1, got {spec.dropout}")
    if spec.num_heads % spec.num_kv_heads:
        raise TritiumError(f"num_heads ({spec.num_heads}) must be a multiple of num_kv_heads ({spec.num_kv_heads})")
    if spec.positions == "rope" and spec.head_dim % 2:
        raise TritiumError(f"head_dim must be even for rope, got {spec.head_dim}")
    if (spec.mlp == "gated") != (spec.activation == "silu"):
        raise TritiumError(f"a {spec.mlp} mlp does not take the activation {spec.activation}")
    for name in ("rope_layers", "qk_norm_layers", "windows", "expert_layers"):
        if len(spec[name]) != spec.num_layers:
            raise TritiumError(f"{name} has {len(spec[name])} entries for {spec.num_layers} layers")
    if any(window is not None and window < 1 for window in spec.windows):
        raise TritiumError("windows must be at least 1")
    if spec.logn_length is not None and (spec.positions != "rope" or spec.logn_length < 2):
        raise TritiumError(f"logn_length must be above 1, with positions: rope; got {spec.logn_length}")
    if any(spec.expert_layers):
        for name in ("num_experts", "experts_per_token", "expert_dim"):
            if not 0 < spec[name] < MAX_SIZE:
                raise TritiumError(f"{name} must be above 0 where a layer has experts, got {spec[name]}")
        if spec.experts_per_token > spec.num_experts:
            raise TritiumError(
                f"experts_per_token ({spec.experts_per_token}) must be at most num_experts ({spec.num_experts})"
            )
        if spec.mlp != "gated" or spec.mlp_bias:
            raise TritiumError("experts are gated and have no biases: mlp must be gated, mlp_bias false")
    elif spec.num_experts or spec.experts_per_token or spec.expert_dim:
        raise TritiumError("num_experts, experts_per_token and expert_dim must be 0 where no layer has experts")
