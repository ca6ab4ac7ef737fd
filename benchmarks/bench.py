"""`tritium bench`: how near a model is to what this machine allows, on random weights at its real shapes.

Each decode step is timed beside its floor (see machine.py), whose ceilings are measured first. The contexts are filled
with random keys and values, so that no long prompt is computed. Then a prompt is read and continued by `generate`: the
time to its first token, and the tokens a second behind it.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tritium.runtime.backend import Backend
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import Parser, TritiumError
from tritium.runtime.generation import SamplingOptions, generate, prefill
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loading import load_config, load_model, pick_device, pick_dtype
from tritium.runtime.quantisation import check_scheme
from tritium.runtime.registry import get_family
from tritium.runtime.spec import ModelSpec
from tritium.runtime.summary import parameter_count

from .harness import clock, environment, table
from .launches import limits
from .machine import Form, Gap, decode_step, floor_parts
from .measure import Stopwatch
from .record import ceilings, gaps, save
from .stepping import Filled, form_of, free_bytes, keys_of, no_room, steps

CONTEXTS = (128, 4096)
PROMPT = 512  # tokens, where the context has room for them
SECONDS = 0.5  # of steps, and of prefills, at each batch and context
ROUNDS = 3  # of generate


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0, or 2 for a mistake in what was asked for."""
    parser = Parser(prog="tritium bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FAMILY", help="a family, such as qwen3 (see `tritium models`)")
    parser.add_argument("--size", help="a size of that family, such as 8B; the family's default where absent")
    parser.add_argument("--config", metavar="FILE.yaml", help="a size's file instead of --model and --size")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="sequences at once (1 8)")
    parser.add_argument("--context", type=int, nargs="+", metavar="N", help="keys that a step sees (128 4096)")
    parser.add_argument("--prompt", type=int, metavar="N", help=f"tokens of the prompt that is read (up to {PROMPT})")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="tokens that continue it, 2 or more (64)")
    parser.add_argument("--quantise", metavar="KIND", help="int8 or int4 weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the GPU where there is one")
    parser.add_argument("--dtype", default="auto", help="bfloat16, float16, float32; auto: float32 on a CPU")
    parser.add_argument("--backend", default="auto", help="auto, triton or torch")
    parser.add_argument("--form", help="fused or persistent steps of the Triton path; as the tables say where absent")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    try:
        found = _measured(options)
        print(summary(found))
        if options.json:
            save(Path(options.json), found)
    except TritiumError as error:
        print(f"tritium bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _spec(options: argparse.Namespace) -> tuple[str, ModelSpec]:
    """(what the model is called, its spec)."""
    if (options.model is None) == (options.config is None):
        raise TritiumError("name a model: --model FAMILY and --size, or --config FILE.yaml")
    if options.config is not None:
        if options.size is not None:
            raise TritiumError("--size needs --model, the family that it is a size of")
        return Path(options.config).stem, load_config(options.config)
    family = get_family(options.model)
    size = family.size_name(options.size)
    return f"{family.name} {size}", family.spec(size)


def _check(options: argparse.Namespace, spec: ModelSpec) -> None:
    """Raises TritiumError for numbers that do not fit the model; fills in contexts and prompt where none are given."""
    longest = spec.context_length
    if options.prompt is None:
        options.prompt = max(1, min(PROMPT, longest - options.steps))
    if options.context is None:
        options.context = [length for length in CONTEXTS if length <= longest] or [longest]
    least = {"batch": 1, "context": 2, "prompt": 1, "steps": 2}
    for name, smallest in least.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value < smallest:
                raise TritiumError(f"--{name}: must be {smallest} or more, got {value}")
    for context in options.context:
        if context > longest:
            raise TritiumError(f"--context: {context} exceeds the model's context length of {longest}")
    if options.prompt + options.steps > longest:
        both = f"{options.prompt} + {options.steps}"
        raise TritiumError(f"--prompt and --steps: {both} tokens exceed the model's context length of {longest}")
    check_scheme(options.quantise)
    if options.json and not Path(options.json).parent.is_dir():
        raise TritiumError(f"--json: {options.json}: give a file in a folder that exists")


def _check_memory(options: argparse.Namespace, name: str, spec: ModelSpec, item: int, device: torch.device) -> None:
    """Raises TritiumError where not even the least of what was asked for has room, before anything is allocated."""
    least = min(*options.context, options.prompt + options.steps)
    parameters, rows = parameter_count(spec), min(options.batch)
    if why := no_room(spec, parameters, rows, least, item, device, options.quantise):
        raise TritiumError(f"{name} at batch {rows} and {least} tokens {why} on {device}: --quantise takes less")


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    name, spec = _spec(options)
    _check(options, spec)
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, spec, device)
    _check_memory(options, name, spec, dtype.itemsize, device)
    backend = Backend(options.backend)  # raises where it cannot run
    _tell("measuring the ceilings")
    ceilings_here = limits(device)  # before the model: they take memory, too
    free_bytes(device)
    _tell(f"{name}: drawing weights")
    quantised = {} if options.quantise is None else {"quantise": options.quantise}
    model = load_model(spec, device=device, dtype=dtype, backend=backend.name, **quantised).requires_grad_(False)
    kernels = model.kernels.name
    if kernels == "torch" and options.form is not None:
        raise TritiumError("--form: is of the Triton path's steps; the PyTorch path has but one")
    form = form_of(model, options.form)
    found: dict[str, Any] = {
        "environment": environment(device),
        "model": {
            "name": name,
            "parameters": parameter_count(spec),
            "dtype": str(dtype).removeprefix("torch."),
            "quantise": options.quantise,
            "backend": kernels,
            "form": form,
        },
        "prompt": options.prompt,
        "generated": options.steps,
        "ceilings": ceilings_here,
        "no_room": {},
    }
    found["steps"] = list(_steps(model, options, form, found))
    found["generation"] = list(_generation(model, options, found))
    return found


