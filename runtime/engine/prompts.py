"""`tritium generate --prompts FILE.jsonl`: a file of prompts through the engine, an answer a line."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import TritiumError, nearest
from ..files import read_text
from ..generation import SamplingOptions
from ..text import ANSWER, CONTINUATION, TextGenerator
from ..tokenizer import StreamDecoder
from .engine import Engine
from .request import Request

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
KEYS = ("prompt", "messages", *SAMPLING)


def read_prompts(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, what it holds) of every line that is not empty.

    Raises TritiumError, with the line's number, for what is no JSON object of the keys above with one prompt.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise TritiumError(f'{where}: not valid JSON; a line is such as {{"prompt": "..."}}') from None
        if not isinstance(value, dict):
            raise TritiumError(f'{where}: must be an object such as {{"prompt": "..."}}, got {type(value).__name__}')
        for key in value:
            if key not in KEYS:
                raise TritiumError(f"{where}: unknown key {key!r}; {nearest(key, KEYS)}")
        if ("prompt" in value) == ("messages" in value):
            raise TritiumError(f"{where}: must have either prompt or messages")
        if not isinstance(value.get("prompt", ""), str):
            raise TritiumError(f"{where}: prompt must be a text, got {value['prompt']!r}")
        messages = value.get("messages", [{}])
        if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
            raise TritiumError(f"{where}: messages must be a list of objects with role and content")
        found.append((where, value))
    if not found:
        raise TritiumError(f'{path}: holds no prompts; a line is such as {{"prompt": "..."}}')
    return found


@dataclass
class Answer:
    """A request, and its text as far as it came."""

    request: Request
    decoder: StreamDecoder
    text: str = ""

    def add(self, token: int) -> None:
        if token not in self.request.eos_ids:
            self.text += self.decoder.add(token)
        if self.decoder.stopped:
            self.request.cancel()

    def whole(self) -> str:
        """The text, once no more tokens come. Raises what the request ended with as an error."""
        if self.request.error is not None:
            raise self.request.error
        return self.text + self.decoder.finish()

    def as_dict(self, index: int) -> dict[str, Any]:
        """What is written of it. Raises what the request ended with as an error."""
        reason = "stop" if self.decoder.stopped else self.request.reason
        return {"index": index, "text": self.whole(), "reason": reason, "tokens": len(self.request.tokens)}


def submit(
    engine: Engine,
    generator: TextGenerator,
    lines: Sequence[tuple[str, Mapping[str, Any]]],
    usual: Mapping[str, Any],
    stop: Sequence[str] = (),
) -> list[Answer]:
    """The answer to come to each line of `read_prompts`, options that it leaves out as in `usual`, whose seed counts up
    by the line.

    Raises TritiumError, with the line's number, before anything runs.
    """
    answers = []
    for index, (where, line) in enumerate(lines):
        given = {name: line.get(name, usual.get(name)) for name in SAMPLING}
        if given["seed"] is not None and "seed" not in line:
            given["seed"] += index
        decoder = StreamDecoder(generator.tokenizer, stop)
        try:
            answers.append(Answer(engine.submit(*_question(generator, line, given)), decoder))
        except TritiumError as error:
            raise TritiumError(f"{where}: {error}") from None
    return answers


def _question(
    generator: TextGenerator, line: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[list[int], SamplingOptions]:
    """As `TextGenerator.generate` and `chat` have it."""
    talks = "messages" in line
    tokens = generator.tokenizer.encode_chat(line["messages"]) if talks else generator.tokenizer.encode(line["prompt"])
    limit = generator.limit(given["max_new_tokens"], ANSWER if talks else CONTINUATION, tokens)
    return tokens, generator.options(limit, *(given[name] for name in SAMPLING[1:]))


def write(engine: Engine, answers: Sequence[Answer], out: TextIO) -> str:
    """Runs them, and writes a line each, in order, as soon as it and those before it are there: what it took, in words.

    Raises what one of them ended with as an error, where its line would stand.
    """
    by_request = {each.request: each for each in answers}
    start, written = time.perf_counter(), 0

    def go_on() -> int:
        done = written
        while done < len(answers) and answers[done].request.reason is not None:
            print(json.dumps(answers[done].as_dict(done), ensure_ascii=False), file=out, flush=True)
            done += 1
        return done

    for request, token in engine.run():
        by_request[request].add(token)
        written = go_on()
    go_on()
    seconds = time.perf_counter() - start
    new = sum(len(each.request.tokens) for each in answers)
    return f"{len(answers)} prompts, {new} new tokens, {new / seconds:.1f} tokens/s"
