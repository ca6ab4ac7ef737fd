"""The error a person can act on, and the command line that says it."""

import argparse
import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class TritiumError(ValueError):
    """A mistake in what was asked for or given. Its message is one line: what is wrong, where, and what would be right.

    The command line prints the message and exits with code 2.
    """


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


SHOWN = 40  # of the choices in one message


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: the choices, the likeliest first."""
    choices = list(choices)
    lowered = {choice.lower(): choice for choice in choices}
    likely = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(likely)}? " if likely else ""
    more = f" and {len(choices) - SHOWN} more" if len(choices) > SHOWN else ""
    return f"{hint}known: {', '.join(choices[:SHOWN])}{more}"


@contextmanager
def out_of_memory_named(what: str, nbytes: int, device: object) -> Iterator[None]:
    """Turns a failed allocation inside the block into a TritiumError that says what needed how much, and where."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and the CPU allocator's plain RuntimeError
        if "memory" not in str(error):
            raise
        raise TritiumError(f"out of memory: {what} need {nbytes / 2**30:.1f} GiB on {device}") from None
