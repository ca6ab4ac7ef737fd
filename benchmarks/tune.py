"""`tritium tune`: finds this GPU's launch configurations and writes them into kernels/tuning/<arch>.yaml.

For every row of a kernel's table, the values of sweep.yaml are tried on the benchmark's cases that take the row. What
raises is dropped; so is what is not right: a `schedule` may not change a single bit, an `order` (varied only with
--order, as it changes bits) is held to the rule. A row is rewritten where the best is faster by more than 2% than what
it has; comments and all else in the file stay as they are.
"""

import argparse
import itertools
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tritium.kernels import tuning
from tritium.runtime.errors import Parser, TritiumError, nearest
from tritium.runtime.loading import pick_device

from .case import Call, Case, Draw, wrong
from .measure import Stopwatch, input_sets
from .rehearsal import Rehearsal
from .tables import Row, Use, flow, forget, overriding, rewritten
from .worker import find, one_line, poisoned

Timer = Callable[[list[Call], bool], float]  # calls on rotating inputs, whether they are small: seconds a call
Rehearse = Callable[[Row, Sequence[Use], Sequence[Case]], Mapping[str, str]]  # compiles; which are out, and why

GAIN = 1.02  # what a row must gain to be rewritten
WHOLE = 24  # combinations that are all tried; of more, one argument is varied after another
PASSES = 2


def sweep() -> dict[str, dict[str, dict[str, list[Any]]]]:
    """kernel -> table -> argument -> values."""
    return yaml.safe_load(Path(__file__).with_name("sweep.yaml").read_text("utf-8"))


@dataclass
class Outcome:
    """What became of one row: microseconds are geometric means over its cases."""

    row: Row
    before: Use
    after: Use
    cases: int
    seconds_before: float = math.nan
    seconds_after: float = math.nan
    tried: int = 0
    dropped: dict[str, str] = field(default_factory=dict)  # candidate -> why

    @property
    def changed(self) -> bool:
        return self.after != self.before

    def __str__(self) -> str:
        kernel, table, index = self.row
        head = f"{kernel}.{table}[{index}] {flow(self.before)}"
        if not self.cases:
            return f"{head}: no case takes it"
        gain = f"{self.seconds_before * 1e6:.2f} -> {self.seconds_after * 1e6:.2f} us over {self.cases} cases"
        what = f"-> {flow(self.after)}, {gain}" if self.changed else f"stays ({self.seconds_before * 1e6:.2f} us)"
        return f"{head}: {what}; {self.tried} tried, {len(self.dropped)} dropped"


class Tuner:
    """Tries configurations of rows on cases."""

    def __init__(
        self, device: torch.device, timer: Timer, deadline: float = math.inf, rehearse: Rehearse = lambda *_: {}
    ) -> None:
        self.device, self.timer, self.deadline, self.rehearse = device, timer, deadline, rehearse

    def rows_of(self, cases: Sequence[Case]) -> dict[Row, list[Case]]:
        """Which rows of the tables each case takes."""
        found: dict[Row, list[Case]] = {}
        for case in cases:
            with overriding() as taken:
                try:
                    case.ours(*case.make(Draw(self.device, 0)))()
                except Exception as error:
                    raise TritiumError(f"{case.name} does not run: {one_line(error)}") from error
            for row in taken:
                found.setdefault(row, []).append(case)
        return found

    def tune(self, row: Row, use: Use, values: Mapping[str, Sequence[Any]], cases: Sequence[Case]) -> Outcome:
        """The best configuration for one row."""
        outcome = Outcome(row, use, use, len(cases))
        if not cases:
            return outcome
        seed = secrets.randbits(31)
        for case in cases:
            if why := wrong(case, case.ours, self.device, seed):
                raise TritiumError(f"{row[0]}: {case.name} is wrong before anything is varied: {why}")
        subjects = [_Subject(case, self.device, seed) for case in cases]
        known: dict[str, float] = {flow(use): self._seconds(subjects)}
        outcome.seconds_before = outcome.seconds_after = known[flow(use)]

        def score(candidate: Use) -> float:
            name = flow(candidate)
            if name not in known:
                outcome.tried += 1
                try:
                    with overriding(row, candidate):
                        why = self._objection(row, subjects, seed)
                        known[name] = math.inf if why else self._seconds(subjects)
                except Exception as error:
                    why = one_line(error)
                    known[name] = math.inf
                    if poisoned(why):
                        raise TritiumError(
                            f"{row[0]}: {name} broke the device, nothing works after it: {why}"
                        ) from None
                if why:
                    outcome.dropped[name] = why
            return known[name]

        best = use
        for batch in self._batches(use, values, score):
            new = [candidate for candidate in batch if flow(candidate) not in known]
            for name, why in self.rehearse(row, new, cases).items():
                known[name] = math.inf
                outcome.dropped[name] = why
                outcome.tried += 1
            best = min([best, *self._in_time(batch)], key=score)
        if known[flow(use)] > GAIN * score(best):
            outcome.after, outcome.seconds_after = best, score(best)
        return outcome

    def _in_time(self, batch: Sequence[Use]) -> Iterator[Use]:
        for candidate in batch:
            if time.monotonic() > self.deadline:
                return
            yield candidate

    def _batches(
        self, use: Use, values: Mapping[str, Sequence[Any]], score: Callable[[Use], float]
    ) -> Iterator[Sequence[Use]]:
        """What to try next, given the scores so far; ends when the time is up."""
        ranges = {name: choices for name, choices in values.items() if name in use}
        if math.prod(map(len, ranges.values())) <= WHOLE:
            together = itertools.product(*ranges.values())
            yield [{**use, **dict(zip(ranges, combination, strict=True))} for combination in together]
            return
        best = use
        for _ in range(PASSES):
            start = best
            for name, choices in ranges.items():
                if time.monotonic() > self.deadline:
                    return
                batch = [{**best, name: choice} for choice in choices]
                yield batch
                best = min([best, *self._in_time(batch)], key=score)
            if best == start:
                return

    def _objection(self, row: Row, subjects: Sequence["_Subject"], seed: int) -> str | None:
        """Why a candidate may not be taken, however fast it is."""
        for subject in subjects:
            if row[1] == "schedule":
                if not subject.same_bits():
                    return f"{subject.case.name}: other bits"
            elif why := wrong(subject.case, subject.case.ours, self.device, seed):
                return f"{subject.case.name}: {why}"
        return None

    def _seconds(self, subjects: Sequence["_Subject"]) -> float:
        """The geometric mean over the cases."""
        logs = [math.log(self.timer(subject.calls(), subject.small)) for subject in subjects]
        return math.exp(sum(logs) / len(logs))


