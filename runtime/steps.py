"""Decode steps without the host: a batch's state lives on the device, and so does what moves it from token to token.

A step is: embed the tokens, the decoder's phases, sample, `advance` (kernels/advance.py). Nothing in it depends on a
value that the host knows, so on a GPU it is captured once as a CUDA graph and replayed. Where nothing can be captured
the same step runs as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..kernels.advance import advance
from .batch import Batch
from .fused import Workspace, fuse
from .kv_cache import PAGE_SIZE, KVCache
from .log_probs import choose
from .operations import KERNELS
from .persistent import persist, persists
from .plan import Plan

if TYPE_CHECKING:
    from .decoder import Decoder

Choice = tuple[float, int, float]  # temperature, top_k, top_p
Result = TypeVar("Result")


class InOrder:
    """Work on a device that comes behind what the same object had done before, on whichever stream that was."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """On the device, behind what is under way: to be around whatever touches its state or cache."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield


class Steps:
    """The state of `width` rows over a cache, and what moves it by a token."""

    def __init__(
        self,
        model: "Decoder",
        plan: Plan,
        cache: KVCache,
        width: int,
        count: int,
        sampling: Choice,
        stops: Sequence[int] = (),
        vocabulary: int | None = None,
        form: str | None = None,
        scored: bool = False,
    ) -> None:
        """At most `count` steps at a time, in which only ids below `vocabulary` are chosen, by `sampling`, until one of
        `stops`; `form` as in persistent.py. Where `scored`, each token's log-probability is noted beside it.
        """
        device = model.device
        self.device = device
        self.model, self.plan, self.cache, self.width = model, plan, cache, width
        self._sampling = sampling
        limit = None if vocabulary == model.config.vocab_size else vocabulary
        kernels = model.kernels
        # Fused kernels leave the other ids out themselves, but where log-probabilities are wanted, which are over all.
        is_left_out = kernels.decode is not None and not scored
        self._limit = None if is_left_out else limit  # what `choose` is to leave out
        self._workspace = Workspace(limit if is_left_out else None, sampling)
        if kernels.decode is not None:
            kernels = fuse(kernels, KERNELS, self._workspace)
            kernels = persist(kernels, self._workspace) if persists(form, plan) else kernels
        self.kernels = kernels

        def whole(*shape: int, dtype: torch.dtype = torch.int64, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.tokens, self._positions, self._slots = whole(width), whole(width), whole(width, value=-1)
        self._lengths, self._ended = whole(width, dtype=torch.int32), whole(width, dtype=torch.int32, value=1)
        self._history, self._step = whole(count, width), whole(1)
        self._scores = whole(count, width, dtype=torch.float32, value=0) if scored else None
        self._stops = torch.tensor(list(stops), dtype=torch.int64, device=device)
        self._uniforms: Tensor | None = None
        self._uniform: Tensor | None = None
        if sampling[0] > 0:
            self._uniforms, self._uniform = torch.zeros(width, count, device=device), torch.zeros(width, device=device)
        self._batch = Batch(
            starts=list(range(width + 1)),
            lengths=[cache.capacity] * width,
            positions=self._positions,
            cache=cache,
            rows=list(range(min(width, len(cache.lengths)))),
            slots=self._slots,
            is_fresh=False,
            is_decode=True,
        )
        table = whole(width, cache.page_table.shape[1], dtype=torch.int32)
        self._batch.device_lengths, self._batch.page_table = self._lengths, table
        self._angles: list[Tensor] = []  # of rows whose table of angles goes by more than their position
        self._longest = 0  # an upper bound of the lengths
        self.captures = True  # on a GPU
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]] = {}  # by the pages of the longest row
        self._warm: set[int] = set()
        self._pool: Any = None
        self._capturing = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _bind_angles(self, prompts: list[int]) -> None:
        """The tables of angles, and each row's place in them; graphs of other tables are of no use any more."""
        before = self._batch._angles
        self._batch.prompts, self._batch._angles, self._angles = prompts, {}, []
        for layer in self.plan.layers:
            if (rotary := layer.attention.rotary) is None or rotary in self._batch._angles:
                continue
            angles = self._batch.angles(rotary)
            if rotary in before and before[rotary].table is angles.table and angles.rows is self._positions:
                continue
            if before:
                self._graphs.clear()
                self._pool = None
            if angles.rows is not self._positions:
                self._angles.append(angles.rows)
        assert len(self._angles) <= 1, "one rule of rotation a model"

    def _advance(self, sampled: Tensor) -> None:
        advance(
            sampled,
            self.tokens,
            self._positions,
            self._lengths,
            self._slots,
            self._batch.page_table,
            PAGE_SIZE,
            self._ended,
            self._history,
            self._step,
            self._stops,
            self._angles[0] if self._angles else None,
            self._uniforms,
            self._uniform,
        )

    def step(self) -> None:
        """One token more for every row that has not ended: enqueued, not waited for."""
        self._repeat(self._compute)
        self._longest += 1

    def _repeat(self, work: Callable[[], Result]) -> Result:
        """Does `work`, always the same, by a graph where one is there or can be made: what it gives then lies where it
        lay before.
        """
        pages = self._batch.page_table.shape[1]
        pages = min(pages, 1 << (-(-self._longest // PAGE_SIZE) - 1).bit_length())
        if pages not in self._graphs:
            self._batch.lengths = [min(pages * PAGE_SIZE, self.cache.capacity)] * self.width
            if not (self.captures and self.tokens.is_cuda and pages in self._warm):
                self._warm.add(pages)  # compiled now: a capture may not compile
                return work()
            self._graphs[pages] = self._captured(work)
        graph, result = self._graphs[pages]
        graph.replay()
        return result

    def _compute(self) -> None:
        # What a fused head has begun of sampling was begun with all ids.
        kernels = self.kernels if self._limit is None else self.model.kernels
        tokens, scores = choose(
            kernels,
            self._logits(),
            lambda x: kernels.sample(x, *self._sampling, self._uniform),
            self._limit,
            self._scores is not None,
        )
        if self._scores is not None and scores is not None:
            self._scores.index_copy_(0, self._step, scores.unsqueeze(0))
        self._advance(tokens)

    def _logits(self) -> Tensor:
        self._workspace.begin()
        stream = self._workspace.tensor("stream", self.plan.embedding, self.width, self.plan.embedding.shape[1])
        _, logits = self.model.compute(self.plan, self.tokens, self._batch, self.kernels, stream=stream)
        return logits

    def _captured(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return graph, result
