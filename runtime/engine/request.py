"""A request as its owner sees it, and as the engine does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..generation import SamplingOptions

Reason = Literal["stop", "length", "cancelled", "error"]
Callback = Callable[["Request", int], object]


@dataclass(eq=False)
class Request:
    """A prompt, and what came of it. `tokens` are those handed out so far, with the EOS that ended them; `reason` says
    why there are no more, and is None while there are.
    """

    prompt: Sequence[int]
    options: SamplingOptions
    eos_ids: Sequence[int]
    callback: Callback | None = None  # called with every token, before `Engine.run` gives it
    tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    error: Exception | None = None  # with the reason "error": what the callback raised, or what was wrong
    reused: int = 0  # tokens of the prompt that were found in the cache
    _cancel: Callable[["Request"], None] | None = field(default=None, repr=False)

    def cancel(self) -> None:
        """Ends it here: its pages are free at once, and no token comes any more. Of no effect on one that has ended."""
        if self._cancel is not None:
            self._cancel(self)


@dataclass(eq=False)
class Job:
    """What the engine knows of a request: more tokens than have been handed out, and where they lie."""

    request: Request
    number: int  # in order of arrival
    seed: int
    keys: list[bytes]  # of the prompt's full pages; none where pages are not reused
    tokens: list[int] = field(default_factory=list)  # new ones
    filled: int = 0  # tokens of the prompt that are in the cache, until it is through
    remembered: int = 0  # pages that the allocator knows by their keys
    pages: list[int] = field(default_factory=list)
    row: int | None = None  # of the cache; None while it waits
    saved: Tensor | None = None  # what its pages held when it was put off

    @property
    def prompt(self) -> Sequence[int]:
        return self.request.prompt

    @property
    def prefilling(self) -> bool:
        """Whether its first token is still to come."""
        return not self.tokens

    @property
    def held(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1 if self.tokens else self.filled

    @property
    def left(self) -> int:
        """New tokens that it may still have."""
        return self.request.options.max_new_tokens - len(self.tokens)

    @property
    def choice(self) -> tuple[float, int, float]:
        return self.request.options.choice
