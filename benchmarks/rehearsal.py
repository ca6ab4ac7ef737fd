"""Candidates run once in processes of their own before they are timed: their code is compiled on all cores at once.

Triton keeps what it compiles on disk, where the timing process finds it. A candidate that raises, or takes its process
with it, is out before it can do harm to the one that times.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from .case import Case, Draw
from .harness import clock, import_root
from .tables import Row, Use, flow, forget, overriding
from .worker import find, one_line, poisoned

PROCESSES = 12
_lost: list[str] = []  # of this process: why its device is of no use any more


def _play(row: Row, use: Use, names: Sequence[str], device: str) -> str | None:
    """Runs the named cases under a configuration; what it raises, in a line."""
    if _lost:
        return None
    forget()  # rows may have been written since
    cases: Mapping[str, Case] = find(row[0], smoke=False)
    try:
        with torch.inference_mode(), overriding(row, use):
            for name in names:
                cases[name].ours(*cases[name].make(Draw(torch.device(device), 0)))()
                clock(torch.device(device))  # what a kernel does to the device shows once it has ended
    except Exception as error:
        reason = one_line(error)
        if poisoned(reason):
            _lost.append(reason)
        return reason
    return None


class Rehearsal:
    """A pool of processes on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = str(device)
        if (root := str(import_root())) not in sys.path:  # new processes get this one's path
            sys.path.append(root)
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, row: Row, candidates: Sequence[Use], cases: Sequence[Case]) -> dict[str, str]:
        """Which candidates cannot be had, and why; the others are compiled."""
        names = [case.name for case in cases]
        dropped = {}
        pool = self._pool = self._pool or self._start()
        futures = [(flow(use), pool.submit(_play, row, use, names, self.device)) for use in candidates]
        for name, future in futures:
            try:
                if reason := future.result():
                    dropped[name] = reason
            except BrokenProcessPool:  # whose fault it was is not known: whoever had no answer yet is out
                dropped[name] = "its process ended"
                self._pool = None
        return dropped

    @staticmethod
    def _start() -> ProcessPoolExecutor:
        count = max(1, min(PROCESSES, (os.cpu_count() or 2) - 1))
        return ProcessPoolExecutor(count, mp_context=get_context("spawn"))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
