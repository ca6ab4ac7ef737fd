"""The n-gram models that the bundled model is measured against."""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman, 1998) over the ids below `vocab`, uniform below unigrams."""

    def __init__(self, ids: Ids, vocab: int, order: int = 5) -> None:
        self.vocab = vocab
        self.order = order
        self.levels: list[tuple[Ids, Floats, Ids, Floats]] = []  # grams, their share, contexts, their back-off mass
        windows = np.lib.stride_tricks.sliding_window_view(ids, order)
        grams, counts = np.unique(self._pack(windows), return_counts=True)
        for length in range(order, 0, -1):
            discount = _discounts(counts)[np.minimum(counts, 3)]
            contexts, first = np.unique(grams // vocab, return_index=True)
            totals = np.add.reduceat(counts, first)
            share = (counts - discount) / np.repeat(totals, np.diff([*first, len(grams)]))
            self.levels.insert(0, (grams, share, contexts, np.add.reduceat(discount, first) / totals))
            # A shorter gram counts the different ids that precede it.
            grams, counts = np.unique(grams % vocab ** (length - 1), return_counts=True)

    def _pack(self, windows: Ids) -> Ids:
        """[N, n] ids as one number each."""
        packed = np.zeros(len(windows), dtype=np.int64)
        for column in windows.T:
            packed = packed * self.vocab + column
        return packed

    def probability(self, contexts: Ids, words: Ids) -> Floats:
        """contexts [N, order - 1] and words [N] -> the probability of each word behind its context, [N]."""
        result = np.full(len(words), 1 / self.vocab)
        for length, (grams, share, known, mass) in enumerate(self.levels):
            context = self._pack(contexts[:, self.order - 1 - length :])
            found, place = _find(known, context)
            seen, gram = _find(grams, context * self.vocab + words)
            result = np.where(found, np.where(seen, share[gram], 0.0) + mass[place] * result, result)
        return result

    def bits(self, ids: Ids) -> float:
        """Bits that a text costs. Raises ValueError where probabilities do not sum to one."""
        padded = np.concatenate([np.zeros(self.order - 1, dtype=np.int64), ids])
        contexts = np.lib.stride_tricks.sliding_window_view(padded, self.order - 1)[: len(ids)]
        every = np.arange(self.vocab)
        for context in contexts[:: max(1, len(ids) // 200)]:
            total = self.probability(np.tile(context, (self.vocab, 1)), every).sum()
            if abs(total - 1) > 1e-9:
                raise ValueError(f"the probabilities behind {context} sum to {total}")
        return float(-np.log2(self.probability(contexts, ids)).sum())


def _discounts(counts: Ids) -> Floats:
    """What to take off counts 0, 1, 2 and 3 or more; 0.5 where the counts of counts are too few to estimate it."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1:5].min() == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    return np.array([0.0, *(np.clip(k - (k + 1) * y * n[k + 1] / n[k], 0.01, k) for k in (1, 2, 3))])


def _find(table: Ids, keys: Ids) -> tuple[NDArray[np.bool_], Ids]:
    """Whether each key is in the sorted table, and where (anywhere, if it is not)."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return table[place] == keys, place