class _Subject:
    """A case with inputs to time it on, and what the present configuration makes of the first of them."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case = case
        sets = input_sets(case.moved, device)
        self.small = sets > 1
        self.seed, self.device = seed, device
        self.inputs = [case.make(Draw(device, seed + 1 + index)) for index in range(sets)]
        self.expected = self._bits()

    def calls(self) -> list[Call]:
        return [self.case.ours(*args) for args in self.inputs]

    def same_bits(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self._bits(), self.expected, strict=True))

    def _bits(self) -> list[Tensor]:
        args = self.case.make(Draw(self.device, self.seed))  # anew: a call may write into its arguments
        found = self.case.observe(self.case.ours(*args)(), args)
        return [x.contiguous().view(torch.uint8).clone() for x in found]


def run(
    tuner: Tuner,
    kernels: Sequence[str],
    cases_of: Callable[[str], Sequence[Case]],
    order: bool = False,
    dry_run: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Outcome]:
    """Tunes rows of the kernels' tables and writes each as it is found."""
    arch = tuning.architecture(tuner.device)
    path = tuning.FOLDER / f"{arch}.yaml"
    outcomes: list[Outcome] = []
    for kernel in kernels:
        taken = tuner.rows_of(cases_of(kernel))
        for table, values in sweep()[kernel].items():
            if table == "order" and not order:
                continue
            for index, entry in enumerate(tuning.load(arch).get(kernel, {}).get(table, [])):
                if time.monotonic() > tuner.deadline:
                    tell("the time is up: the rest stays as it is")
                    return outcomes
                row = kernel, table, index
                outcome = tuner.tune(row, entry["use"], values, taken.get(row, []))
                outcomes.append(outcome)
                tell(str(outcome))
                if outcome.changed and not dry_run:
                    path.write_text(rewritten(path.read_text("utf-8"), row, outcome.after), "utf-8")
                    forget()
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or 2 for a mistake in what was asked for."""
    parser = Parser(prog="tritium tune", description=__doc__)
    known = [name for name in sweep() if name != "decode_form"]  # which is no kernel's
    parser.add_argument("--kernel", action="append", metavar="NAME", help=f"of {', '.join(known)}; all where absent")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="stop after so long (30)")
    parser.add_argument("--order", action="store_true", help="vary what fixes the order of summation, too: bits change")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    options = parser.parse_args(arguments)
    try:
        for name in options.kernel or []:
            if name not in known:
                raise TritiumError(f"--kernel: unknown {name!r}; {nearest(name, known)}")
        if not options.minutes > 0:
            raise TritiumError(f"--minutes: must be above 0, got {options.minutes}")
        if not torch.cuda.is_available():
            raise TritiumError("it needs a GPU that Triton drives, and torch sees none")
        _on_gpu(options, known)
    except TritiumError as error:
        print(f"tritium tune: error: {error}", file=sys.stderr)
        return 2
    return 0


def _on_gpu(options: argparse.Namespace, known: Sequence[str]) -> None:
    device = pick_device("cuda")
    watch, rehearsal = Stopwatch(device, seconds=0.03), Rehearsal(device)

    def timer(calls: list[Call], small: bool) -> float:
        return watch.series({"": calls}, small, host=False)[""]["p50"]

    try:
        with torch.inference_mode():
            tuner = Tuner(device, timer, time.monotonic() + 60 * options.minutes, rehearsal)
            cases = {kernel: list(find(kernel, smoke=False).values()) for kernel in options.kernel or known}
            run(tuner, list(cases), cases.__getitem__, options.order, options.dry_run)
    finally:
        rehearsal.close()


if __name__ == "__main__":
    sys.exit(main())
