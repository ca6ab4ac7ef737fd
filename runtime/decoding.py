"""Decoding without the host: a batch's state lives on the device, and so does all that moves it from token to token.

A step is: embed the tokens, the decoder's phases, sample, `advance` (kernels/advance.py). Nothing in it depends on a
value that the host knows, so on a GPU it is captured once as a CUDA graph and replayed; the host runs AHEAD steps in
front of what it has read, and the device never waits for it. Where nothing can be captured the same step runs as it is.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.advance import advance
from .batch import Batch
from .fused import Workspace, fuse
from .kv_cache import PAGE_SIZE, KVCache
from .operations import KERNELS
from .persistent import persist, persists
from .plan import Plan

if TYPE_CHECKING:
    from .decoder import Decoder
    from .generation import SamplingOptions

AHEAD = 8  # steps that may be under way on a GPU beyond the one whose tokens the host has
ROUND = 4  # pages: capacities are rounded up to so many, that the next prompt may find its place


def bucket(rows: int) -> int:
    """How many rows a step is made for that is to serve `rows`: 1, 2, 4, 8, then multiples of 16."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


def room(tokens: int, context: int) -> int:
    """The capacity of a cache that is asked to hold so many tokens, in a model of this context."""
    step = ROUND * PAGE_SIZE
    return min(-(-tokens // step) * step, context)


class Decoding:
    """The decode steps of up to `rows` sequences, with their cache; used again for other prompts by `begin`."""

    def __init__(
        self,
        model: "Decoder",
        plan: Plan,
        rows: int,
        capacity: int,
        options: "SamplingOptions",
        stops: Sequence[int] = (),
        vocabulary: int | None = None,
        form: str | None = None,
    ) -> None:
        """For sequences of at most `capacity` tokens, of which only ids below `vocabulary` are chosen, until one of
        `stops`; `form` as in persistent.py. Raises TritiumError where the cache does not fit.
        """
        device = model.device
        self.key: tuple[Any, ...] = ()  # what sessions.py knows it by, and when it was taken there
        self.epoch = 0
        self.model, self.plan = model, plan
        self.rows, width = rows, bucket(rows)
        self.capacity = room(capacity, model.config.context_length)
        self.cache = KVCache(model.local_config, rows, self.capacity, dtype=model.dtype, device=device)
        self._sampling = options.choice
        self._workspace = Workspace(None if vocabulary == model.config.vocab_size else vocabulary, self._sampling)
        kernels = model.kernels
        if kernels.decode is not None:
            kernels = fuse(kernels, KERNELS, self._workspace)
            kernels = persist(kernels, self._workspace) if persists(form, plan) else kernels
        self.kernels = kernels

        def whole(*shape: int, dtype: torch.dtype = torch.int64, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.tokens, self._positions, self._slots = whole(width), whole(width), whole(width, value=-1)
        self._lengths, self._ended = whole(width, dtype=torch.int32), whole(width, dtype=torch.int32, value=1)
        self._history, self._step = whole(self.capacity, width), whole(1)
        self._stops = torch.tensor(list(stops), dtype=torch.int64, device=device)
        drawn = options.temperature > 0
        self._uniforms = torch.zeros(width, self.capacity, device=device) if drawn else None
        self._uniform = torch.zeros(width, device=device) if drawn else None
        table = whole(width, self.cache.page_table.shape[1], dtype=torch.int32)
        table[:rows] = self.cache.page_table
        self._batch = Batch(
            starts=list(range(width + 1)),
            lengths=[self.capacity] * width,
            positions=self._positions,
            cache=self.cache,
            rows=list(range(rows)),
            slots=self._slots,
            is_fresh=False,
            is_decode=True,
        )
        self._batch.device_lengths, self._batch.page_table = self._lengths, table
        self._angles: list[Tensor] = []  # of rows whose table of angles goes by more than their position
        self._longest = 0  # an upper bound of the lengths
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._warm: set[int] = set()
        self._pool: Any = None
        self.device = device
        self._stream: torch.cuda.Stream | None = None  # that this works on
        on_gpu = device.type == "cuda"
        self._capturing = torch.cuda.Stream(device) if on_gpu else None
        self._read = torch.empty(self._history.shape, dtype=torch.int64, pin_memory=True) if on_gpu else self._history
        self._events: deque[torch.cuda.Event] = deque()

    @contextmanager
    def working(self) -> Iterator[None]:
        """On the model's device, behind what this has under way: to be around whatever touches its state or cache."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            yield

    def begin(self, prompts: Sequence[int], uniforms: Tensor | None) -> None:
        """The rows' prompts, of so many tokens, are in the cache now; uniforms [rows, steps], where one samples."""
        rows, width = len(prompts), len(self._batch.lengths)
        rest = [0] * (width - rows)
        state = [[count - 1 for count in prompts] + rest, [*prompts, *rest], [0] * rows + [1] * (width - rows)]
        positions, lengths, ended = torch.tensor(state, dtype=torch.int64).to(self._positions.device)
        self._positions.copy_(positions)
        self._lengths.copy_(lengths)
        self._ended.copy_(ended)
        self._slots.fill_(-1)
        self._step.zero_()
        if self._uniforms is not None and uniforms is not None:
            self._uniforms[:rows, : uniforms.shape[1]] = uniforms
        self._longest = max(prompts)
        self._bind_angles(list(prompts) + [prompts[0]] * (width - rows))
        self._events.clear()

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

    def take(self, sampled: Tensor) -> None:
        """Notes the tokens sampled after the prompts, [rows]: the first step follows them."""
        width = self.tokens.shape[0]
        first = sampled.new_zeros(width)
        first[: sampled.shape[0]] = sampled
        self._advance(first)

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
        self._longest += 1

    def step(self) -> None:
        """One token more for every row that has not ended: enqueued, not waited for."""
        pages = self._batch.page_table.shape[1]
        pages = min(pages, 1 << (-(-self._longest // PAGE_SIZE) - 1).bit_length())
        if pages not in self._graphs:
            self._batch.lengths = [min(pages * PAGE_SIZE, self.capacity)] * len(self._batch.lengths)
            if not self.tokens.is_cuda or pages not in self._warm:  # compiles what a capture may not compile
                self._compute()
                self._warm.add(pages)
                return
            self._graphs[pages] = self._captured()
        self._graphs[pages].replay()
        self._longest += 1

    def _compute(self) -> None:
        self._workspace.begin()
        stream = self._workspace.tensor(
            "stream", self.plan.embedding, self.tokens.shape[0], self.plan.embedding.shape[1]
        )
        _, logits = self.model.compute(self.plan, self.tokens, self._batch, self.kernels, stream=stream)
        self._advance(self.kernels.sample(logits, *self._sampling, self._uniform))

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, longest = torch.cuda.CUDAGraph(), self._longest
        try:
            with torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"):
                self._compute()
        finally:
            self._longest = longest
        self._pool = graph.pool()
        return graph

    def run(self, first: Tensor, count: int) -> Iterator[list[int]]:
        """The tokens of `count` steps, a list of all rows' each: those sampled after the prompts, then a step each.

        A row gives kernels/advance.py's NOTHING once it has ended.
        """
        with torch.inference_mode(), self.working():
            self.take(first)
            self._send(0)
        sent = 1
        for number in range(count):
            with torch.inference_mode(), self.working():
                ahead = AHEAD if self.tokens.is_cuda else 0
                while sent < min(count, number + 1 + ahead) and number:  # nothing stands before the first token
                    self.step()
                    self._send(sent)
                    sent += 1
            if self._events:
                self._events.popleft().synchronize()
            tokens: list[int] = self._read[number].tolist()
            yield tokens

    def _send(self, number: int) -> None:
        """Has a step's tokens copied to where the host reads them."""
        if self.tokens.is_cuda:
            self._read[number].copy_(self._history[number], non_blocking=True)
            self._events.append(torch.cuda.current_stream().record_event())
