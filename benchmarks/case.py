"""One question of a benchmark: a shape, who competes on it, its floor, and what proves a result right before its time.

A contender is a function of the inputs that prepares whatever it may prepare outside the timing (layouts, plans,
compilation) and returns the call that is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from tritium.runtime.accuracy import broken, errors, widened

from .machine import Step

Call = Callable[[], Any]
Prepare = Callable[..., Call]

OURS = "tritium"


class Draw:
    """Fresh random inputs on a device, repeatable from a seed."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the dtype that is measured: bfloat16, or float32 on a CPU."""
        drawn = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=self._generator)
        return drawn.mul_(scale) if scale != 1 else drawn

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(shape, device=self.device, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device, generator=self._generator)

    def permutation(self, count: int) -> Tensor:
        """0 to count - 1 in random order, int64."""
        return torch.rand(count, device=self.device, generator=self._generator).argsort()

    def whole(self, values: Sequence[int] | range, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=self.device)


def outputs(out: Any, args: Sequence[Any]) -> Sequence[Tensor]:
    """What a call computed, where that is what it returned."""
    return [out] if isinstance(out, Tensor) else list(out)


@dataclass(frozen=True)
class Case:
    """`ours` and each of `peers` on the inputs that `make` draws, against `definition`, a function of the same inputs.

    `reads` and `writes` (bytes) and `flop` are the least that any implementation must do for one call.
    """

    name: str
    make: Callable[[Draw], Sequence[Any]]
    ours: Prepare
    definition: Callable[..., Any]
    reads: int
    writes: int
    flop: int
    peers: dict[str, Prepare] = field(default_factory=dict)
    variants: dict[str, Prepare] = field(default_factory=dict)  # our own in another mode: timed, but no peers
    observe: Callable[[Any, Sequence[Any]], Sequence[Tensor]] = outputs
    check: Callable[[Any, Sequence[Any]], str | None] | None = None  # instead of the rule: what is wrong, or None
    units: int = 1  # of what one call does, such as decode steps
    tokens: int = 0  # of one unit, where a rate of them means something
    memory: bool = False  # what a call of each contender allocates at most is measured, too
    host: bool = False  # the call waits for the device: it is timed by the host's clock and never captured
    obstacle: Callable[[torch.device], str | None] | None = None  # why it cannot be tried on a device, as for memory
    step: Callable[..., Step] | None = None  # of the inputs: a decode step's work, whose floor is then given in parts

    @property
    def moved(self) -> int:
        return self.reads + self.writes


def launcher(module: str, name: str | None = None) -> Callable[..., Any]:
    """A function of kernels/<module>.py, looked up when it is called first."""
    return getattr(import_module(f"tritium.kernels.{module}"), name or module)


def call(function: Callable[..., Any]) -> Prepare:
    """A contender that needs no preparation."""
    return lambda *args: lambda: function(*args)


def kernel(module: str, name: str | None = None, *rest: Any) -> Prepare:
    """Our launcher as a contender, with `rest` behind the inputs."""

    def prepare(*args: Any) -> Call:
        function = launcher(module, name)
        return lambda: function(*args, *rest)

    return prepare


def no_definition(*args: Any) -> Any:
    """The definition of a case that its `check` judges."""
    raise NotImplementedError("this case is judged by its check")


def wrong(case: Case, prepare: Prepare, device: torch.device, seed: int) -> str | None:
    """What is wrong with a contender's result on the inputs of `seed`, held to the rule; None where it is right."""
    args = case.make(Draw(device, seed))
    out = prepare(*args)()
    if case.check is not None:
        return case.check(out, args)
    found = case.observe(out, args)
    args = case.make(Draw(device, seed))  # again: a call may write into its arguments
    reference = case.observe(case.definition(*args), args)
    args = [widened(value) for value in case.make(Draw(device, seed))]
    truth = case.observe(case.definition(*args), args)
    for index, (got, at_dtype, exact) in enumerate(zip(found, reference, truth, strict=True)):
        if got.shape != exact.shape or got.dtype != at_dtype.dtype:
            return f"output {index} is {got.dtype} {list(got.shape)}, not {at_dtype.dtype} {list(exact.shape)}"
        if why := broken(errors(got, exact), errors(at_dtype, exact), exact):
            return f"output {index}: {why}"
    return None


def far(case: Case, prepare: Prepare, device: torch.device, seed: int) -> str | None:
    """Whether a peer computes something else: it need not round where we do, but must be near in the mean."""
    args = case.make(Draw(device, seed))
    out = prepare(*args)()
    if case.check is not None:
        return case.check(out, args)
    found = case.observe(out, args)
    args = case.make(Draw(device, seed))
    for got, expected in zip(found, case.observe(case.definition(*args), args), strict=True):
        relative = (got.double() - expected.double()).norm() / expected.double().norm()
        limit = max(8 * torch.finfo(expected.dtype).eps, 1e-4)
        if not relative.item() <= limit:
            return f"differs from the definition by {relative.item():.2g}"
    return None
