"""Root-mean-square normalisation.

    y = (x / sqrt(mean(x^2) + eps)) * weight                      (Zhang & Sennrich 2019, arXiv:1910.07467)

Shapes: x [..., N], weight [N] or anything that broadcasts against x, y like x.
Rounding: x is widened to float32 (float64 stays), normalised there, rounded to x's dtype, *then* multiplied by the
weight, which rounds once more: the order of the published Qwen and Llama code. Multiplying first changes tokens.
Floor: 2 * numel(x) * itemsize bytes moved (read x, write y) plus the weight; about 4 operations an element.
"""

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of `dtype` are taken: float32, or float64 for the truth."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in the dtype of its statistics."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float | Tensor) -> Tensor:
    """The definition, in x's dtype. `weight=None` normalises only.

    `eps` may be a tensor of no dimensions: a hot loop builds it once and saves an allocation a call.
    """
    x_wide = wide(x)
    if not isinstance(eps, Tensor):
        eps = torch.full((), eps, dtype=x_wide.dtype, device=x.device)
    length = torch.linalg.vector_norm(x_wide, 2, -1, True)
    normalised = x_wide * torch.addcmul(eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
    if x_wide is not x:
        normalised = normalised.to(x.dtype)
    return normalised if weight is None else normalised * weight
