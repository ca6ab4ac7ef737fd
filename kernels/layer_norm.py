"""Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias        (Ba et al. 2016, arXiv:1607.06450)

Shapes: x [..., N], weight and bias [N] or None, y like x. The variance is the biased one (divided by N).
Rounding: statistics and the affine map in float32 (float64 stays), one rounding to x's dtype at the end, as torch does.
Floor: 2 * numel(x) * itemsize bytes moved plus weight and bias; about 7 operations an element.
"""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition, in x's dtype."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
