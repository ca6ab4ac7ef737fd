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
from .log_probs import Log, as_log, choose
from .plan import Plan

AT_ONCE = 8192  # tokens of prompts in one forward: more would only take memory

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

    @property
    def choice(self) -> tuple[float, int, float]:
        """(temperature, top_k, top_p): what one token is chosen by."""
        return self.temperature, self.top_k, self.top_p

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
    log_probs: Log | None = None,
) -> Iterator[list[int | None]]:
    """Gives, step by step, the new token of every row: None once a row has met an EOS (which it does yield).

    A list given as `log_probs` has for each token that was given its log-probability: see log_probs.py.

    Each row is what it would be alone: rows share a batch, not positions, padding or random numbers. Only ids below
    `vocabulary` are chosen, all where it is None: an embedding may have more rows than there are tokens. Raises
    TritiumError at the call, before the first step, for an empty prompt, ids outside the vocabulary, and a prompt that
    with its new tokens exceeds the context.
    """
    check_prompts(model, prompts, options)
    return _steps(model, prompts, options, eos_ids, vocabulary, log_probs)


def _steps(
    model: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Sequence[int],
    vocabulary: int | None,
    log_probs: Log | None,
) -> Iterator[list[int | None]]:
    if not prompts or options.max_new_tokens == 0:
        return
    stops = frozenset(eos_ids)
    done = [False] * len(prompts)
    follow = _on_the_host if model.kernels.name == "torch" or model.exchange is not None else _on_the_device
    for tokens, scores in follow(model, prompts, options, eos_ids, vocabulary, log_probs is not None):
        new: list[int | None] = [None if ended else token for token, ended in zip(tokens, done, strict=True)]
        if -1 in new:
            raise not_numbers(model)
        done = [ended or token in stops for token, ended in zip(new, done, strict=True)]
        if log_probs is not None:
            log_probs.append(as_log(scores, new))
        yield new
        if all(done):
            return


def _on_the_device(
    model: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Sequence[int],
    vocabulary: int | None,
    scored: bool,
) -> Iterator[tuple[list[int], list[float] | None]]:
    """The tokens of each step, where `scored` with log-probabilities, decoded without the host: see decoding.py."""
    counts = [len(prompt) for prompt in prompts]
    with torch.inference_mode():  # not around a yield: whoever takes the token must not be in it
        plan = model.bind()
        capacity = max(counts) + options.max_new_tokens
        decoding = model.sessions.take(model, plan, len(prompts), capacity, options, eos_ids, vocabulary, scored)
    try:
        with torch.inference_mode(), decoding.working():
            uniforms = _uniforms(options, len(prompts), model)
            logits = prefill(model, plan, prompts, decoding.cache)
            first = _chosen(model, logits, options, vocabulary, uniforms, 0, scored)
            decoding.begin(counts, uniforms)
        for number, step in enumerate(decoding.run(*first, options.max_new_tokens), start=1):
            scores = decoding.log_probs(number - 1)[: len(prompts)] if scored else None
            yield step[: len(prompts)], scores
            if number < options.max_new_tokens:
                model.sessions.check(decoding)
    finally:
        model.sessions.give_back(decoding)


def _on_the_host(
    model: "Decoder",
    prompts: Sequence[Sequence[int]],
    options: SamplingOptions,
    eos_ids: Sequence[int],
    vocabulary: int | None,
    scored: bool,
) -> Iterator[tuple[list[int], list[float] | None]]:
    """The same where steps are PyTorch's, or processes must meet in each."""
    rows, counts = list(range(len(prompts))), [len(prompt) for prompt in prompts]
    with torch.inference_mode():
        plan, capacity = model.bind(), max(counts) + options.max_new_tokens
        cache = KVCache(model.local_config, len(rows), capacity, dtype=model.dtype, device=model.device)
        uniforms = _uniforms(options, len(rows), model)
        logits = prefill(model, plan, prompts, cache)
        tokens, scores = _chosen(model, logits, options, vocabulary, uniforms, 0, scored)
    batch: Batch | None = None
    for step in range(1, options.max_new_tokens + 1):
        yield tokens.tolist(), None if scores is None else scores.tolist()
        if step == options.max_new_tokens:
            return
        with torch.inference_mode():
            # From the second step on the batch moves on where it lies.
            batch = Batch.appended(cache, rows, [1] * len(rows)) if batch is None else batch.step()
            logits = model.run(plan, tokens, batch, last_only=True)[1]
            tokens, scores = _chosen(model, logits, options, vocabulary, uniforms, step, scored)


def prefill(
    model: "Decoder", plan: Plan, prompts: Sequence[Sequence[int]], cache: KVCache, at_once: int = AT_ONCE
) -> Tensor:
    """Puts the prompts into the cache's first rows, at most about `at_once` tokens in one forward: the logits [rows, V]
    after each row's last token. On the Triton path the pieces change no bit.
    """
    counts, done = [len(prompt) for prompt in prompts], [0] * len(prompts)
    logits: Tensor | None = None
    while rows := [row for row, count in enumerate(counts) if done[row] < count]:
        each = max(1, at_once // len(rows))
        ends = [min(counts[row], done[row] + each) for row in rows]
        tokens = [token for row, end in zip(rows, ends, strict=True) for token in prompts[row][done[row] : end]]
        new = [end - done[row] for row, end in zip(rows, ends, strict=True)]
        batch = Batch.appended(cache, rows, new, [counts[row] for row in rows])
        found = model.run(plan, torch.tensor(tokens, device=model.device), batch, last_only=True)[1]
        if logits is None:
            logits = found
        else:  # later pieces are of the longer prompts only
            logits[rows] = found
        for row, end in zip(rows, ends, strict=True):
            done[row] = end
    assert logits is not None
    return logits


def _chosen(
    model: "Decoder",
    logits: Tensor,
    options: SamplingOptions,
    vocabulary: int | None,
    uniforms: Tensor | None,
    step: int,
    scored: bool,
) -> tuple[Tensor, Tensor | None]:
    kernels, uniform = model.kernels, None if uniforms is None else uniforms[:, step]
    return choose(kernels, logits, lambda x: kernels.sample(x, *options.choice, uniform), vocabulary, scored)


def not_numbers(model: "Decoder") -> TritiumError:
    return TritiumError(f"the logits are not numbers: the weights are broken, or overflow {model.dtype}")


def check_prompts(model: "Decoder", prompts: Sequence[Sequence[int]], options: SamplingOptions) -> None:
    """Raises TritiumError for what `generate` says it refuses."""
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
    log_probs: Log | None = None,
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
    for new in generate(model, prompts, options, eos_ids, log_probs=log_probs):
        steps.append([pad_token_id if token is None else token for token in new])
        if progress is not None:
            progress(len(steps))
    if not steps:
        return input_ids.clone()
    return torch.cat((input_ids, torch.tensor(steps, dtype=input_ids.dtype, device=input_ids.device).t()), 1)
