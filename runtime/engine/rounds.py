"""Decode steps of whoever is seated: rounds of a few steps, before which the host says who is in, and after which it
reads what came.

The host's lists are the truth: the device is told the whole state before every round. So rows join and leave between
rounds at will, and a round that was interrupted is simply done again, with the same bits.

A row that reaches its last token, or an EOS, within a round goes on to the round's end; what it gives there is not
looked at. It writes into its own pages, and beyond them into page 0, which is nobody's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.sampling import philox_uniform_reference
from ..batch import Batch
from ..decoding import AHEAD, bucket
from ..kv_cache import PAGE_SIZE, KVCache
from ..log_probs import choose
from ..plan import Plan
from ..steps import Choice, Steps
from .request import Job

if TYPE_CHECKING:
    from ..decoder import Decoder


def choices_of(jobs: Sequence[Job]) -> list[Choice]:
    """The options by which these jobs choose, each once."""
    return sorted({job.choice for job in jobs})


def uniforms(jobs: Sequence[Job], count: int) -> Tensor:
    """The random numbers of each job's next `count` tokens: float32 [jobs, count]."""
    seeds = torch.tensor([[job.seed] for job in jobs], dtype=torch.int64)
    firsts = torch.tensor([[len(job.tokens)] for job in jobs], dtype=torch.int64)
    return philox_uniform_reference(seeds, firsts + torch.arange(count))


def chosen(model: "Decoder", logits: Tensor, jobs: Sequence[Job], vocabulary: int | None) -> list[int]:
    """The next token of each job, after logits [jobs, V]: by the kernels that a prompt's first token is chosen by."""
    kernels = model.kernels

    def sample(limited: Tensor) -> Tensor:
        found = torch.empty(len(jobs), dtype=torch.int64, device=limited.device)
        for choice in choices_of(jobs):
            which = [index for index, job in enumerate(jobs) if job.choice == choice]
            rows = limited if len(which) == len(jobs) else limited[which]
            drawn = uniforms([jobs[i] for i in which], 1).squeeze(1).to(limited.device) if choice[0] > 0 else None
            found[which] = kernels.sample(rows, *choice, drawn)
        return found

    tokens: list[int] = choose(kernels, logits, sample, vocabulary, scored=False)[0].tolist()
    return tokens


def width_for(rows: int) -> int:
    """How many rows the step has that serves `rows`: few sizes, as each has buffers and captured steps of its own."""
    return bucket(rows) if rows <= 64 else -(-rows // 64) * 64


class _State(Steps):
    """Rows of one width, told anew before every round."""

    def __init__(
        self, model: "Decoder", plan: Plan, cache: KVCache, width: int, choice: Choice | None, vocabulary: int | None
    ) -> None:
        """For rows that all choose by `choice`; None: each by its own."""
        super().__init__(model, plan, cache, width, AHEAD, choice or (1.0, 0, 1.0), vocabulary=vocabulary)
        self._is_mixed = choice is None
        self._choices: list[Choice] = []
        self._which = torch.zeros(width, dtype=torch.int64, device=self.device)

    def run(self, jobs: Sequence[Job], count: int) -> list[list[int]]:
        self._begin(jobs, count)
        for _ in range(count):
            self.step()
        return [step[: len(jobs)] for step in self._history[:count].tolist()]

    def _begin(self, jobs: Sequence[Job], count: int) -> None:
        """Places each job at its next token, for `count` steps to come."""
        rows, free = len(jobs), self.width - len(jobs)
        self._choices = choices_of(jobs)
        told = [
            (
                job.tokens[-1],
                job.held,
                job.held + 1,
                job.pages[job.held // PAGE_SIZE] * PAGE_SIZE + job.held % PAGE_SIZE,
                0,
                self._choices.index(job.choice),
                job.row or 0,
            )
            for job in jobs
        ]
        told += [(0, 0, 0, -1, 1, 0, 0)] * free
        *state, places = torch.tensor(told, dtype=torch.int64).t().contiguous().to(self.device)
        mine = (self.tokens, self._positions, self._lengths, self._slots, self._ended, self._which)
        for tensor, value in zip(mine, state, strict=True):
            tensor.copy_(value)
        self._step.zero_()
        self._batch.page_table.copy_(self.cache.page_table[places])
        if self._uniforms is not None and self._uniform is not None:
            self._uniforms[:rows, :count] = uniforms(jobs, count).to(self.device)
            self._uniform.copy_(self._uniforms[:, 0])
        self._longest = max(job.held for job in jobs) + 1
        self._bind_angles([len(job.prompt) for job in jobs] + [len(jobs[0].prompt)] * free)
        self.captures = not self._angles  # those are other tensors in every round

    def step(self) -> None:
        if not self._is_mixed:
            super().step()
            return
        logits = self._repeat(self._logits)  # what follows is not captured: choices change from round to round
        self._advance(choose(self.model.kernels, logits, self._sample, self._limit, scored=False)[0])
        self._longest += 1

    def _sample(self, logits: Tensor) -> Tensor:
        """Each row by its own choice."""
        first, *others = (self.model.kernels.sample(logits, *choice, self._uniform) for choice in self._choices)
        for index, sampled in enumerate(others, start=1):
            first = torch.where(self._which == index, sampled, first)
        return first


class DeviceRounds:
    """Rounds by the fused and captured steps of steps.py."""

    KEPT = 16  # states: each has buffers and captured steps

    def __init__(self, model: "Decoder", plan: Plan, cache: KVCache, vocabulary: int | None) -> None:
        self._model, self._plan, self._cache, self._vocabulary = model, plan, cache, vocabulary
        self._states: dict[tuple[int, Choice | None], _State] = {}
        self.ahead = AHEAD if model.device.type == "cuda" else 1

    def run(self, jobs: Sequence[Job], count: int) -> list[list[int]]:
        """The tokens of `count` steps, at most AHEAD: a list of all jobs' each."""
        choices = choices_of(jobs)
        key = width_for(len(jobs)), choices[0] if len(choices) == 1 else None
        state = self._states.pop(key, None)
        if state is None:
            while len(self._states) >= self.KEPT:  # the longest unused
                del self._states[next(iter(self._states))]
            state = _State(self._model, self._plan, self._cache, *key, self._vocabulary)
        self._states[key] = state
        return state.run(jobs, count)


class HostRounds:
    """The same where steps are PyTorch's: one by one."""

    ahead = 1

    def __init__(self, model: "Decoder", plan: Plan, cache: KVCache, vocabulary: int | None) -> None:
        self._model, self._plan, self._cache, self._vocabulary = model, plan, cache, vocabulary

    def run(self, jobs: Sequence[Job], count: int) -> list[list[int]]:
        rows = [job.row for job in jobs if job.row is not None]
        batch = Batch.appended(self._cache, rows, [1] * len(rows))
        tokens = torch.tensor([job.tokens[-1] for job in jobs], device=self._model.device)
        logits = self._model.run(self._plan, tokens, batch, last_only=True)[1]
        return [chosen(self._model, logits, jobs, self._vocabulary)]
