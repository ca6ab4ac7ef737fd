"""Text in, text out: prompts and conversations over a loaded model."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .decoder import Decoder
from .errors import TritiumError
from .generation import SamplingOptions, generate
from .loading import pick_device
from .log_probs import Log
from .tokenizer import Messages, StreamDecoder, Tokenizer

CONTINUATION, ANSWER = 100, 512  # new tokens, where nobody says how many: after a prompt, in a conversation


@dataclass
class Stats:
    """What a text took, by the clock on the wall, from the asking for its first piece to its last token; the time that
    the reader of a stream keeps each piece is in it.
    """

    prompt_tokens: int
    new_tokens: int = 0  # with an EOS, and with what a stop string cut off
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    log_probs: list[float] | None = None  # of the new tokens, where they were asked for

    @property
    def tokens_per_second(self) -> float:
        """Of those after the first: what decoding gives."""
        decoding = self.seconds - self.first_token_seconds
        return (self.new_tokens - 1) / decoding if decoding > 0 else 0.0

    def note(self, seconds: float) -> None:
        """Counts a token that came so long after the beginning."""
        if not self.new_tokens:
            self.first_token_seconds = seconds
        self.new_tokens += 1
        self.seconds = seconds

    def __str__(self) -> str:
        return (
            f"first token {self.first_token_seconds:.3f} s after a prompt of {self.prompt_tokens}; "
            f"{self.new_tokens} new tokens, {self.tokens_per_second:.1f} tokens/s after the first"
        )


class TextGenerator:
    """Generates text with a loaded model and its tokenizer.

    `device` moves the model where it is not there yet. Options that are None take the checkpoint's own
    generation_config.json, then temperature 1.0, top_k 0 (all) and top_p 0.9. A repetition_penalty there has no effect.
    `last_stats` is what the last text took, as far as it came.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, device: str | torch.device | None = None) -> None:
        if tokenizer is None:
            raise TritiumError("this checkpoint has no tokenizer file: text needs one, token ids go to model.generate")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise TritiumError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {model.config.vocab_size}"
            )
        self.model = model if device is None else model.to(pick_device(device))
        self.tokenizer = tokenizer
        self.last_stats: Stats | None = None
        self._vocabulary = tokenizer.id_limit  # the embedding may have more rows: nothing is to be made of them

    def generate(
        self,
        prompt: str,
        *,
        stream: bool = False,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        log_probs: bool = False,
    ) -> str | Iterator[str]:
        """The text that follows a prompt; with `stream`, its pieces as they come, each of whole characters.

        Ends at an EOS of the checkpoint, before the first of the `stop` strings, or after `max_new_tokens` (None: 100,
        or what the context has left). With `log_probs`, `last_stats` has the log-probability of each new token, at
        temperature 1, whatever the token was chosen by.
        """
        tokens = self.tokenizer.encode(prompt)
        limit = self.limit(max_new_tokens, CONTINUATION, tokens)
        pieces = self._pieces(tokens, self.options(limit, temperature, top_k, top_p, seed), stop, log_probs)
        return pieces if stream else "".join(pieces)

    def chat(
        self,
        message: str | Messages,
        *,
        stream: bool = False,
        system: str | None = None,
        enable_thinking: bool | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        log_probs: bool = False,
    ) -> str | Iterator[str]:
        """The answer to a message, or to a whole conversation of {"role", "content"} mappings.

        `enable_thinking` is Qwen3's switch: False asks for an answer without reasoning. A checkpoint without a chat
        template continues the message as plain text. Otherwise as `generate`, with 512 new tokens where None is given.
        """
        messages: Messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        if self.tokenizer.chat_template is None and isinstance(message, str) and system is None:
            tokens = self.tokenizer.encode(message)
        else:
            tokens = self.tokenizer.encode_chat(messages, enable_thinking=enable_thinking)
        limit = self.limit(max_new_tokens, ANSWER, tokens)
        pieces = self._pieces(tokens, self.options(limit, temperature, top_k, top_p, seed), stop, log_probs)
        return pieces if stream else "".join(pieces)

    def limit(self, asked: int | None, usual: int, tokens: Sequence[int]) -> int:
        """What was asked for as it is; else the usual, or what the context has left (1 where that is nothing)."""
        return max(1, min(usual, self.model.config.context_length - len(tokens))) if asked is None else asked

    def options(
        self,
        max_new_tokens: int,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> SamplingOptions:
        """The options given, the checkpoint's where None, the library's where it has none either."""
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        chosen = {**self.tokenizer.defaults, **{key: value for key, value in given.items() if value is not None}}
        return SamplingOptions(max_new_tokens=max_new_tokens, seed=seed, **chosen)

    def _pieces(
        self, tokens: Sequence[int], options: SamplingOptions, stop: Sequence[str], log_probs: bool
    ) -> Iterator[str]:
        # Both check what they are given here and now, not when the first piece is asked for.
        decoder = StreamDecoder(self.tokenizer, stop)
        log: Log | None = [] if log_probs else None
        steps = generate(self.model, [tokens], options, self.tokenizer.eos_ids, self._vocabulary, log)
        return self._stream(decoder, steps, log, Stats(len(tokens), log_probs=[] if log_probs else None))

    def _stream(
        self, decoder: StreamDecoder, steps: Iterator[list[int | None]], log: Log | None, stats: Stats
    ) -> Iterator[str]:
        self.last_stats = stats
        eos = set(self.tokenizer.eos_ids)
        start = time.perf_counter()
        for (token,) in steps:
            stats.note(time.perf_counter() - start)
            if stats.log_probs is not None and log and log[-1][0] is not None:
                stats.log_probs.append(log[-1][0])
            if token is not None and token not in eos and (piece := decoder.add(token)):
                yield piece
            if decoder.stopped:
                return
        if rest := decoder.finish():
            yield rest
