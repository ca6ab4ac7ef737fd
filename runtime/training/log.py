"""What a run tells: log.jsonl, loss.png, the progress bar; and the rates in them."""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..spec import ModelSpec

MEASURED = 0.2  # seconds for which products run


class Log:
    """The records of a run: in log.jsonl, one JSON object a line, and drawn as loss.png."""

    def __init__(self, output: Path | None, step: int) -> None:
        """Opens the log of a run that goes on from `step`: what was written of later steps goes. Without a folder the
        records are nowhere but here.
        """
        self.path = Path(os.devnull) if output is None else output / "log.jsonl"
        self.records = [] if output is None else [record for record in _read(self.path) if record["step"] <= step]
        if output is not None:
            _replace(self.path, "".join(json.dumps(record) + "\n" for record in self.records).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._can_plot = output is not None

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def plot(self) -> None:
        """Draws the loss by step. Without matplotlib it says so, once, and draws nothing."""
        if not self._can_plot or not self.records:
            return
        try:
            figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
        except ImportError:
            self._can_plot = False
            print("tritium: no loss.png: matplotlib is not installed", file=sys.stderr)
            return
        axes = figure.add_subplot()
        for name, label in (("loss", "training"), ("validation_loss", "validation")):
            points = [(record["step"], record[name]) for record in self.records if name in record]
            if points:
                marker = "." if len(points) < 50 else ""
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, linewidth=1)
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.legend()
        partial = self.path.with_name(".loss.png.partial")
        figure.savefig(partial, format="png")
        partial.replace(self.path.with_name("loss.png"))


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last may have been cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Meter:
    """Tokens per second since the last reading, and the share of the device's matmul rate that they took."""

    def __init__(self, spec: ModelSpec, peak: float) -> None:
        self._matmul = 6 * matmul_parameters(spec)
        self._attention = 6 * spec.num_cache_slots * spec.query_dim
        self.peak = peak
        self._tokens = self._operations = 0
        self._seconds = 0.0
        self._since = time.perf_counter()

    def add(self, counts: Sequence[int]) -> None:
        """Sequences of `counts` tokens were trained on."""
        tokens = sum(counts)
        self._tokens += tokens
        self._operations += self._matmul * tokens + self._attention * sum(count * count for count in counts)

    def pause(self) -> None:
        """What comes until `go_on` is no training."""
        self._seconds += time.perf_counter() - self._since

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Starts anew with what it reads."""
        self.pause()
        seconds = max(self._seconds, 1e-9)
        rates = {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "mfu": round(self._operations / seconds / self.peak, 4),
        }
        self._tokens = self._operations = 0
        self._seconds = 0.0
        self.go_on()
        return rates


def matmul_parameters(spec: ModelSpec) -> int:
    """Weights that one token is multiplied with, the output projection's included."""
    attention = spec.embedding_dim * (2 * spec.query_dim + 2 * spec.kv_dim)
    dense = spec.embedding_dim * spec.hidden_dim * (3 if spec.mlp == "gated" else 2)
    router = spec.embedding_dim * spec.num_experts
    experts = router + 3 * spec.embedding_dim * spec.expert_dim * spec.experts_per_token
    layers = sum(attention + (experts if has_experts else dense) for has_experts in spec.expert_layers)
    return layers * spec.layer_repeat + spec.vocab_size * spec.embedding_dim


@torch.no_grad()
def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large square product on this device: what a model's share is a share of."""
    size = 512 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))

    def wait() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    def seconds() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        wait()
        return time.perf_counter() - start

    began = time.perf_counter()
    best = seconds()
    while time.perf_counter() - began < MEASURED:
        best = min(best, seconds())
    return 8 * size**3 / best


def progress(steps: int, done: int, shown: bool) -> Any:
    """A bar over the steps."""
    return tqdm(total=steps, initial=done, desc="Training", unit=" steps", disable=not shown, smoothing=0.05)
