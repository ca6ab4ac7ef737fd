"""How near do the batch-invariant products come to cuBLAS, and for few tokens to the speed of reading the weights?

Each weight matrix of a layer in the form in which a model runs it: plain (qkv, head), added to the residual stream
(out, down), gated (gate_up). On a GPU, torch's products are those of cuBLAS. The gradients' products are the vendor's:
what is measured there is the gated form, which computes its projection anew.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tritium.kernels.linear import linear_reference, linear_residual_reference, linear_swiglu_reference

from ..case import Case, Draw, Prepare, call, kernel
from ..peers import compiled
from ..shapes import ITEM, MODELS, projections
from .swiglu import differentiated


def linear(name: str, tokens: int, features: int, width: int, form: str = "plain") -> Case:
    """`form` is plain, residual or swiglu."""

    def make(draw: Draw) -> tuple[Any, ...]:
        x, weight = draw.normal(tokens, width), draw.normal(features, width, scale=width**-0.5)
        return (x, weight, None, draw.normal(tokens, features)) if form == "residual" else (x, weight)

    ours: dict[str, Prepare] = {
        "plain": kernel("linear"),
        "residual": kernel("linear", "linear_residual"),
        "swiglu": kernel("linear", "linear_swiglu"),
    }
    definitions: dict[str, Callable[..., Any]] = {
        "plain": linear_reference,
        "residual": linear_residual_reference,
        "swiglu": linear_swiglu_reference,
    }
    definition = definitions[form]
    peers = {"torch": call(definition)}
    if form == "plain":
        peers = {"F.linear": call(F.linear)}
    elif form == "swiglu":
        peers["torch.compile"] = compiled(linear_swiglu_reference)
    written = tokens * (features // 2 if form == "swiglu" else features)
    return Case(
        name=f"{name} {tokens} x {features} x {width}",
        make=make,
        ours=ours[form],
        definition=definition,
        reads=(features * width + tokens * width + (written if form == "residual" else 0)) * ITEM,
        writes=written * ITEM,
        flop=2 * tokens * features * width,
        peers=peers,
    )


def backward(name: str, tokens: int, features: int, width: int) -> Case:
    """Of the gated form: both gradients, and the projection."""

    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(tokens, features // 2), draw.normal(tokens, width), draw.normal(features, width, scale=0.05)

    gradients = differentiated(linear_swiglu_reference, wanted=(0, 1))
    return Case(
        name=f"{name} backward {tokens} x {features} x {width}",
        make=make,
        ours=differentiated(torch.ops.tritium.linear_swiglu, wanted=(0, 1)),
        definition=lambda *args: gradients(*args)(),
        reads=(features * width + tokens * width + tokens * features // 2) * ITEM,
        writes=(features * width + tokens * width) * ITEM,
        flop=6 * tokens * features * width,
        peers={"torch": gradients},
    )


FORMS = {"qkv": "plain", "out": "residual", "gate_up": "swiglu", "down": "residual", "head": "plain"}
TOKENS = {"qwen3 0.6B": (1, 2048), "qwen3 8B": (1, 16, 2048), "mobilellm 950m": (1,)}
CASES = [
    *(
        linear(f"{model} {name}", tokens, *projections(model)[name], FORMS[name])
        for model in MODELS
        for tokens in TOKENS[model]
        for name in FORMS
        if name != "head" or tokens == 1
    ),
    linear("square", 8192, 8192, 8192),
    *(backward(f"{model} gate_up", 2048, *projections(model)["gate_up"]) for model in MODELS),
]
SMOKE = [
    linear("tiny plain", 3, 48, 32),
    linear("tiny residual", 2, 32, 48, "residual"),
    linear("tiny swiglu", 2, 64, 32, "swiglu"),
    backward("tiny swiglu", 3, 64, 32),
]
