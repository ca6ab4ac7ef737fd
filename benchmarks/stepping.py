"""Decode steps at any context without the prefill that leads there: keys and values are random numbers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.decoding import Decoding, room
from tritium.runtime.generation import SamplingOptions
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.persistent import persists
from tritium.runtime.spec import ModelSpec

from .machine import Form, footprint

SPAN = 16  # steps in a row before the contexts are walked again
SLACK = 1.05  # of the memory that weights and cache take: what passes from phase to phase
FLUSH = 2**30  # bytes of a GPU that the stopwatch holds


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be had on a device; None where that cannot be told."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else None


def no_room(
    spec: ModelSpec,
    parameters: int,
    rows: int,
    context: int,
    item: int,
    device: torch.device,
    scheme: str | None = None,
) -> str | None:
    """Why so many parameters and a cache of `rows` sequences of `context` tokens do not fit a device now, in words."""
    needed = SLACK * footprint(spec, parameters, rows, room(context, spec.context_length), item, scheme)
    needed += FLUSH if device.type == "cuda" else 0
    if (free := free_bytes(device)) is not None and needed > free:
        return f"needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
    return None


def span_of(context: int) -> int:
    """Steps of a walk that ends at so many keys: the first has one at least before it."""
    return min(SPAN, context - 1)


def keys_of(context: int) -> float:
    """That a step of such a walk sees in the mean, its own included."""
    return context - (span_of(context) - 1) / 2


class Filled:
    """A cache whose `rows` sequences hold `context` random keys and values, normally distributed.

    Contenders share its pool. Each steps through the last `span` places of every row, over and over: its first step
    sees `held + 1` keys, the last of them all `context`.
    """

    def __init__(self, model: Decoder, rows: int, context: int, seed: int = 0) -> None:
        """`context` is 2 or more."""
        self.context, self.span = context, span_of(context)
        self.rows = list(range(rows))
        self._model, self._seed = model, seed
        self._cache: KVCache | None = None

    @property
    def cache(self) -> KVCache:
        """The pool that all share. Raises TritiumError where it does not fit."""
        if self._cache is None:
            model = self._model
            with torch.inference_mode():
                capacity = room(self.context, model.config.context_length)
                self.lend(KVCache(model.config, len(self.rows), capacity, model.dtype, model.device))
        assert self._cache is not None
        return self._cache

    @torch.inference_mode()
    def lend(self, cache: KVCache) -> None:
        """Has a cache use the pool. The first that comes gives its own: two might have no room beside each other."""
        assert cache.capacity == room(self.context, self._model.config.context_length)
        if self._cache is None:
            self._cache = copy.copy(cache)
            generator = torch.Generator(cache.device).manual_seed(self._seed)
            for pool in (*cache.keys, *cache.values):
                pool.normal_(generator=generator)
        vars(cache).update(vars(self._cache))

    @property
    def held(self) -> int:
        return self.context - self.span

    def first(self, cache: KVCache) -> Batch:
        """The first step, through a cache over this pool."""
        cache.lengths, cache.prompts = [self.held] * len(self.rows), [self.held] * len(self.rows)
        return Batch.appended(cache, self.rows, [1] * len(self.rows))

    def logits(self, model: Decoder, tokens: Tensor) -> Tensor:
        """[R, V] after these tokens [R] as a first step."""
        return model.run(model.bind(), tokens, self.first(copy.copy(self.cache)), last_only=True)[1]

    def walk(self, begin: Callable[[], None], step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A call is one step; `begin` stands before the first of every `span`."""
        left = 0

        def call() -> Tensor:
            nonlocal left
            if not left:
                left = self.span
                begin()
            left -= 1
            return step()

        return call


def form_of(model: Decoder, form: str | None = None) -> Form:
    """In which form this model's decode loop takes its steps, where this one is asked for: see runtime/persistent.py.

    Raises TritiumError for a form that does not fit the model.
    """
    return "persistent" if model.kernels.decode is not None and persists(form, model.bind()) else "fused"


def steps(model: Decoder, filled: Filled, tokens: Tensor, form: str | None = None) -> Callable[[], Tensor]:
    """A call is one greedy step of every row, as `generate` takes it: the tokens [R] that it chose, which the next call
    follows. Every walk begins with `tokens` [R].
    """
    if model.kernels.name == "torch":
        return _on_the_host(model, filled, tokens)
    return _on_the_device(model, filled, tokens, form)


def _on_the_device(model: Decoder, filled: Filled, tokens: Tensor, form: str | None) -> Callable[[], Tensor]:
    rows = len(filled.rows)
    with torch.inference_mode():
        decoding = Decoding(model, model.bind(), rows, filled.context, SamplingOptions(temperature=0), form=form)
    filled.lend(decoding.cache)

    @torch.inference_mode()
    def begin() -> None:
        decoding.begin([filled.held] * rows, None)
        decoding.take(tokens)

    @torch.inference_mode()
    def step() -> Tensor:
        decoding.step()
        return decoding.tokens[:rows]

    return filled.walk(begin, step)


def _on_the_host(model: Decoder, filled: Filled, tokens: Tensor) -> Callable[[], Tensor]:
    plan, cache = model.bind(), copy.copy(filled.cache)
    at: dict[str, Any] = {}

    def begin() -> None:
        at.clear()

    @torch.inference_mode()
    def step() -> Tensor:
        at["batch"] = at["batch"].step() if at else filled.first(cache)
        _, logits = model.run(plan, at.get("tokens", tokens), at["batch"], last_only=True)
        at["tokens"] = model.kernels.sample(logits, 0.0, 0, 1.0, None)
        return at["tokens"]

    return filled.walk(begin, step)
