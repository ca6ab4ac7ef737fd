"""Loading a model beside reading its file: both from the page cache, where a checkpoint is after its first reading.

Beside them stands one `copy_` of the mapped file, as a whole, into new memory of the model's dtype: what loading
tensor by tensor would take that cost nothing but the copy, and found its memory as the system gives it.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tritium.runtime import checkpoint
from tritium.runtime.decoder import Decoder
from tritium.runtime.loading import load_model, pick_device
from tritium.runtime.spec import DTYPES

from .harness import Timing, clock, environment, table, write
from .shapes import spec

MODEL = "qwen3 0.6B"
TO = ("bfloat16", "float32")
ROUNDS = 5
BUFFER = 16 * 2**20


def sample(directory: Path, dtype: str, device: torch.device, threads: int) -> dict[str, float]:
    """Seconds to read a checkpoint's file, to copy it once, and to load it to a device."""
    torch.set_num_threads(threads)
    (path,) = checkpoint.weight_files(directory)
    size = path.stat().st_size

    def read() -> None:
        buffer = memoryview(bytearray(BUFFER))
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def copy() -> None:
        source = torch.from_file(str(path), size=size // 2, dtype=torch.bfloat16)
        torch.empty(size // 2, dtype=DTYPES[dtype], device=device).copy_(source)

    def load() -> None:
        with torch.device("meta"):
            model = Decoder(checkpoint.read_spec(directory)).to(DTYPES[dtype])
        checkpoint.load_weights(model, directory, progress=False, device=device)

    def seconds(call: Callable[[], None]) -> float:
        start = clock(device)
        call()
        return clock(device) - start

    read()  # into the page cache
    return {"read": seconds(read), "copy": seconds(copy), "load": seconds(load)}


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    device = pick_device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    results = []
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        checkpoint.save_pretrained(load_model(spec(MODEL), device="cpu", dtype="bfloat16"), directory)
        size = sum(path.stat().st_size for path in checkpoint.weight_files(directory))
        for dtype in TO:
            series = [_apart(directory, dtype, device) for _ in range(ROUNDS)]
            timed = {name: Timing.of([one[name] for one in series]) for name in series[0]}
            seconds = {f"{name}_seconds": vars(timing) for name, timing in timed.items()}
            results.append({"model": MODEL, "file_bytes": size, "to": dtype, **seconds})
            print(f"{MODEL} to {dtype}: measured", file=sys.stderr, flush=True)
    print(summary({"environment": environment(device), "results": results}))
    if options.json:
        write(options.json, device, results)


def _apart(directory: Path, dtype: str, device: torch.device) -> dict[str, float]:
    """A sample in a process of its own: in a used one, memory would be there already."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(sample, directory, dtype, device, torch.get_num_threads()).result()


def summary(record: dict[str, Any]) -> str:
    """The figures of a results file as a table, with what they were measured on."""
    rows = [("checkpoint", "GB", "to", "read GB/s", "one copy GB/s", "load GB/s", "load s")]
    for row in record["results"]:
        rates = (row["file_bytes"] / row[f"{name}_seconds"]["p50"] / 1e9 for name in ("read", "copy", "load"))
        rows.append(
            (
                row["model"],
                f"{row['file_bytes'] / 1e9:.2f}",
                row["to"],
                *(f"{rate:.2f}" for rate in rates),
                f"{row['load_seconds']['p50']:.2f}",
            )
        )
    where = record["environment"]
    lines = (
        "a warm file of bfloat16; GB of the file a second, medians of new processes;",
        f"{where['device']}, {where['threads']} threads, torch {where['versions']['torch']}; {where['date']}",
    )
    return "\n".join((table(rows), "", *lines))
