"""How near do a decode step's fused linear layers come to reading their weights once, for one row and for eight?

Each weight matrix of a layer in the form in which a decode step runs it: the norm and the packed QKV projection, the
projections that are added to the residual stream, the norm, the gate and up projections and their activation, the norm
and the head with each row's best token. Peers are the same in steps: our own unfused kernels, and torch's functions
compiled.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tritium.kernels.decode_linear import (
    decode_linear_residual_reference,
    norm_head_reference,
    norm_linear_reference,
    norm_linear_swiglu_reference,
)

from ..case import Case, Draw, Prepare, kernel, launcher
from ..peers import compiled
from ..shapes import ITEM, MODELS, projections

EPS = 1e-6


def _unfused(form: str) -> Prepare:
    """The same with a launch for each step."""

    def prepare(x: Tensor, *rest: Any) -> Callable[[], Any]:
        if form == "residual":
            residual = launcher("linear", "linear_residual")
            return lambda: residual(x, *rest)
        gain, eps, weight = rest
        norm, project = launcher("rms_norm"), launcher("linear", "linear_swiglu" if form == "swiglu" else "linear")
        return lambda: project(norm(x, gain, eps), weight)

    return prepare


def _first(out: Any, args: Sequence[Any]) -> Sequence[Tensor]:
    """The logits: of equals in a peer's the best may be another."""
    return [out[0] if isinstance(out, tuple) else out]


FORMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "plain": ("norm_linear", norm_linear_reference),
    "swiglu": ("norm_linear_swiglu", norm_linear_swiglu_reference),
    "residual": ("decode_linear_residual", decode_linear_residual_reference),
    "head": ("norm_head", norm_head_reference),
}


def decode_linear(name: str, rows: int, features: int, width: int, form: str) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        x, weight = draw.normal(rows, width), draw.normal(features, width, scale=width**-0.5)
        if form == "residual":
            return x, weight, None, draw.normal(rows, features)
        return x, draw.normal(width, scale=0.3).add_(1), EPS, weight

    ours, definition = FORMS[form]
    written = rows * (features // 2 if form == "swiglu" else features)
    return Case(
        name=f"{name} {rows} x {features} x {width}",
        make=make,
        ours=kernel("decode_linear", ours),
        definition=definition,
        reads=(features * width + rows * width + (written if form == "residual" else 0)) * ITEM,
        writes=written * ITEM,
        flop=2 * rows * features * width,
        peers={"unfused": _unfused(form), "torch.compile": compiled(definition)},
        observe=_first,
    )


LAYER = {"qkv": "plain", "out": "residual", "gate_up": "swiglu", "down": "residual", "head": "head"}
CASES = [
    decode_linear(f"{model} {name}", rows, *projections(model)[name], LAYER[name])
    for model in MODELS
    for name in LAYER
    for rows in (1, 8)
]
SMOKE = [decode_linear(f"tiny {form}", 2, 64, 48, form) for form in FORMS]
