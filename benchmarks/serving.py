"""Many sequences at a time: the engine beside `generate` in batches as they come, and one by one.

The common workload, drawn as nano-vllm's benchmark draws it: 256 prompts of 100 to 1024 tokens, after each 100 to 1024
new ones, sampled at temperature 0.6, no EOS. Random weights: what is timed does not depend on them. A batch of
`generate` runs until its longest sequence has its tokens; only those asked for count. One by one only the first few
run, whose tokens must be the engine's. The engine is warm: it had all sequences once, and forgot them.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tritium.runtime.decoder import Decoder
from tritium.runtime.engine.engine import Engine
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.loading import load_model, pick_device

from .harness import clock, environment, table, write
from .shapes import spec

MODEL = "qwen3 0.6B"
SEQUENCES, SHORTEST, LONGEST, IDS = 256, 100, 1024, 10000
TEMPERATURE = 0.6
BATCH = 64  # of `generate`
ALONE = 4  # sequences one by one


@dataclass(frozen=True)
class Continued:
    """A prompt and how it is continued."""

    prompt: list[int]
    options: SamplingOptions


def workload(sequences: int, shortest: int, longest: int, ids: int) -> list[Continued]:
    """Drawn in the order in which nano-vllm's bench.py draws it, with the seed 0."""
    draw = random.Random(0)
    prompts = [[draw.randint(0, ids) for _ in range(draw.randint(shortest, longest))] for _ in range(sequences)]
    lengths = [draw.randint(shortest, longest) for _ in range(sequences)]
    return [
        Continued(prompt, SamplingOptions(length, TEMPERATURE, top_p=1.0, seed=index))
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def by_engine(engine: Engine, work: Sequence[Continued]) -> list[list[int]]:
    engine.forget()
    requests = [engine.submit(one.prompt, one.options) for one in work]
    for _ in engine.run():
        pass
    return [request.tokens for request in requests]


def in_batches(model: Decoder, work: Sequence[Continued], size: int) -> list[list[int]]:
    """Batches of `generate`, in the order of the sequences: each row draws with its own seed, as those count up."""
    found = []
    for start in range(0, len(work), size):
        batch = work[start : start + size]
        longest = max(one.options.max_new_tokens for one in batch)
        options = SamplingOptions(longest, TEMPERATURE, top_p=1.0, seed=batch[0].options.seed)
        rows = zip(*generate(model, [one.prompt for one in batch], options), strict=True)
        found += [list(row[: one.options.max_new_tokens]) for row, one in zip(rows, batch, strict=True)]
    return found


def measure(model: Decoder, work: Sequence[Continued]) -> list[dict[str, Any]]:
    """A row a contender. Raises TritiumError where two do not give the same tokens."""
    held = [Engine(model)]
    # How many sequences each runs, and how many before it is timed.
    contenders: dict[str, tuple[int, int, Callable[[Sequence[Continued]], list[list[int]]]]] = {
        "engine": (len(work), len(work), lambda some: by_engine(held[0], some)),
        f"generate, {BATCH} at a time": (len(work), BATCH, lambda some: in_batches(model, some, BATCH)),
        "generate, one by one": (min(ALONE, len(work)), 1, lambda some: in_batches(model, some, 1)),
    }
    rows: list[dict[str, Any]] = []
    expected: list[list[int]] = []
    for name, (count, warm, run) in contenders.items():
        run(work[:warm])
        start = clock(model.device)
        found = run(work[:count])
        seconds = clock(model.device) - start
        expected = expected or found
        if found != expected[:count]:
            raise TritiumError(f"serving: {name} gives other tokens than the engine")
        new, prompts = sum(map(len, found)), sum(len(one.prompt) for one in work[:count])
        figures = {"sequences": count, "prompt_tokens": prompts, "new_tokens": new, "seconds": seconds}
        rows.append({"contender": name, **figures})
        held.clear()  # the others need its memory
        print(f"{name}: measured", file=sys.stderr, flush=True)
    return rows


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(spec(MODEL), device=device).initialise(std=0.05).requires_grad_(False)
    work = workload(SEQUENCES, SHORTEST, LONGEST, min(IDS, model.config.vocab_size - 1))
    results = [{"model": MODEL, **row} for row in measure(model, work)]
    print(summary({"environment": environment(device), "results": results}))
    if options.json:
        write(options.json, device, results)


def summary(record: dict[str, Any]) -> str:
    """The figures of a results file as a table, with what they were measured on."""
    rows = [("model", "contender", "sequences", "prompt tokens", "new tokens", "seconds", "new tokens/s")]
    for row in record["results"]:
        counts = (str(row[name]) for name in ("sequences", "prompt_tokens", "new_tokens"))
        rate = row["new_tokens"] / row["seconds"]
        rows.append((row["model"], row["contender"], *counts, f"{row['seconds']:.1f}", f"{rate:.1f}"))
    where = record["environment"]
    versions = " ".join(
        f"{name} {where['versions'][name]}" for name in ("torch", "triton") if name in where["versions"]
    )
    return "\n".join((table(rows), "", f"{where['device']}, {versions}; {where['date']}"))
