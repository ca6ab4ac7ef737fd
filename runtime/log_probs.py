"""Log-probabilities of tokens: of those that generation chose, and of those of a text.

Both are minus the losses of kernels/cross_entropy.py, at temperature 1 and over all ids, whatever tokens were chosen
by. Where the logits' bits are the same, as in the mode `sampler_equals_trainer`, so are those of the log-probabilities.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .kernel_set import KernelSet

Log = list[list[float | None]]
"""A list that fills step by step: each row's log-probability, None behind its end."""


def log_probs_of(kernels: KernelSet, logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [R, V], tokens [R] int64 -> float32 [R] (float64 of such logits); NaN for a token that is none."""
    return -kernels.cross_entropy(logits, tokens, reduction="none")


def choose(
    kernels: KernelSet, logits: Tensor, sample: Callable[[Tensor], Tensor], vocabulary: int | None, scored: bool
) -> tuple[Tensor, Tensor | None]:
    """(tokens [R] that `sample` chooses below `vocabulary`, their log-probabilities where `scored`).

    Logits [R, V] of ids that are not to be chosen are written over.
    """
    limited = logits
    if vocabulary is not None and vocabulary < logits.shape[1]:
        # Not a narrower view: the rows' length, and with it the kernels' wide loads, stays a round number.
        limited = logits.clone() if scored else logits
        limited[:, vocabulary:] = float("-inf")
    tokens = sample(limited)
    return tokens, log_probs_of(kernels, logits, tokens) if scored else None


def as_log(step: list[float] | None, tokens: list[int | None]) -> list[float | None]:
    """A step's log-probabilities as `Log` has them."""
    assert step is not None
    return [None if token is None else value for value, token in zip(step, tokens, strict=True)]


def padded(log: Log, rows: int) -> Tensor:
    """[rows, steps] float32 of a log, 0 behind a row's end."""
    steps = [[0.0 if value is None else value for value in step] for step in log]
    return torch.tensor(steps, dtype=torch.float32).reshape(len(log), rows).t().contiguous()
