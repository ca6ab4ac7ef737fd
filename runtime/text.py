"""Text in, text out: prompts and conversations over a loaded model."""

from collections.abc import Iterator, Sequence

import torch

from .decoder import Decoder
from .errors import TritiumError
from .generation import SamplingOptions, generate
from .loading import pick_device
from .tokenizer import Messages, StreamDecoder, Tokenizer


class TextGenerator:
    """Generates text with a loaded model and its tokenizer.

    `device` moves the model where it is not there yet. Options that are None take the checkpoint's own
    generation_config.json, then temperature 1.0, top_k 0 (all) and top_p 0.9. A repetition_penalty there has no effect.
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
    ) -> str | Iterator[str]:
        """The text that follows a prompt; with `stream`, its pieces as they come, each of whole characters.

        Ends at an EOS of the checkpoint, before the first of the `stop` strings, or after `max_new_tokens` (None: 100,
        or what the context has left).
        """
        tokens = self.tokenizer.encode(prompt)
        limit = self._limit(max_new_tokens, 100, tokens)
        pieces = self._pieces(tokens, self.options(limit, temperature, top_k, top_p, seed), stop)
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
        limit = self._limit(max_new_tokens, 512, tokens)
        pieces = self._pieces(tokens, self.options(limit, temperature, top_k, top_p, seed), stop)
        return pieces if stream else "".join(pieces)

    def _limit(self, asked: int | None, usual: int, tokens: Sequence[int]) -> int:
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

    def _pieces(self, tokens: Sequence[int], options: SamplingOptions, stop: Sequence[str]) -> Iterator[str]:
        # Both check what they are given here and now, not when the first piece is asked for.
        decoder = StreamDecoder(self.tokenizer, stop)
        steps = generate(self.model, [tokens], options, self.tokenizer.eos_ids, self._vocabulary)
        return self._stream(decoder, steps)

    def _stream(self, decoder: StreamDecoder, steps: Iterator[list[int | None]]) -> Iterator[str]:
        eos = set(self.tokenizer.eos_ids)
        for (token,) in steps:
            if token is not None and token not in eos and (piece := decoder.add(token)):
                yield piece
            if decoder.stopped:
                return
        if rest := decoder.finish():
            yield rest
