"""The one generation loop: prefill, then a token a step, for a ragged batch of prompts."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.sampling import philox_uniform_reference
from .batch import Batch, Padding
from .errors import TritiumError
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .decoder import Decoder


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. `temperature=0` is greedy, `top_k=0` and `top_p=1` keep every token."""

    max_new_tokens: int = 100
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    seed: int | None = None  # row r of a batch uses seed + r; None draws a fresh one

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            kind = int | float if name in ("temperature", "top_p") else int
            if isinstance(value, bool) or not isinstance(value, kind):
                raise TritiumError(f"{name}: must be a{' whole' if kind is int else ''} number, got {value!r}")
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 0, "0 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (self.seed is None or -(2**62) <= self.seed < 2**62, "between -2^62 and 2^62"),
        }
        for name, (valid, wanted) in rules.items():
            if not valid:
                raise TritiumError(f"{name}: must be {wanted}, got {getattr(self, name)}")


def generate(
    model: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Sequence[int] = (),
    vocabulary: int | None = None,
) -> Iterator[list[int | None]]:
    """Gives, step by step, the new token of every row: None once a row has met an EOS (which it does yield).

    Each row is what it would be alone: rows share a batch, not positions, padding or random numbers. Only ids below
    `vocabulary` are chosen, all where it is None: an embedding may have more rows than there are tokens. Raises
    TritiumError at the call, before the first step, for an empty prompt, ids outside the vocabulary, and a prompt that
    with its new tokens exceeds the context.
    """
    _check(model, prompts, options)
    return _steps(model, prompts, options, eos_ids, vocabulary)


def _steps(
    model: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Sequence[int],
    vocabulary: int | None,
) -> Iterator[list[int | None]]:
    if not prompts or options.max_new_tokens == 0:
        return
    rows = list(range(len(prompts)))
    counts = [len(prompt) for prompt in prompts]
    uniforms = _uniforms(options, len(rows), model)
    stops = frozenset(eos_ids)
    done = [False] * len(rows)
    with torch.inference_mode():
        cache = KVCache(
            model.local_config, len(rows), max(counts) + options.max_new_tokens, dtype=model.dtype, device=model.device
        )
        plan = model.bind()
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    for step in range(options.max_new_tokens):
        with torch.inference_mode():  # not around the yield: whoever takes the token must not be in it
            # Prompt, then the first decode step; from then on the batch moves on where it lies, on the device.
            if step == 0:
                batch = Batch.appended(cache, rows, counts)
            else:
                batch = Batch.appended(cache, rows, [1] * len(rows)) if step == 1 else batch.step()
            _, logits = model.run(plan, tokens, batch, last_only=True)
            if vocabulary is not None and vocabulary < logits.shape[1]:
                # Not a narrower view: the rows' length, and with it the kernels' wide loads, stays a round number.
                logits[:, vocabulary:] = float("-inf")
            uniform = None if uniforms is None else uniforms[:, step]
            tokens = model.kernels.sample(logits, options.temperature, options.top_k, options.top_p, uniform)
        new: list[int | None] = tokens.tolist()  # the only look that the host takes in a step
        if -1 in new:
            raise TritiumError(f"the logits are not numbers: the weights are broken, or overflow {model.dtype}")
        for row, token in enumerate(new):
            if done[row]:
                new[row] = None
            elif token in stops:
                done[row] = True
        yield new
        if all(done):
            return


def _check(model: "Decoder", prompts: Sequence[Sequence[int]], options: SamplingOptions) -> None:
    context = model.config.context_length
    for row, prompt in enumerate(prompts):
        where = f"prompt {row}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise TritiumError(f"{where} is empty: give at least one token")
        if len(prompt) + options.max_new_tokens > context:
            raise TritiumError(
                f"{where} has {len(prompt)} tokens, and {options.max_new_tokens} more would exceed the context length "
                f"of {context}: shorten it or ask for fewer new tokens"
            )
        model.check_tokens(torch.tensor(prompt), where)


def _uniforms(options: SamplingOptions, rows: int, model: "Decoder") -> Tensor | None:
    """[rows, steps] random numbers, one a token."""
    if options.temperature == 0:
        return None
    seed = secrets.randbits(62) if options.seed is None else options.seed
    if model.exchange is not None and options.seed is None:  # all processes must draw the same tokens
        seed = model.exchange.common(seed, model.device)
    seeds = torch.arange(rows, dtype=torch.int64).unsqueeze(1) + seed
    return philox_uniform_reference(seeds, torch.arange(options.max_new_tokens)).to(model.device)


def generate_padded(
    model: "Decoder",
    input_ids: Tensor,
    attention_mask: Tensor | None,
    options: SamplingOptions,
    eos_ids: Sequence[int],
    pad_token_id: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """`Decoder.generate`: padded prompts [B, S] -> [B, S + N]."""
    if input_ids.dim() != 2:
        raise TritiumError(f"input_ids: must be [batch, length], got {list(input_ids.shape)}")
    padding = Padding.of(input_ids, attention_mask)
    packed = padding.pack(input_ids).tolist()
    prompts, start = [], 0
    for count in padding.counts:
        prompts.append(packed[start : start + count])
        start += count
    steps = []
    for new in generate(model, prompts, options, eos_ids):
        steps.append([pad_token_id if token is None else token for token in new])
        if progress is not None:
            progress(len(steps))
    if not steps:
        return input_ids.clone()
    return torch.cat((input_ids, torch.tensor(steps, dtype=input_ids.dtype, device=input_ids.device).t()), 1)
