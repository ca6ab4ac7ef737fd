"""The process in which one operation's cases are checked and timed: what breaks in it breaks nothing else.

It reads requests from its standard input and answers each with one line of JSON: {"do": "ceilings"} with the device's
ceilings, {"do": "check", "case": ...} and {"do": "time", "case": ..., "ceilings": ..., "absent": ...} with a row, whose
`absent` says which peers are not there, and why.
"""

import argparse
import gc
import json
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .case import OURS, Call, Case, Draw, far, wrong
from .launches import limits
from .machine import Gap, floor_parts
from .measure import Stopwatch, floor, input_sets
from .shapes import ITEM

WHOLE = ("models", "experts", "training", "dropin")
"""Benchmarks of more than one kernel: files beside this one."""

ELSEWHERE = {"decode_form": "cells"}
"""Tables of no kernel: the file beside this one that has the cases which take their rows."""

BROKEN = ("CUDA error", "HIP error", "illegal memory", "device-side assert", "unspecified launch failure")


def one_line(error: BaseException) -> str:
    """An exception in a line that fits into a table's footnote."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def poisoned(*reasons: str) -> bool:
    """Whether, after one of these, nothing on the device works any more in this process."""
    return any(text in reason for text in BROKEN for reason in reasons)


def spent(row: Mapping[str, Any]) -> bool:
    """Whether the process that gave this row is of no more use."""
    return poisoned(row.get("reason", ""), *row.get("absent", {}).values())


def find(operation: str, smoke: bool) -> dict[str, Case]:
    """The cases of an operation, by name and in order. A backward that is in its operation's file has that one's."""
    file = operation
    if not (Path(__file__).parent / "kernels" / f"{operation}.py").is_file():
        file = operation.removesuffix("_backward")
    file = ELSEWHERE.get(file, file)
    module = import_module(f".{file}" if file in (*WHOLE, *ELSEWHERE.values()) else f".kernels.{file}", __package__)
    return {case.name: case for case in (module.SMOKE if smoke else module.CASES)}


class Bench:
    """One operation's cases on one device."""

    def __init__(self, operation: str, device: torch.device, smoke: bool = False, seconds: float = 0.15) -> None:
        self.cases = find(operation, smoke)
        self.device, self.smoke = device, smoke
        self.watch = Stopwatch(device, seconds, smoke)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["do"] == "ceilings":
            return limits(self.device, self.smoke)
        case = self.cases[request["case"]]
        try:
            with torch.inference_mode():
                if request["do"] == "check":
                    found = self.check(case)
                else:
                    found = self.time(case, request["ceilings"], request["absent"])
        except Exception as error:  # whatever a kernel raises is this case's result
            found = {"status": "failed", "reason": one_line(error)}
        gc.collect()
        if self.device.type == "cuda" and not spent(found):
            torch.cuda.empty_cache()
        return found

    def check(self, case: Case) -> dict[str, Any]:
        """Ours against the definition on fresh inputs; then which peers are there and compute the same."""
        if case.obstacle is not None and (reason := case.obstacle(self.device)) is not None:
            return {"status": "skipped", "reason": reason}
        seed = secrets.randbits(31)
        if reason := wrong(case, case.ours, self.device, seed):
            return {"status": "wrong", "reason": reason, "seed": seed}
        absent: dict[str, str] = {}
        for name, peer in (case.peers | case.variants).items():
            try:
                if reason := far(case, peer, self.device, seed):
                    absent[name] = reason
            except Exception as error:
                absent[name] = one_line(error)
                if poisoned(absent[name]):  # those after it cannot be judged here
                    rest = list(case.peers | case.variants)
                    absent |= dict.fromkeys(rest[rest.index(name) + 1 :], f"{name} broke the device before it")
                    break
        return {"status": "right", "seed": seed, "absent": absent}

    def time(self, case: Case, ceilings: Mapping[str, float], absent: Mapping[str, str]) -> dict[str, Any]:
        """All contenders of a case that is right, in turn."""
        factor = 2 if self.device.type == "cpu" else 1  # float32 elements where floors count bfloat16's
        assert ITEM == 2
        reads, writes = factor * case.reads, factor * case.writes
        sets = 1 if case.host else input_sets(reads + writes, self.device)
        inputs = [case.make(Draw(self.device, secrets.randbits(31))) for _ in range(sets)]
        contenders: dict[str, list[Call]] = {OURS: [case.ours(*args) for args in inputs]}
        for name, peer in (case.peers | case.variants).items():
            if name not in absent:
                try:
                    contenders[name] = [peer(*args) for args in inputs]
                except Exception as error:  # beside the others there may be no memory for it
                    absent = {**absent, name: one_line(error)}
        timed = self.watch.series(contenders, small=sets > 1, host=case.host)
        peaks = self._peaks(contenders) if case.memory and self.device.type == "cuda" else {}
        seconds = {name: entry["p50"] / case.units for name, entry in timed.items()}
        bound, ceiling = floor(reads, writes, case.flop, ceilings)
        step = case.step(*inputs[0]).scaled(factor) if case.step else None
        gap = Gap(seconds[OURS], floor_parts(step, ceilings)) if step else None
        work = case.flop if ceiling == "matmul" else reads + writes
        best = min((name for name in seconds if name in case.peers), key=seconds.__getitem__, default=None)
        return {
            "status": "measured",
            "dtype": str(Draw(self.device, 0).dtype).removeprefix("torch."),
            "bytes": reads + writes,
            "flop": case.flop,
            "times": {name: _microseconds(entry, case.units) for name, entry in timed.items()},
            "absent": absent,
            "ceiling": ceiling,
            "floor_us": bound * 1e6,
            "achieved_per_second": work / seconds[OURS],
            "share_of_ceiling": bound / seconds[OURS],
            "best_peer": best,
            "ratios": {name: value / seconds[OURS] for name, value in seconds.items() if name != OURS},
            **({"gap": gap.as_dict()} if gap else {}),
            **({"peak_bytes": peaks} if peaks else {}),
            **({"tokens_per_second": case.tokens / seconds[OURS]} if case.tokens else {}),
        }

    def _peaks(self, contenders: Mapping[str, Sequence[Call]]) -> dict[str, int]:
        """Bytes that are allocated at most while each contender runs once, what all of them hold included."""
        peaks = {}
        for name, calls in contenders.items():
            torch.cuda.reset_peak_memory_stats(self.device)
            calls[0]()
            torch.cuda.synchronize(self.device)
            peaks[name] = torch.cuda.max_memory_allocated(self.device)
        return peaks


def _microseconds(entry: Mapping[str, Any], units: int) -> dict[str, Any]:
    percentiles = {name: entry[name] * 1e6 / units for name in ("p20", "p50", "p80")}
    return {**percentiles, "method": entry["method"], "repetitions": entry["repetitions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operation")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    # Libraries print to standard output: the answers go to a copy of it, and prints to the errors.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if options.smoke:
        torch.set_num_threads(1)
    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            bench = bench or Bench(options.operation, torch.device(options.device), options.smoke)
            found = bench.answer(request)
        except Exception as error:
            found = {"status": "failed", "reason": one_line(error)}
        print(json.dumps(found), file=answers, flush=True)
        if spent(found):
            return  # the next case gets a fresh process


if __name__ == "__main__":
    main()
