"""Can a token be chosen in about the time of reading the logits once, whatever the setting?

The definition, which sorts, is the peer. A sampled token is right where, in float64, the row's uniform number lies in
its part of the cumulative distribution; what float32 sums cannot tell apart is free.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.sampling import sample_reference

from ..case import Case, Draw, call, kernel
from ..peers import flashinfer
from ..shapes import ITEM, spec

FREE = 1e-4  # of the probability mass: sums of 150,000 float32 terms


def misplaced(
    tokens: Tensor, logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None
) -> str | None:
    """What is wrong with the tokens of rows [R, V]; None where they are right."""
    if tokens.dtype != torch.int64 or tokens.shape != logits.shape[:1]:
        return f"tokens are {tokens.dtype} {list(tokens.shape)}"
    if temperature == 0 or uniform is None:
        differ = (tokens != logits.argmax(-1)).nonzero()
        return f"row {differ[0].item()} is not the likeliest token" if len(differ) else None
    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    probabilities = (ordered / temperature).softmax(-1)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    kept = (probabilities.cumsum(-1) - probabilities < top_p).double()
    probabilities = probabilities * kept / (probabilities * kept).sum(-1, keepdim=True)
    end = probabilities.cumsum(-1)
    place = (order == tokens.unsqueeze(1)).double().argmax(-1, keepdim=True)
    end_at, mass = end.gather(1, place).squeeze(1), probabilities.gather(1, place).squeeze(1)
    off = torch.maximum(uniform.double() - end_at, end_at - mass - uniform.double())
    row = int(off.argmax())
    return f"row {row}: token {int(tokens[row])} is {off[row].item():.2g} away" if off[row] > FREE else None


def sampling(rows: int, vocabulary: int, temperature: float, top_k: int, top_p: float) -> Case:
    setting = (temperature, top_k, top_p)

    def make(draw: Draw) -> tuple[Any, ...]:
        return draw.normal(rows, vocabulary, scale=2.0), *setting, None if temperature == 0 else draw.uniform(rows)

    def check(out: Any, args: Sequence[Any]) -> str | None:
        return misplaced(out, *args)

    peers = {"torch": call(sample_reference)}
    if temperature == 0:
        peers["flashinfer"] = flashinfer(_flashinfer_greedy)
    return Case(
        name=f"{rows} x {vocabulary} temperature {temperature:g} top-k {top_k} top-p {top_p:g}",
        make=make,
        ours=kernel("sampling", "sample"),
        definition=sample_reference,
        reads=rows * vocabulary * ITEM,
        writes=8 * rows,
        flop=4 * rows * vocabulary,
        peers=peers,
        check=check,
    )


def _flashinfer_greedy(package: Any, logits: Tensor, *rest: Any) -> Any:
    wide = logits.float()
    return lambda: package.sampling.top_k_top_p_sampling_from_logits(wide, 1, 1.0).long()


SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 0, 0.9), (0.7, 50, 0.9)]
CASES = [
    *(sampling(rows, spec("qwen3 8B").vocab_size, *setting) for rows in (1, 64) for setting in SETTINGS),
    sampling(1, spec("mobilellm 950m").vocab_size, 0.8, 0, 0.9),
]
SMOKE = [sampling(2, 37, *SETTINGS[0]), sampling(1, 37, *SETTINGS[2])]
