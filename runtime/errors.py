"""The error a person can act on, and the command line that says it."""

import argparse
import difflib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class TritiumError(ValueError):
    """A mistake in what was asked for or given. Its message is one line: what is wrong, where, and what would be right.

    The command line prints the message and exits with code 2.
    """


def is_first_process() -> bool:
    """Whether this process is the one that speaks: of those that torchrun starts, the first."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


PATIENCE = 10.0  # seconds


def complain(message: str) -> None:
    """Says on standard error why this process ends. Where torchrun started several, the mistake is mostly everyone's
    and the first says it: torchrun then ends the others, which wait for that. Whoever it does not end was alone in it.
    """
    if not is_first_process():
        time.sleep(PATIENCE)
    print(message, file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: error: {message} (see {self.prog} --help)")
        self.exit(2)


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
