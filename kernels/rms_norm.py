"""Root-mean-square normalisation.

    y = (x / sqrt(mean(x^2) + eps)) * weight                      (Zhang & Sennrich 2019, arXiv:1910.07467)

Shapes: x [..., N], weight [N] or anything that broadcasts against x, y like x.
Rounding: x is widened to float32 (float64 stays), normalised there, rounded to x's dtype, *then* multiplied by the
weight, which rounds once more: the order of the published Qwen and Llama code. Multiplying first changes tokens.
Floor: 2 * numel(x) * itemsize bytes moved (read x, write y) plus the weight; about 4 operations an element.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` are taken: float32, or float64 for the truth."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of its statistics."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class Scaled(NamedTuple):
    """A weight and its eps, prepared once for many float32 calls: see `scaled`."""

    gain: Tensor  # weight * sqrt(N)
    floor: Tensor  # sqrt(N * eps), no dimensions


def scaled(weight: Tensor | None, eps: float, like: Tensor, width: int) -> Scaled | None:
    """What `rms_norm_reference` takes in place of a weight [..., width] to save half of its steps; float32 only.

    x / sqrt(mean(x^2) + eps) * weight = x / hypot(|x|, sqrt(N eps)) * (weight sqrt(N)), with one rounding elsewhere.
    """
    if like.dtype != torch.float32:
        return None
    root = torch.full((), width**0.5, dtype=like.dtype, device=like.device)
    return Scaled(root if weight is None else weight * root, root * eps**0.5)


def rms_norm_reference(x: Tensor, weight: Tensor | Scaled | None, eps: float) -> Tensor:
    """The definition, in x's dtype. `weight=None` normalises only."""
    if isinstance(weight, Scaled):
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), weight.floor) * weight.gain
    x_wide = wide(x)
    normalised = (x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normalised if weight is None else normalised * weight
