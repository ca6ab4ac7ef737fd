"""Rotary frequencies, their scaling rules, and the table of cosines and sines that one model shares."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import TritiumError, nearest

# The keys each rule takes besides `rope_type`: those it needs, and those with a default (`transformers`' names).
_RULES: dict[str, tuple[tuple[str, ...], dict[str, float | None]]] = {
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None},
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), {}),
}


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the trained length: `yarn` (arXiv:2309.00071) or `llama3`."""

    rope_type: str
    values: tuple[tuple[str, float | None], ...]

    @classmethod
    def parse(cls, raw: dict[str, Any], where: str) -> "RopeScaling":
        """From a `rope_scaling` mapping in `transformers`' keys. Raises TritiumError for an unknown rule or key."""
        values = dict(raw)
        rope_type = values.pop("rope_type", values.pop("type", None))
        if not isinstance(rope_type, str) or rope_type not in _RULES:
            raise TritiumError(f"{where}: unknown rope_type {rope_type!r}; {nearest(str(rope_type), _RULES)}")
        needed, optional = _RULES[rope_type]
        unknown = sorted(set(values) - set(needed) - set(optional))
        missing = sorted(set(needed) - set(values))
        if unknown or missing:
            problem = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {unknown[0]!r}"
            raise TritiumError(f"{where}: {rope_type} {problem}; it takes {', '.join((*needed, *optional))}")
        for key, value in values.items():
            if value is None and key in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TritiumError(f"{where}.{key}: must be a number, got {value!r}")
            if not value > 0:
                raise TritiumError(f"{where}: {key} must be above 0, got {value!r}")
        return cls(rope_type, tuple((key, values.get(key, optional.get(key))) for key in (*needed, *optional)))

    def as_dict(self) -> dict[str, Any]:
        """In `transformers`' keys."""
        return {"rope_type": self.rope_type, **{key: value for key, value in self.values if value is not None}}


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] angle per position, factor on cos and sin).

    Plain: base^(-2i / head_dim). The scaled rules are those of `transformers`' modeling_rope_utils.
    """
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim))
    if scaling is None:
        return frequencies, 1.0
    value = {key: number for key, number in scaling.values if number is not None}
    factor, original = value["factor"], value["original_max_position_embeddings"]
    if scaling.rope_type == "llama3":
        low, high = value["low_freq_factor"], value["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequencies / factor + smooth * frequencies
        scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
        between = (wavelength <= original / low) & (wavelength >= original / high)
        return torch.where(between, blended, scaled), 1.0

    def correction(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low_index = max(math.floor(correction(value["beta_fast"])), 0)
    high_index = min(math.ceil(correction(value["beta_slow"])), head_dim - 1)
    width = max(high_index - low_index, 0.001)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low_index) / width).clamp(0, 1)
    attention_factor = value.get("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return frequencies / factor * ramp + frequencies * (1 - ramp), attention_factor


class RotaryEmbedding:
    """cos and sin of every position: float32 [context_length, 2, head_dim / 2], on each device asked for."""

    def __init__(self, head_dim: int, base: float, context_length: int, scaling: RopeScaling | None = None) -> None:
        self.context_length = context_length
        self._rule = (head_dim, base, scaling)
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, device: torch.device) -> Tensor:
        """The whole table, computed once a device in float32 (a bfloat16 position would lose integers above 256)."""
        if device in self._tables:
            return self._tables[device]
        frequencies, factor = inverse_frequencies(*self._rule)
        angles = torch.outer(torch.arange(self.context_length, dtype=torch.float32, device="cpu"), frequencies)
        table = (torch.stack((angles.cos(), angles.sin()), 1) * factor).to(device)
        if not isinstance(table, FakeTensor):  # a tracer's tensor must not outlive its trace
            self._tables[device] = table
        return table

    def rows(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, head_dim / 2] in `dtype`, for positions [T]."""
        rows = self.table(positions.device)[positions].to(dtype)
        return rows[:, 0], rows[:, 1]
