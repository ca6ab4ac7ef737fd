"""What a process of a run tells the others. Here: one that is alone; one of several is in group.py."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from .optimizer import gradient_norm

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process of `world` that share out the micro-batches, and what it exchanges with the others."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes checkpoints and the log, and shows the progress."""
        return self.rank == 0

    @property
    def count(self) -> int:
        """All processes, those that work on one micro-batch together included."""
        return self.world

    @property
    def device(self) -> torch.device | None:
        """Where this process is to compute; None: where the configuration says."""
        return None

    def share(self, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """(number, item) of those that are this process's: every `world`-th."""
        return ((number, item) for number, item in enumerate(items) if number % self.world == self.rank)

    def together(self, work: Callable[[], T]) -> T:
        """What every process does for itself. Where it fails on one, it fails on all, with the same TritiumError."""
        return work()

    def first(self, work: Callable[[], None]) -> None:
        """What the first process does while the others wait. Where it fails, it fails on all."""
        work()

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag

    def total(self, value: Tensor) -> Tensor:
        """The sum of a scalar over the processes that share out the micro-batches."""
        return value

    def spread(self, model: Decoder, compute_dtype: torch.dtype) -> None:
        """Leaves of a whole model what this process is to hold. Its parameters may be other objects afterwards."""

    def expect(self, model: Decoder, last: bool) -> None:
        """Said before each of this process's micro-batches of a step: whether it is the last."""

    def release(self, model: Decoder) -> None:
        """Said after forwards without a backward."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes every gradient the sum over all processes."""

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The Euclidean norm of the whole model's gradient, float32."""
        return gradient_norm(parameters)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """For the first process, the whole of what each holds of parameter `name`, or as large beside it."""
        return tensor

    def whole_model(self, model: Decoder) -> Decoder:
        """For the first process, the model in one piece."""
        return model

    def whole_shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        """The shape of `whole`."""
        return tuple(parameter.shape)

    def part(self, name: str, whole: Tensor, parameter: Tensor) -> Tensor:
        """The reverse of `whole`: what this process holds, in the form of `parameter`."""
        return whole
