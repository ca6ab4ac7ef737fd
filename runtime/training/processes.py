"""How many processes share a run. Here: one."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """One process of `world`, and what it exchanges with the others."""

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the log and shows the progress."""
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[tuple[int, T]]:
        """(number, item) of those that are this process's: every `world`-th."""
        return ((number, item) for number, item in enumerate(items) if number % self.world == self.rank)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a scalar over all processes."""
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Makes every gradient the sum over all processes."""
