"""Batches as functions of the seed and the step alone: nothing is carried from one step to the next.

So a run that is taken up again, or is shared out over processes, sees the same tokens: a step is a list of
micro-batches, of which each process takes its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.cross_entropy import IGNORE_INDEX
from ..errors import TritiumError
from .config import Data, Evaluation
from .sources import Source
from .vocabulary import Ids, Vocabulary, merge_parts


@dataclass(frozen=True)
class Micro:
    """Sequences packed one after another."""

    tokens: Tensor  # [T] int64
    labels: Tensor  # [T] int64, what each token is to predict; IGNORE_INDEX does not count
    counts: list[int]  # tokens of each sequence

    @property
    def labelled(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())

    @classmethod
    def of(cls, pieces: Sequence[tuple[Ids, Ids]]) -> "Micro":
        """From (tokens, labels) of each sequence."""
        tokens, labels = (np.concatenate(parts).astype(np.int64) for parts in zip(*pieces, strict=True))
        return cls(torch.from_numpy(tokens), torch.from_numpy(labels), [len(piece) for piece, _ in pieces])


class Batches(Protocol):
    """The data of a run."""

    def at(self, step: int) -> list[Micro]:
        """The micro-batches of a step, the first step being 0."""


def batches(data: Data, source: Source, vocabulary: Vocabulary | None, steps: int, seed: int) -> Batches:
    """As the configuration asks. Raises TritiumError where there are too few tokens."""
    if data.sampling == "windows":
        return Windows(data, source, steps, seed)
    parts = None
    if data.merge_dropout:
        if vocabulary is None or not source.bounds:
            raise TritiumError("data: merge_dropout: is for texts, and the data are token files")
        parts = merge_parts(vocabulary.tokenizer)
    if data.group is not None and not source.bounds:
        raise TritiumError("data: group: is for texts, and the data are token files")
    return Documents(data, source, steps, seed, parts)


class Windows:
    """Windows of the sequence length, drawn at random from all that there are."""

    def __init__(self, data: Data, source: Source, steps: int, seed: int) -> None:
        self.data, self.source, self.steps, self.seed = data, source, steps, seed
        longest = max(map(len, source.arrays))
        if longest <= max(data.lengths):
            raise TritiumError(
                f"data: train: {longest} tokens are too few for a sequence_length of {max(data.lengths)} and the "
                f"token behind it"
            )

    def at(self, step: int) -> list[Micro]:
        done = step / self.steps
        length = self.data.length_at(done)
        rows = self.data.tokens_at(done) // length
        firsts = np.cumsum([0, *(max(len(array) - length, 0) for array in self.source.arrays)])
        rng = np.random.default_rng([self.seed, step])
        drawn = rng.integers(firsts[-1], size=(self.data.accumulation, rows))
        return [Micro.of([self._window(int(at), firsts, length) for at in row]) for row in drawn]

    def _window(self, at: int, firsts: Ids, length: int) -> tuple[Ids, Ids]:
        index = int(np.searchsorted(firsts, at, side="right")) - 1
        start = at - int(firsts[index])
        window = self.source.arrays[index][start : start + length + 1]
        return window[:-1], window[1:]


@dataclass(frozen=True)
class Epoch:
    """Documents in an order of their own. A document reads: the opening, its tokens; the end is its last label."""

    arrays: Sequence[Ids]
    documents: Ids  # [D, 3]: array, first token, one behind the last
    opening: int | None
    end: int | None
    ends: Ids = field(init=False)  # [D], tokens up to and with each document

    def __post_init__(self) -> None:
        lengths = self.documents[:, 2] - self.documents[:, 1] + (self.opening is not None)
        object.__setattr__(self, "ends", np.cumsum(lengths))

    @property
    def size(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, at: int, count: int) -> tuple[Ids, Ids]:
        """(tokens, labels) from place `at` on: at most `count`, and not beyond the document that lies there."""
        index = int(np.searchsorted(self.ends, at, side="right"))
        array, first, last = self.documents[index]
        begin = at - (int(self.ends[index - 1]) if index else 0)
        ids = np.asarray(self.arrays[array][max(first + begin - (self.opening is not None), first) : last][: count + 1])
        if self.opening is not None and begin == 0:
            ids = np.concatenate([[self.opening], ids])[: count + 1]
        if len(ids) > count:
            return ids[:-1], ids[1:]
        behind = IGNORE_INDEX if self.end is None else self.end
        return ids, np.concatenate([ids[1:].astype(np.int64), [behind]])


class Documents:
    """Epoch after epoch of shuffled documents, one after another in micro-batches of exactly so many tokens.

    A document that is longer than the sequence length, or reaches beyond its micro-batch, goes on in the next sequence
    without what was before it. With `group` or `merge_dropout` every epoch's tokens are put together anew, in memory.
    """

    def __init__(self, data: Data, source: Source, steps: int, seed: int, parts: Ids | None) -> None:
        self.data, self.source, self.steps, self.seed, self.parts = data, source, steps, seed, parts
        if not len(source.documents):
            raise TritiumError("data: train: there is no document that is not empty")
        self._starts = [0]  # of every epoch so far, in tokens
        self._made: dict[int, Epoch] = {}

    def at(self, step: int) -> list[Micro]:
        done = step / self.steps
        size, length = self.data.tokens_at(done), self.data.length_at(done)
        first = step * self.data.accumulation
        return [self._micro((first + index) * size, size, length) for index in range(self.data.accumulation)]

    def _micro(self, at: int, size: int, length: int) -> Micro:
        pieces = []
        while size:
            epoch, start = self._find(at)
            pieces.append(epoch.take(at - start, min(length, size)))
            at += len(pieces[-1][0])
            size -= len(pieces[-1][0])
        return Micro.of(pieces)

    def _find(self, at: int) -> tuple[Epoch, int]:
        """The epoch of a place in the stream of all of them, and where that epoch begins."""
        while at >= self._starts[-1]:
            self._starts.append(self._starts[-1] + self.epoch(len(self._starts) - 1).size)
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self.epoch(number), self._starts[number]

    def epoch(self, number: int) -> Epoch:
        if number not in self._made:
            while len(self._made) > 1:  # a batch may reach from one to the next
                self._made.pop(min(self._made))
            self._made[number] = self._make(np.random.default_rng([self.seed, number]))
        return self._made[number]

    def _make(self, rng: np.random.Generator) -> Epoch:
        arrays, documents = self.source.arrays, self.source.documents
        if self.data.group is not None or self.parts is not None:
            flat = np.concatenate([arrays[array][first:last] for array, first, last in documents]).astype(np.int64)
            owners: Ids = np.repeat(np.arange(len(documents)), documents[:, 2] - documents[:, 1])
            if self.data.group is not None:
                owners = np.cumsum(rng.random(len(documents)) < 1 / self.data.group)[owners]
            if self.parts is not None:
                flat, owners = split_tokens(flat, owners, self.parts, self.data.merge_dropout, rng)
            firsts = np.flatnonzero(np.diff(owners, prepend=-1))
            arrays, lasts = (flat,), np.append(firsts[1:], len(flat))
            documents = np.column_stack([np.zeros_like(firsts), firsts, lasts])
        return Epoch(arrays, documents[rng.permutation(len(documents))], self.source.opening, self.source.end)


def split_tokens(ids: Ids, owners: Ids, parts: Ids, rate: float, rng: np.random.Generator) -> tuple[Ids, Ids]:
    """Another spelling of the same text, and each token's owner: every merged token falls into the two that it was
    merged from with chance `rate`, its halves likewise (after Provilkov et al. 2020, arXiv:1910.13267).
    """
    whole: Ids = np.ones(len(ids), dtype=bool)  # may still fall apart
    while True:
        chosen: Ids = whole & (parts[ids, 0] >= 0) & (rng.random(len(ids)) < rate)
        if not chosen.any():
            return ids, owners
        ids, owners, whole = (np.repeat(values, 1 + chosen) for values in (ids, owners, chosen))
        first = np.flatnonzero(chosen) + np.arange(chosen.sum())
        ids[first], ids[first + 1] = parts[ids[first]].T


def evaluation_batches(source: Source, data: Data, evaluation: Evaluation, size: int) -> Iterator[Micro]:
    """The validation tokens once, in order, in micro-batches of about `size` tokens.

    Windows begin every `stride` tokens, and where they overlap a token counts only in the first that predicts it. With
    sampling `documents` no window crosses a boundary, and each begins with the opening; the end is not measured.
    """
    window = evaluation.window or data.lengths[-1]
    stride = min(evaluation.stride or window, window)
    left = source.size if evaluation.tokens == "whole" else evaluation.tokens
    assert isinstance(left, int)
    waiting: list[tuple[Ids, Ids]] = []
    for ids in _sequences(source, data):
        ids, scored = ids[: left + 1], 0
        for begin in range(0, len(ids) - 1, stride):
            end = min(begin + window, len(ids) - 1)
            labels = ids[begin + 1 : end + 1].astype(np.int64)
            labels[: scored - begin] = IGNORE_INDEX
            left, scored = left - (end - scored), end
            waiting.append((ids[begin:end], labels))
            if sum(len(tokens) for tokens, _ in waiting) + window > size:
                yield Micro.of(waiting)
                waiting = []
            if end == len(ids) - 1:
                break
    if waiting:
        yield Micro.of(waiting)


def _sequences(source: Source, data: Data) -> Iterator[Ids]:
    if data.sampling == "windows":
        yield from source.arrays
        return
    opening = [] if source.opening is None else [source.opening]
    for array, first, last in source.documents:
        yield np.concatenate([np.asarray(opening, dtype=np.int64), source.arrays[array][first:last].astype(np.int64)])
