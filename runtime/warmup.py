"""Compiling ahead of the first request: every kernel that generation with a model launches, into Triton's cache.

Nothing is foretold: a model of the same shapes, with random weights and only as many layers as differ, generates from
prompts of the lengths at which a launch changes. What that compiles lies on disk from then on.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.launch import INTERPRETED, obstacle, triton
from .errors import TritiumError
from .generation import SamplingOptions, generate
from .kv_cache import PAGE_SIZE
from .loading import load_model
from .spec import ModelSpec

LONGEST = 8192  # tokens, where no context is named
STEPS = 3  # the first sampled behind the prompt, then a step as it is and a captured one
PER_LAYER = ("rope_layers", "qk_norm_layers", "windows", "expert_layers")
SAMPLING: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95})


@dataclass
class Compiled:
    """How many kernels were compiled, and how many of those asked for were in Triton's cache already."""

    new: int = 0
    found: int = 0


@contextmanager
def compilations() -> Iterator[Compiled]:
    """Counts what Triton compiles meanwhile."""
    counted = Compiled()

    def listen(*, cache_hit: bool, **rest: Any) -> None:
        counted.found += cache_hit
        counted.new += not cache_hit

    before, triton.knobs.compilation.listener = triton.knobs.compilation.listener, listen
    try:
        yield counted
    finally:
        triton.knobs.compilation.listener = before


def require_kernels() -> None:
    """Raises TritiumError where there is nothing to compile for."""
    if (why := obstacle(torch.device("cpu" if INTERPRETED else "cuda"))) is not None:
        raise TritiumError(f"warmup cannot run here: {why}; the PyTorch path compiles nothing and needs no warmup")


def thinned(spec: ModelSpec) -> ModelSpec:
    """The spec with the first layer of each kind, and the one that follows it: the first of all reads the embedding."""
    kinds = [tuple(spec[name][layer] for name in PER_LAYER) for layer in range(spec.num_layers)]
    firsts = {kinds.index(kind) for kind in kinds}
    kept = sorted(firsts | {layer + 1 for layer in firsts if layer + 1 < spec.num_layers})
    return spec.replace(num_layers=len(kept), **{name: [spec[name][layer] for layer in kept] for name in PER_LAYER})


def lengths(longest: int) -> list[int]:
    """Prompts at both sides of wherever a launch may change: one token, powers of two, and one token more than each."""
    powers = [1 << power for power in range(4, longest.bit_length())]
    return sorted({1, *(length for power in powers for length in (power, power + 1) if length <= longest)})


def warm_up(
    spec: ModelSpec,
    *,
    batches: Sequence[int] = (1,),
    context: int | None = None,
    device: str | None = None,
    dtype: str = "auto",
    quantise: str | None = None,
) -> Compiled:
    """Compiles what generation of up to `context` tokens, prompt included, launches for each number of rows.

    Raises TritiumError for numbers that the model does not have, and where no kernel can run.
    """
    require_kernels()
    context = min(LONGEST, spec.context_length) if context is None else context
    if not STEPS < context <= spec.context_length:
        raise TritiumError(f"--context: must be {STEPS + 1} to {spec.context_length} (the model's), got {context}")
    if any(rows < 1 for rows in batches):
        raise TritiumError(f"--batch: must be 1 or more, got {min(batches)}")
    model = load_model(thinned(spec), device=device, dtype=dtype, backend="triton", quantise=quantise)
    tokens = spec.vocab_size - 1  # fewer than the head has rows, as is the rule
    with compilations() as counted:
        for rows in batches:
            for sampling in SAMPLING:
                _generate(model, rows, 1, tokens, sampling)
            _generate(model, rows, 1, None, SAMPLING[0])
            for length in lengths(context - STEPS):
                # Longer prompts are cut to pieces, and then only the cache's length tells them apart.
                if rows == 1 or length <= PAGE_SIZE or length.bit_count() == 1:
                    _generate(model, rows, length, tokens, SAMPLING[0])
    return counted


def _generate(model: Any, rows: int, length: int, tokens: int | None, sampling: dict[str, Any]) -> None:
    for _ in generate(model, [[0] * length] * rows, SamplingOptions(STEPS, seed=0, **sampling), (), tokens):
        pass


def report(spec: ModelSpec, **options: Any) -> str:
    """`warm_up`, in a line."""
    start = time.perf_counter()
    counted = warm_up(spec, **options)
    took = time.perf_counter() - start
    return f"{counted.new} kernels compiled, {counted.found} were there, in {took:.1f} s ({triton.knobs.cache.dir})"
