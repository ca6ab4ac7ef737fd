"""The rule that every kernel is held to, and what its tests share.

Truth is the definition in float64. A kernel's largest error against it may be at most twice, and its root mean square
error at most 1.2 times, that of the definition run at the kernel's dtype.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MAXIMUM, RMS = 2.0, 1.2

needs_gpu = pytest.mark.gpu


def double(value: Any) -> Any:
    """Floating-point tensors as float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def truth_of(definition: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The definition's result in float64 on the same (rounded) inputs."""
    return definition(*map(double, args), **{name: double(value) for name, value in kwargs.items()})


def errors(got: Tensor, truth: Tensor) -> tuple[float, float]:
    """(largest, root mean square) difference; infinite where one is NaN and the other is not."""
    difference = (got.double() - truth).abs()
    difference = torch.where(got.isnan() & truth.isnan(), 0.0, difference).nan_to_num(float("inf"))
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_rule(got: Tensor, reference: Tensor, truth: Tensor, what: str = "") -> None:
    """Holds `got` to the rule. `reference` is the definition at the kernel's dtype, `truth` the one in float64.

    What float32 arithmetic itself cannot resolve (two units of its last place at the truth's magnitude) is free.
    """
    assert got.shape == truth.shape
    assert got.dtype == reference.dtype
    if not truth.numel():
        return
    free = 2.0**-22 * truth.nan_to_num(0.0).abs().max().item()
    largest, rms = errors(got, truth)
    largest_allowed, rms_allowed = errors(reference, truth)
    assert largest <= MAXIMUM * largest_allowed + free, f"{what} largest {largest:.3g}, definition {largest_allowed:.3g}"
    assert rms <= RMS * rms_allowed + free, f"{what} rms {rms:.3g}, definition {rms_allowed:.3g}"


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN and signed zeros included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
