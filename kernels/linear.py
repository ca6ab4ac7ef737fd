"""The linear layer, and the linear layer added to the residual stream.

    y = x @ weight^T + bias                 r' = r + (x @ weight^T + bias)

Shapes: x [T, K], weight [N, K], bias [N] or None, r and r' [T, N], y [T, N].
Rounding: products accumulate in at least float32; the sum with bias, and then with the residual, each rounds once to
x's dtype (the fused residual form may round only once, which is nearer to truth).
Floor: (N * K + T * (K + N)) * itemsize bytes, T * N more for the residual; 2 * T * N * K operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to this many rows, CPU libraries are up to twice as fast with the weight as the left operand (measured from 2 to 16
# rows at widths 128 and 576); for one row there is no difference.
FEW_ROWS = 16


def _weight_left(x: Tensor) -> bool:
    return x.is_cpu and x.dim() == 2 and 1 < x.shape[0] <= FEW_ROWS


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias, [T, K] -> [T, N]."""
    if bias is None and _weight_left(x):
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight, bias)


def linear_residual_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight^T + bias, [T, K] and [T, N] -> [T, N]; the residual is not overwritten."""
    if bias is not None:
        return residual + F.linear(x, weight, bias)
    if _weight_left(x):
        return residual + torch.mm(weight, x.t()).t()
    return torch.addmm(residual, x, weight.t())
