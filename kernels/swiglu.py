"""The gated feed-forward's activation, over the packed projection.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z)               (Shazeer 2020, arXiv:2002.05202)

Shapes: gate_up [..., 2F] with the gate in the first F columns and up in the last F, y [..., F].
Rounding: silu is computed in float32 (float64 stays) and rounds to the input dtype; the product rounds once more.
Floor: 3 * numel(y) * itemsize bytes moved; about 5 operations an element.
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition, in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
