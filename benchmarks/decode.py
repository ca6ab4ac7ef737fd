"""One decode step of whole models against its floor and against `transformers`, on the same weights.

The floor is the step's bare matrix products: the same weights, shapes and number of rows, and nothing else. A step is
timed beside its floor, in turn. `generate` of both libraries is timed from the same prompts to the same greedy tokens,
which are compared before anything is timed.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loading import load_model, pick_device
from tritium.runtime.plan import Mlp
from tritium.runtime.registry import get_family

from .harness import Timing, environment, interleaved, table, write
from .subject import twin_of

# Qwen3-shaped: a pocket model, where overhead shows, and one of 135M parameters, where matrices do.
COMMON = {"num_layers": 30, "context_length": 2048, "norm_eps": 1e-6, "rope_base": 1e6, "rope_scaling": None}
SHAPES: dict[str, dict[str, Any]] = {
    "width 128": {
        "embedding_dim": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "hidden_dim": 384,
        "vocab_size": 2048,
    },
    "width 576": {
        "embedding_dim": 576,
        "num_heads": 9,
        "num_kv_heads": 3,
        "head_dim": 64,
        "hidden_dim": 1536,
        "vocab_size": 49152,
    },
}
BATCHES = (1, 8)
PROMPT, STEPS, ROUNDS = 16, 32, 5


def build(shape: dict[str, Any], device: torch.device) -> Decoder:
    """A Qwen3 decoder of this shape in float32 with random weights."""
    spec = get_family("qwen3").spec_from({**COMMON, **shape, "tie_embeddings": True, "dtype": "float32"}, "benchmark")
    return load_model(spec, device=device, dtype="float32").initialise(std=0.1)


def transformers_twin(model: Decoder) -> Any:
    """`transformers`' model with copies of the same weights: contenders do not share what a cache of the CPU holds."""
    return copy.deepcopy(twin_of(model))


def floor_step(model: Decoder, rows: int) -> Callable[[], None]:
    """The bare matrix products of one decode step for `rows` rows."""
    plan = model.bind()
    dense = []
    for layer in plan.layers:
        assert isinstance(layer.mlp, Mlp)  # the models measured have no experts
        dense += [layer.qkv, layer.out, layer.mlp.up, layer.mlp.down]
    weights = [part.weight for part in (*dense, plan.head)]
    inputs = {width: torch.randn(rows, width, device=model.device) for width in {w.shape[1] for w in weights}}
    calls = [(inputs[weight.shape[1]], weight) for weight in weights]

    @torch.inference_mode()
    def step() -> None:
        for x, weight in calls:
            F.linear(x, weight)

    return step


def decode_step(model: Decoder, prompt: Tensor) -> Callable[[], None]:
    """One more token for every row of a prefilled batch, from token ids to the next token ids."""
    rows, length = prompt.shape
    cache = KVCache(model.config, rows, 2048, torch.float32, model.device)
    plan, every, ones = model.bind(), list(range(rows)), [1] * rows
    with torch.inference_mode():
        _, logits = model.run(plan, prompt.flatten(), Batch.appended(cache, every, [length] * rows), last_only=True)
        state = {"tokens": logits.argmax(-1)}

    @torch.inference_mode()
    def step() -> None:
        if cache.lengths[0] == length + STEPS:  # begin again: each step has 16 to 47 tokens before it
            cache.lengths = [length] * rows
        _, logits = model.run(plan, state["tokens"], Batch.appended(cache, every, ones), last_only=True)
        state["tokens"] = logits.argmax(-1)

    return step


def run(options: argparse.Namespace) -> None:
    """Measures, prints the table, and writes the figures where asked."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    results = []
    for name, shape in SHAPES.items():
        model = build(shape, device)
        twin = transformers_twin(model)
        for rows in BATCHES:
            results.append({"model": name, "batch": rows, **_measure(model, twin, rows, device)})
            print(f"{name}, batch {rows}: measured", file=sys.stderr, flush=True)
    print(summary({"environment": environment(device), "results": results}))
    if options.json:
        write(options.json, device, results)


def _measure(model: Decoder, twin: Any, rows: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (rows, PROMPT), generator=generator).to(device)
    mask = torch.ones_like(prompt)

    def ours() -> Tensor:
        return model.generate(prompt, STEPS, temperature=0)

    def theirs() -> Tensor:
        return twin.generate(prompt, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)

    if not torch.equal(ours(), theirs()):
        raise TritiumError("the greedy tokens differ from transformers': wrong results are not timed")
    # A whole number of passes over the context lengths.
    steps = {"step": decode_step(model, prompt), "floor": floor_step(model, rows)}
    step = interleaved(steps, 2 * ROUNDS * STEPS, device, warm_up=STEPS)
    whole = interleaved({"tritium": ours, "transformers": theirs}, ROUNDS, device, warm_up=1)
    return {
        "step_us": _microseconds(step["step"]),
        "matmuls_us": _microseconds(step["floor"]),
        "step_over_matmuls": step["step"].p50 / step["floor"].p50,
        "tokens_per_second": rows * STEPS / whole["tritium"].p50,
        "transformers_tokens_per_second": rows * STEPS / whole["transformers"].p50,
        "speedup": whole["transformers"].p50 / whole["tritium"].p50,
    }


def _microseconds(timing: Timing) -> dict[str, float]:
    return {"p20": timing.p20 * 1e6, "p50": timing.p50 * 1e6, "p80": timing.p80 * 1e6}


def summary(record: dict[str, Any]) -> str:
    """The figures of a results file as a table, with what they were measured on."""
    names = "Qwen3, 30 layers|batch|step us|matmuls us|step/matmuls|tok/s|transformers tok/s|speedup"
    rows = [tuple(names.split("|"))]
    for row in record["results"]:
        rows.append(
            (
                row["model"],
                str(row["batch"]),
                f"{row['step_us']['p50']:.0f}",
                f"{row['matmuls_us']['p50']:.0f}",
                f"{row['step_over_matmuls']:.2f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['transformers_tokens_per_second']:.0f}",
                f"{row['speedup']:.2f}",
            )
        )
    where = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = (
        f"float32, {PROMPT} tokens in and {STEPS} out, medians; {where['device']}, {where['threads']} threads,",
        f"{versions}; {where['date']}",
    )
    return "\n".join((table(rows), "", *lines))
