"""What the tests of kernels share: the rule of runtime/accuracy.py, inputs, comparison to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime.accuracy import broken, errors, widened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

needs_gpu = pytest.mark.gpu


def truth_of(definition: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The definition's result in float64 on the same (rounded) inputs."""
    return definition(*map(widened, args), **{name: widened(value) for name, value in kwargs.items()})


def assert_rule(got: Tensor, reference: Tensor, truth: Tensor, what: str = "") -> None:
    """Holds `got` to the rule. `reference` is the definition at the kernel's dtype, `truth` the one in float64."""
    assert got.shape == truth.shape
    assert got.dtype == reference.dtype
    assert broken(errors(got, truth), errors(reference, truth), truth) is None, what


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same at every call on one kind of device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN and signed zeros included."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