def _steps(model: Decoder, options: argparse.Namespace, form: Form, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every batch at every context that the device has room for."""
    watch = Stopwatch(model.device, SECONDS)
    for rows in options.batch:
        for context in options.context:
            if not _fits(model, rows, context, f"batch {rows}, context {context}", found):
                continue
            tokens = _random_tokens(model, rows)
            step = steps(model, Filled(model, rows, context), tokens, options.form)
            timing = watch.series({"step": [step]}, small=False, host=False)["step"]
            del step  # with its cache
            work = decode_step(model.config, rows, keys_of(context), model.dtype.itemsize, options.quantise, form)
            gap = Gap(timing["p50"], floor_parts(work, found["ceilings"]))
            yield {
                "batch": rows,
                "context": context,
                "step_us": {key: timing[key] * 1e6 for key in ("p20", "p50", "p80")},
                "method": timing["method"],
                "tokens_per_second": rows / timing["p50"],
                **gap.as_dict(),
            }
            _tell(f"batch {rows}, context {context}: a step measured")


def _fits(model: Decoder, rows: int, tokens: int, what: str, found: dict[str, Any]) -> bool:
    """Whether a cache has room beside the model; where it has none, `found` says so."""
    why = no_room(model.config, 0, rows, tokens, model.dtype.itemsize, model.device)
    if why is not None:
        found["no_room"][what] = why
    return why is None


def _generation(model: Decoder, options: argparse.Namespace, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every batch that the device has room for: a prompt is read, then continued."""
    device, watch = model.device, Stopwatch(model.device, SECONDS)
    length = options.prompt
    for rows in options.batch:
        if not _fits(model, rows, length + options.steps, f"batch {rows}, generation", found):
            continue
        prompts = _random_tokens(model, rows * length).view(rows, length).tolist()
        prefilled = _prefill_seconds(model, prompts, watch)
        greedy = SamplingOptions(options.steps, temperature=0)
        firsts, rests = [], []
        for number in range(1 + ROUNDS):  # the first to warm up
            start = clock(device)
            tokens_of = generate(model, prompts, greedy)
            next(tokens_of)
            first = clock(device)
            count = sum(1 for _ in tokens_of)
            assert count == options.steps - 1  # there is no end-of-sequence token
            if number:
                firsts.append(first - start)
                rests.append((clock(device) - first) / count)
        yield {
            "batch": rows,
            "prefill_ms": prefilled * 1e3,
            "prefill_tokens_per_second": rows * options.prompt / prefilled,
            "first_token_ms": statistics.median(firsts) * 1e3,
            "tokens_per_second": rows / statistics.median(rests),
        }
        _tell(f"batch {rows}: prompt and generation measured")


@torch.inference_mode()
def _prefill_seconds(model: Decoder, prompts: list[list[int]], watch: Stopwatch) -> float:
    """From token ids to the logits after each prompt's last, keys and values into a cache."""
    rows, length = len(prompts), len(prompts[0])
    cache, plan = KVCache(model.config, rows, length, model.dtype, model.device), model.bind()

    def once() -> None:
        cache.lengths = [0] * rows
        prefill(model, plan, prompts, cache)

    return float(watch.series({"prefill": [once]}, small=False, host=True)["prefill"]["p50"])


def _random_tokens(model: Decoder, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (count,), generator=generator).to(model.device)


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def summary(found: Mapping[str, Any]) -> str:
    """What was measured, as tables."""
    model, where = found["model"], found["environment"]
    steps = [
        ((str(row["batch"]), str(row["context"]), f"{row['tokens_per_second']:.0f}"), row["step_us"]["p50"], row)
        for row in found["steps"]
    ]
    others: list[tuple[str, ...]] = [("batch", "prefill ms", "prefill tok/s", "first token ms", "generate tok/s")]
    for row in found["generation"]:
        figures = (row["prefill_ms"], row["prefill_tokens_per_second"], row["first_token_ms"], row["tokens_per_second"])
        texts = (f"{figure:.{digits}f}" for figure, digits in zip(figures, (2, 0, 2, 0), strict=True))
        others.append((str(row["batch"]), *texts))
    weights = model["quantise"] or model["dtype"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    steps_are = f"{model['form']} steps, " if model["backend"] == "triton" else ""
    head = f"{model['name']}, {model['parameters']:,} parameters, {weights}, backend {model['backend']}"
    absent = "\n".join(f"{what}: {why}" for what, why in found["no_room"].items())
    return "\n\n".join(
        (
            f"{head}, {steps_are}random weights",
            gaps(("batch", "context", "tok/s"), steps),
            f"{found['prompt']} tokens in, {found['generated']} out:\n{table(others)}",
            *([absent] if absent else []),
            ceilings(found["ceilings"]),
            f"{where['device']}, {where['threads']} threads; {versions}; commit {where['commit']}; {where['date']}",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
