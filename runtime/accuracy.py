"""The rule that a kernel's numbers are held to, wherever they are checked: tests, `tritium verify`, benchmarks.

Truth is the definition in float64. A kernel's largest error against it may be at most twice, and its root mean square
error at most 1.2 times, that of the definition run at the kernel's dtype. What float32 arithmetic itself cannot resolve
(two units of its last place, at the truth's largest magnitude) is free. Where the definition itself overflows, nothing
is held.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MAXIMUM, RMS = 2.0, 1.2
RESOLUTION = 2.0**-22


class Errors(NamedTuple):
    """Against truth, in its units."""

    largest: float
    rms: float


def widened(value: Any) -> Any:
    """Floating-point tensors as float64, floating-point dtypes as torch.float64, anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def errors(got: Tensor, truth: Tensor) -> Errors:
    """Largest and root mean square difference; infinite where only one of the two is a number."""
    if not truth.numel():
        return Errors(0.0, 0.0)
    difference = (got.double() - truth).abs()
    same = (got.isnan() & truth.isnan()) | (got == truth)  # infinities too
    difference = difference.masked_fill(same, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return Errors(difference.max().item(), difference.square().mean().sqrt().item())


def broken(kernel: Errors, definition: Errors, truth: Tensor) -> str | None:
    """What of the rule `kernel` breaks, in words; None where it holds."""
    if not truth.numel():
        return None
    free = RESOLUTION * truth.masked_fill(~truth.isfinite(), 0.0).abs().max().item()
    for name, factor in (("largest", MAXIMUM), ("rms", RMS)):
        mine, allowed = getattr(kernel, name), factor * getattr(definition, name) + free
        if not mine <= allowed:
            return f"{name} error {mine:.3g} above {allowed:.3g}"
    return None
