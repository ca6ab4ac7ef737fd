"""The decoding of one batch of prompts: its cache, and its steps (steps.py), of which the host runs AHEAD in front of
what it has read, so that the device never waits for it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .kv_cache import PAGE_SIZE, KVCache
from .plan import Plan
from .steps import InOrder, Steps

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


class Decoding(Steps, InOrder):
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
        scored: bool = False,
    ) -> None:
        """For sequences of at most `capacity` tokens, of which only ids below `vocabulary` are chosen, until one of
        `stops`; `form` as in persistent.py, `scored` as in steps.py. Raises TritiumError where the cache does not fit.
        """
        self.key: tuple[Any, ...] = ()  # what sessions.py knows it by, and when it was taken there
        self.epoch = 0
        self.rows = rows
        self.capacity = room(capacity, model.config.context_length)
        cache = KVCache(model.local_config, rows, self.capacity, dtype=model.dtype, device=model.device)
        InOrder.__init__(self, model.device)
        Steps.__init__(
            self, model, plan, cache, bucket(rows), self.capacity, options.choice, stops, vocabulary, form, scored
        )
        self._batch.page_table[:rows] = cache.page_table
        on_gpu = self.device.type == "cuda"
        self._read = torch.empty(self._history.shape, dtype=torch.int64, pin_memory=True) if on_gpu else self._history
        self._read_scores = self._scores
        if self._scores is not None and on_gpu:
            self._read_scores = torch.empty(self._scores.shape, dtype=torch.float32, pin_memory=True)
        self._events: deque[torch.cuda.Event] = deque()

    def begin(self, prompts: Sequence[int], uniforms: Tensor | None) -> None:
        """The rows' prompts, of so many tokens, are in the cache now; uniforms [rows, steps], where one samples."""
        rows, width = len(prompts), self.width
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

    def take(self, sampled: Tensor, scores: Tensor | None = None) -> None:
        """Notes the tokens sampled after the prompts, [rows], and their log-probabilities: the first step follows."""
        width = self.tokens.shape[0]
        first = sampled.new_zeros(width)
        first[: sampled.shape[0]] = sampled
        if self._scores is not None and scores is not None:
            self._scores[0, : scores.shape[0]] = scores
        self._advance(first)
        self._longest += 1

    def log_probs(self, number: int) -> list[float]:
        """Those of a step's tokens, once `run` has given them."""
        assert self._read_scores is not None
        found: list[float] = self._read_scores[number].tolist()
        return found

    def run(self, first: Tensor, scores: Tensor | None, count: int) -> Iterator[list[int]]:
        """The tokens of `count` steps, a list of all rows' each: those sampled after the prompts, then a step each.

        A row gives kernels/advance.py's NOTHING once it has ended.
        """
        with torch.inference_mode(), self.working():
            self.take(first, scores)
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
            if self._scores is not None and self._read_scores is not None:
                self._read_scores[number].copy_(self._scores[number], non_blocking=True)
            self._events.append(torch.cuda.current_stream().record_event())
