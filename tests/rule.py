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


def room_around_outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Whatever a launcher allocates from now on (new_empty) lies between marks of 7: the list of it, as it grows."""
    rooms: list[Tensor] = []
    new_empty = Tensor.new_empty

    def with_room(like: Tensor, *shape: Any, **options: Any) -> Tensor:
        if options:  # not the launcher: the interpreter
            return new_empty(like, *shape, **options)
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        rooms.append(torch.full((size.numel() + 128,), 7.0, dtype=like.dtype, device=like.device))
        return rooms[-1][64:-64].view(size)

    monkeypatch.setattr(Tensor, "new_empty", with_room)
    return rooms
