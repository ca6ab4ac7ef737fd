"""Cross-entropy of next-token prediction.

    loss = mean over the rows whose label is not `ignore_index` of  logsumexp(logits) - logits[label]

Shapes: logits [T, V], labels [T] int64, loss a scalar.
Rounding: float32 throughout (float64 stays). With nothing to predict the loss is 0.
Floor: numel(logits) * itemsize bytes read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rms_norm import wide

IGNORE_INDEX = -100


def cross_entropy_reference(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The definition: the mean loss in nats, float32 or float64."""
    total = F.cross_entropy(wide(logits), labels, ignore_index=ignore_index, reduction="sum")
    return total / torch.clamp((labels != ignore_index).sum(), min=1)
