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
    "dynamic": (("factor", "original_max_position_embeddings"), {}),
    "qwen_ntk": (("original_max_position_embeddings",), {}),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None},
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), {}),
}


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the trained length.

    `yarn` (arXiv:2309.00071) and `llama3` stretch them once and for all; `dynamic` (NTK, as `transformers` has it) and
    `qwen_ntk` (Qwen1's own) by the length of the row's prompt, which then holds while the row is continued.
    """

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
        # What says nothing: an option at its neutral value, and a leftover that transformers does not read either.
        neutral: dict[str, Any] = {"truncate": True, "mscale": None, "mscale_all_dim": None}
        values = {
            key: value for key, value in values.items() if key != "attn_factor" and neutral.get(key, key) != value
        }
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

    def stretch(self, prompt: int) -> float:
        """What the base is multiplied by, to the power of D / (D - 2), for a row whose prompt has `prompt` tokens."""
        value = dict(self.values)
        trained = value["original_max_position_embeddings"]
        assert trained is not None
        if self.rope_type == "qwen_ntk":  # 1 up to the trained length, then 3, 7, 15 for every doubling
            return max(1.0, 2.0 ** math.ceil(math.log2(max(prompt, 1) / trained) + 1) - 1)
        if self.rope_type == "dynamic":
            factor = value["factor"]
            assert factor is not None
            return factor * max(prompt, trained) / trained - (factor - 1)
        return 1.0

    @property
    def context(self) -> float:
        """How many positions the rule stretches to, where it says so; 0 where not."""
        value = dict(self.values)
        if self.rope_type not in ("yarn", "dynamic"):
            return 0
        return (value["factor"] or 0) * (value["original_max_position_embeddings"] or 0)

    def as_dict(self) -> dict[str, Any]:
        """In `transformers`' keys."""
        return {"rope_type": self.rope_type, **{key: value for key, value in self.values if value is not None}}


BY_PROMPT = ("dynamic", "qwen_ntk")  # rules whose angles depend on the length of a row's prompt


def inverse_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None = None, stretch: float = 1.0
) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] angle per position, factor on cos and sin).

    Plain: base^(-2i / head_dim). `stretch` is what `RopeScaling.stretch` gives. The scaled rules are those of
    `transformers`' modeling_rope_utils, and of Qwen1's published code.
    """
    if stretch != 1.0:
        base = base * stretch ** (head_dim / (head_dim - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim))
    if scaling is None or scaling.rope_type in BY_PROMPT:
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
    """cos and sin of every position: float32 [context_length, 2, head_dim / 2], on each device asked for.

    With a scaling that depends on the prompt there is a table for every stretch of the base; a batch whose rows differ
    in it gets their tables one behind the other. `logn_length` is the trained length L beyond which the query at
    position p (from 0) is multiplied by log(p + 1) / log(L) (Qwen1; arXiv:2309.16609, section 2.3).
    """

    KEPT = 4  # tables a device: prompts of ever new lengths must not fill the memory

    def __init__(
        self,
        head_dim: int,
        base: float,
        context_length: int,
        scaling: RopeScaling | None = None,
        logn_length: int | None = None,
    ) -> None:
        self.context_length = context_length
        self.logn_length = logn_length
        self._rule = (head_dim, base, scaling)
        self._tables: dict[tuple[torch.device, tuple[float, ...]], Tensor] = {}
        self._scales: dict[tuple[torch.device, int], Tensor] = {}

    def stretch(self, prompt: int) -> float:
        """Which table a row takes whose prompt has `prompt` tokens."""
        scaling = self._rule[2]
        return 1.0 if scaling is None else scaling.stretch(prompt)

    @property
    def by_prompt(self) -> bool:
        """Whether a row's angles depend on how long its prompt is."""
        scaling = self._rule[2]
        return scaling is not None and scaling.rope_type in BY_PROMPT

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def table(self, device: torch.device, stretches: tuple[float, ...] = (1.0,)) -> Tensor:
        """The tables of these stretches one behind the other: [len(stretches) * context_length, 2, head_dim / 2].

        Each is computed in float32 on the CPU (a bfloat16 position would lose integers above 256), so that its bits do
        not depend on what it is stacked with.
        """
        if (device, stretches) in self._tables:
            return self._tables[device, stretches]
        with torch.inference_mode(False):  # one that generation made must do for training
            table = self._made(device, stretches)
        if not isinstance(table, FakeTensor):  # a tracer's tensor must not outlive its trace
            while len(self._tables) >= self.KEPT:
                del self._tables[next(iter(self._tables))]
            self._tables[device, stretches] = table
        return table

    def _made(self, device: torch.device, stretches: tuple[float, ...]) -> Tensor:
        if len(stretches) > 1:
            return torch.cat([self.table(device, (stretch,)) for stretch in stretches])
        frequencies, factor = inverse_frequencies(*self._rule, stretches[0])
        angles = torch.outer(torch.arange(self.context_length, dtype=torch.float32, device="cpu"), frequencies)
        return (torch.stack((angles.cos(), angles.sin()), 1) * factor).to(device)

    def query_scale(self, device: torch.device, tables: int = 1) -> Tensor | None:
        """The factor on the query for each row of a table of so many stretches: float32; None without log-n scaling."""
        if self.logn_length is None:
            return None
        if (device, tables) not in self._scales:
            with torch.inference_mode(False):  # as above
                ends = torch.arange(1, self.context_length + 1, dtype=torch.float64, device="cpu")
                scale = (ends.log() / math.log(self.logn_length)).clamp(min=1.0).float().to(device).repeat(tables)
            if isinstance(scale, FakeTensor):
                return scale
            self._scales[device, tables] = scale
        return self._scales[device, tables]
