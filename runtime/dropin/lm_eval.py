"""Our decoder as a model of EleutherAI's evaluation harness (`lm_eval`), under the name `tritium`.

    python -m tritium.runtime.dropin.lm_eval --model tritium --model_args pretrained=DIR --tasks arc_easy

is `lm_eval`'s own command line with that model known to it; in Python `register()` makes it known. Log-likelihoods come
from one forward over packed sequences without padding, of whose logits only those that are asked for are made; text
comes from the engine, whose tokens do not depend on what else is asked.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from ..engine.engine import Engine
from ..engine.prompts import Answer
from ..errors import TritiumError
from ..generation import AT_ONCE, SamplingOptions
from ..loading import load
from ..log_probs import log_probs_of
from ..tokenizer import StreamDecoder
from .packages import module_of

NAME = "tritium"
LOGIT_ROWS = 1024  # tokens whose logits stand in memory at one time


harness = partial(module_of, "lm_eval", "lm_eval>=0.4.9")
_TemplateLM = harness("api.model").TemplateLM
_utils = harness("utils")


class TritiumLM(_TemplateLM):  # type: ignore[misc, valid-type]
    """A checkpoint that `tritium.load` reads, scored and continued as the harness's own `hf` model does it."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        backend: str = "auto",
        quantise: str | None = None,
        variant: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """`pretrained` and what follows the batch size are `tritium.load`'s. `batch_size` bounds the sequences of one
        forward, `auto` leaves it to the number of tokens, and `max_batch_size` bounds that. `add_bos_token` overrides
        what the tokenizer does by itself.

        Raises TritiumError for a checkpoint without a tokenizer, and what `tritium.load` raises.
        """
        super().__init__()
        how: dict[str, Any] = {"variant": variant, "device": device, "dtype": dtype, "backend": backend}
        self.model, tokenizer, spec = load(pretrained, quantise=quantise, progress=False, **how)
        if tokenizer is None:
            raise TritiumError(f"{pretrained}: has no tokenizer, and the harness speaks in text")
        self.tokenizer = tokenizer
        self._device = self.model.device
        self._name = str(pretrained)
        self._rows = _rows(batch_size, max_batch_size)
        self.max_length = spec.context_length if max_length is None else min(max_length, spec.context_length)
        self.max_gen_toks = max_gen_toks
        self._add_bos = add_bos_token

    @property
    def eot_token_id(self) -> int:
        eos = self._special("eos_token")
        if eos is None and not self.tokenizer.eos_ids:
            raise TritiumError(f"{self._name}: its tokenizer names no token that ends a text")
        return self.tokenizer.eos_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        bos = self._special("bos_token")
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def _special(self, name: str) -> int | None:
        text = self.tokenizer.special.get(name)
        found: int | None = None if text is None else self.tokenizer.fast.token_to_id(text)
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = True if self._add_bos is None else self._add_bos
            bos = self.tokenizer.special.get("bos_token")
            if bos is not None and string.startswith(bos):  # a template put it there
                add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens)

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation after the context, whether greedy decoding would give it), each."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        counts = [
            min(len(continuation), len(tokens) - 1) for (*_, continuation), tokens in zip(requests, whole, strict=True)
        ]
        for indices in self._batches(whole):
            scores = self._score([whole[index] for index in indices], [counts[index] for index in indices])
            for index, score in zip(indices, scores, strict=True):
                found[index] = score
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, score)
        return found

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices, the longest first, in groups of at most AT_ONCE tokens."""
        group: list[int] = []
        tokens = 0
        for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
            length = len(sequences[index])
            if group and (tokens + length > AT_ONCE or len(group) == self._rows):
                yield group
                group, tokens = [], 0
            group.append(index)
            tokens += length
        if group:
            yield group

    @torch.inference_mode()
    def _score(self, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """Of each sequence's last `counts` tokens, given what stands before them."""
        model, device = self.model, self.model.device
        lengths = [len(tokens) - 1 for tokens in sequences]
        inputs = torch.tensor([token for tokens in sequences for token in tokens[:-1]], device=device)
        model.check_tokens(inputs, "lm_eval")
        batch = Batch.fresh(lengths, device)
        x, norm = model._advance(inputs, batch, model.kernels)
        places = [
            end - back for end, count in zip(batch.starts[1:], counts, strict=True) for back in range(count, 0, -1)
        ]
        targets = [
            token for tokens, count in zip(sequences, counts, strict=True) for token in tokens[len(tokens) - count :]
        ]
        hidden = model.kernels.norm(x, norm)[1]
        log_probs, greedy = self._of(hidden[places], torch.tensor(targets, device=device))
        ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
        return [(float(log_probs[a:b].sum()), bool(greedy[a:b].all())) for a, b in pairwise(ends)]

    def _of(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Each target's log-probability, float64 on the host, and whether it is the likeliest: [T] of hidden [T, E]."""
        head, kernels = self.model._bind_head(), self.model.kernels
        log_probs, greedy = [], []
        for rows, wanted in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            logits = kernels.norm_linear(rows, None, head)[1]
            log_probs.append(log_probs_of(kernels, logits, wanted))
            greedy.append(logits.argmax(-1) == wanted)
        return torch.cat(log_probs).double().cpu(), torch.cat(greedy).cpu()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context's length, each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text)
            for pair in _utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *_utils.make_disjoint_window(pair)))
                owners.append(owner)
        found = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[owner] += score
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to one of its stop strings, which is cut off."""
        tokens = min(2**18, max(1, len(requests)) * self.max_length)
        eos = self._special("eos_token")
        eos_ids = sorted({*self.tokenizer.eos_ids, *([] if eos is None else [eos])})
        engine = Engine(self.model, self.tokenizer, tokens=max(tokens, self.max_length), rows=min(self._rows or 64, 64))
        answers = []
        for request in requests:
            context, settings = request.args
            options, stops = _options(settings, self.max_gen_toks)
            if (room := self.max_length - options.max_new_tokens) < 1:
                raise TritiumError(f"max_gen_toks: {options.max_new_tokens} leave no room in {self.max_length} tokens")
            prompt = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            submitted = engine.submit(prompt, options, eos_ids=eos_ids)
            answers.append(Answer(submitted, StreamDecoder(self.tokenizer, stops)))
        by_request = {answer.request: answer for answer in answers}
        for mine, token in engine.run():
            by_request[mine].add(token)
        found = [answer.whole() for answer in answers]
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def _rows(batch_size: int | str | None, most: int | None) -> int | None:
    """The most sequences of one forward; None: as many as there is room for tokens."""
    text = "auto" if batch_size is None else str(batch_size)
    if text.startswith("auto"):
        return most
    if not text.isdigit() or int(text) < 1:
        raise TritiumError(f"batch_size: must be a whole number of 1 or more, or auto, got {batch_size!r}")
    return int(text)


def _options(settings: dict[str, Any], tokens: int) -> tuple[SamplingOptions, list[str]]:
    """The harness's generation settings as ours, greedy unless they ask for a sample, and the stop strings."""
    until = settings.get("until") or []
    stops = [text for text in ([until] if isinstance(until, str) else until) if text]
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    count = next((settings[name] for name in names if settings.get(name) is not None), tokens)
    temperature = float(settings.get("temperature") or 0.0)
    if settings.get("do_sample") and "temperature" not in settings:
        temperature = 1.0
    if settings.get("do_sample") is False:
        temperature = 0.0
    top_k, top_p = int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0)
    return SamplingOptions(int(count), temperature, max(top_k, 0), top_p, settings.get("seed")), stops


def register() -> None:
    """Makes `--model tritium` known to `lm_eval`; harmless where it is already."""
    registry = harness("api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME, target=f"{__package__}.lm_eval:TritiumLM")


def main() -> None:
    """`lm_eval`'s command line, with our model."""
    register()
    harness("__main__").cli_evaluate()


if __name__ == "__main__":
    main()
