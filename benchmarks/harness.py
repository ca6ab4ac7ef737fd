"""What every benchmark shares: interleaved timing, percentiles, and a record of where figures come from."""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "flashinfer-python", "liger-kernel")
ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("kernels", "runtime", "models", "benchmarks")  # folders whose code a figure depends on


@dataclass(frozen=True)
class Timing:
    """Seconds: the 20th, 50th and 80th percentile of a series."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        ordered = sorted(seconds)
        p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
        return cls(p20, p50, p80)


def clock(device: torch.device) -> float:
    """Now, in seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleaved(
    contenders: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 3
) -> dict[str, Timing]:
    """Times the contenders in turn, so that a machine whose speed drifts does so for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warm_up + rounds):
        for name, contender in contenders.items():
            start = clock(device)
            contender()
            if number >= warm_up:
                seconds[name].append(clock(device) - start)
    return {name: Timing.of(series) for name, series in seconds.items()}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit: what a figure needs to mean anything."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpu = {}
    if device.type == "cuda":
        gpu = {
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory,
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {
        "device": device_name(device),
        **gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _driver() -> str | None:
    """The GPU driver's version, where its own tool tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def fingerprint() -> str:
    """A digest of the code that figures depend on: where it is the same, a figure need not be taken again.

    Unlike a commit it is there outside a checkout and tells two states of an edited tree apart.
    """
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.yaml"))):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def import_root() -> Path:
    """What must be on the path of a new process for `tritium` to be this one."""
    import tritium

    return Path(tritium.__file__).resolve().parent.parent


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked where the tree differs from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write(path: str, device: torch.device, results: Any) -> None:
    """The figures with their environment, as JSON."""
    record = {"environment": environment(device), "results": results}
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
