"""All cases on one device within a time: everything is proven right first, then what was never measured is timed."""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tritium.runtime.errors import TritiumError

from .harness import ROOT, device_name, environment, fingerprint, import_root
from .record import BAD, Record, file_of, order, read, summary
from .worker import WHOLE, find, spent

KERNELS = (
    "attention", "decode_attention", "rope_decode_attention", "linear", "decode_linear", "grouped_linear", "rms_norm",
    "qk_norm_rope", "swiglu", "sampling", "quantised_linear", "routing", "combine", "layer_norm", "cross_entropy",
    "linear_cross_entropy", "advance", "decode_step", "attention_backward", "qk_norm_rope_backward",
    "grouped_linear_backward", "routing_backward",
)  # fmt: skip
OPERATIONS = (*WHOLE, *KERNELS)
PATIENCE = 240.0  # seconds for one case, compilation and the peers' included
TESTS_SHARE = 0.35  # of the time, at most, for the tests on the device
CHECKS_SHARE = 0.6  # and for proving the cases right: what is compiled by then, the next run finds compiled


class Worker:
    """One operation's process; started when first asked, and again after it ended."""

    def __init__(self, operation: str, device: str, smoke: bool) -> None:
        command = [sys.executable, "-m", "tritium.benchmarks.worker", operation, "--device", device]
        self.command = [*command, *(["--smoke"] if smoke else [])]
        path = [str(import_root()), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Several of these compile at once; and nothing here may reach for the network.
        modest = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "HF_HUB_OFFLINE": "1"}
        self.variables = {**modest, **os.environ, "PYTHONPATH": os.pathsep.join(path)}
        if smoke:
            self.variables["TRITON_INTERPRET"] = "1"
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True, env=self.variables
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _listen(process: "subprocess.Popen[str]", answers: "queue.Queue[str | None]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, or the row of a case whose process ended or took too long."""
        self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.close()
            return {"status": "timed out", "reason": f"no answer within {seconds:.0f} s"}
        except BrokenPipeError:
            answer = None
        if answer is None:
            reason = f"its process ended with code {self.process.wait()}: {self._last_words()}"
            self.close()
            return {"status": "failed", "reason": reason}
        row: dict[str, Any] = json.loads(answer)
        if spent(row):
            self.close()
        return row

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = [line for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no message"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def device_tests(device: str, seconds: float) -> dict[str, Any]:
    """The tests that need a GPU, where they and pytest are there: the last lines of their report."""
    if not (ROOT / "tests" / "kernels").is_dir():
        return {"summary": "not here"}
    # The benchmarks' own tests are the same calls through the same gate.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", "-p", "no:cacheprovider", "tests"]
    command += ["--ignore", "tests/benchmarks", *(["-n", "4"] if find_spec("xdist") else [])]
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as report:
        process = subprocess.Popen(command, cwd=ROOT, stdout=report, stderr=subprocess.STDOUT, text=True)
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        report.seek(0)
        lines = [line for line in report.read().splitlines() if line.strip()]
    last = lines[-1] if lines else "no output"
    summary_ = last.strip("= ") if code is not None else f"cut off after {seconds:.0f} s at: {last}"
    took = round(time.monotonic() - start, 1)
    return {"summary": summary_, "exit_code": code, "seconds": took, "tail": [] if code == 0 else lines[-30:]}


def select(names: Sequence[str], smoke: bool, pattern: str | None) -> dict[str, tuple[str, str]]:
    """`operation: case` -> (operation, case) of everything asked for."""
    chosen = {}
    for operation in names or OPERATIONS:
        for case in find(operation, smoke):
            key = f"{operation}: {case}"
            if pattern is None or pattern in key:
                chosen[key] = (operation, case)
    if not chosen:
        raise TritiumError(f"--case: no case's name contains {pattern!r}")
    return chosen


def run(options: argparse.Namespace) -> int:
    """Everything that `options` ask for. 0, or 1 where something is wrong."""
    begun, seconds = time.monotonic(), 60 * options.minutes
    deadline = begun + seconds
    device = torch.device(options.device)
    path = Path(options.json) if options.json else file_of(device_name(device))
    if options.smoke and not options.json:
        raise TritiumError("--smoke: give --json FILE; what it measures is no result")
    where = {**environment(device), **({"smoke": True} if options.smoke else {})}
    cases = select(options.benchmark, options.smoke, options.case)
    record = Record(path, where, fingerprint())
    record.save()  # a file that cannot be written shows now
    done = [] if options.again else [key for key in cases if record.done(key)]
    todo = {key: cases[key] for key in cases if key not in done}
    print(f"{len(cases)} cases, {len(done)} of them already measured in {path}", file=sys.stderr, flush=True)
    workers = {operation: Worker(operation, options.device, options.smoke) for operation, _ in todo.values()}
    found: dict[str, dict[str, Any]] = {}
    prior = {**read(file_of(device_name(device)))["rows"], **record.rows}
    try:
        with ThreadPoolExecutor(max(1, len(workers) + 1)) as pool:
            tests = None
            if options.tests and record.values.get("tests", {}).get("fingerprint") != record.fingerprint:
                tests = pool.submit(device_tests, options.device, TESTS_SHARE * seconds)
            at_once = len(workers) if device.type == "cuda" else 1
            for checked in _check(todo, workers, pool, at_once, begun + CHECKS_SHARE * seconds):
                for key, row in checked.items():
                    found[key] = row
                    record.put(key, row)
                    _tell(key, row)
            if tests is not None:
                record.note("tests", {**tests.result(), "fingerprint": record.fingerprint})
        right = [key for key in todo if found.get(key, {}).get("status") == "right"]
        if right and time.monotonic() < deadline:
            limits = workers[todo[right[0]][0]].ask({"do": "ceilings"}, PATIENCE)
            if "reason" in limits:
                raise TritiumError(f"the ceilings could not be measured: {limits['reason']}")
            record.note("ceilings", limits)
            for key in order(right, prior):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                operation, case = todo[key]
                request = {"do": "time", "case": case, "ceilings": limits, "absent": found[key]["absent"]}
                found[key] = row = workers[operation].ask(request, min(PATIENCE, left + 5))
                if row["status"] == "timed out" and time.monotonic() >= deadline:
                    found[key] = {"status": "right"}  # its time was up, not its patience
                    break
                record.put(key, row)
                _tell(key, row)
    finally:
        for worker in workers.values():
            worker.close()
    return _finish(record, path, found, options.plot)


def _check(
    todo: Mapping[str, tuple[str, str]],
    workers: Mapping[str, Worker],
    pool: ThreadPoolExecutor,
    at_once: int,
    deadline: float,
) -> Iterator[dict[str, dict[str, Any]]]:
    """Checks every case, an operation a thread: on a GPU all operations at once, as compiling takes the most of it."""
    answers: queue.Queue[dict[str, dict[str, Any]] | None] = queue.Queue()
    turn = threading.Semaphore(max(1, at_once))

    def check(operation: str) -> None:
        with turn:
            try:
                for key, (owner, case) in todo.items():
                    left = deadline - time.monotonic()
                    if owner == operation and left > 0:
                        request = {"do": "check", "case": case}
                        row = workers[operation].ask(request, min(PATIENCE, left + 5))
                        if row["status"] != "timed out" or time.monotonic() < deadline:
                            answers.put({key: row})
            finally:
                answers.put(None)

    for operation in workers:
        pool.submit(check, operation)
    for _ in workers:
        while (answer := answers.get()) is not None:
            yield answer


def _tell(key: str, row: Mapping[str, Any]) -> None:
    more = f" {row['times']['tritium']['p50']:.1f} us" if row["status"] == "measured" else ""
    print(f"{key}: {row['status']}{more} {row.get('reason', '')}".rstrip(), file=sys.stderr, flush=True)


def _finish(record: Record, path: Path, found: Mapping[str, Mapping[str, Any]], plot: str | None) -> int:
    from .plots import draw

    record.save()
    print(summary(record.values))
    print(draw(record.values, Path(plot) if plot else path.with_suffix(".png")))
    bad = [key for key, row in found.items() if row["status"] in BAD]
    failed_tests = record.values.get("tests", {}).get("exit_code") not in (None, 0, 5)
    if bad:
        print(f"{len(bad)} of {len(record.rows)} cases are wrong or failed", file=sys.stderr)
    return int(bool(bad) or failed_tests)
