"""Whose each page of the cache is: counted references, and prompts' pages remembered after their last holder has gone.

A page full of a prompt's tokens is known by a key, a hash of its tokens and of the key of the page before it: pages of
equal keys hold the same keys and values, to the bit. A page that nobody holds stays remembered until its room is
needed, the longest unused first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import TritiumError


class Count(NamedTuple):
    """How many pages are to be had (what is remembered included), how many are held, and how many there are."""

    free: int
    held: int
    total: int


def page_keys(prompt: Sequence[int], page_size: int, root: bytes) -> list[bytes]:
    """The keys of a prompt's full pages, in order. `root` is of what else the values depend on."""
    keys = []
    for start in range(0, len(prompt) - page_size + 1, page_size):
        root = hashlib.sha256(root + array("q", prompt[start : start + page_size]).tobytes()).digest()
        keys.append(root)
    return keys


class Pages:
    """The pages `first` to `first + total - 1`."""

    def __init__(self, total: int, first: int = 0) -> None:
        self.total = total
        self._free = list(range(first + total - 1, first - 1, -1))
        self._holders: dict[int, int] = {}
        self._by_key: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # remembered, held by nobody; the longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._unused)

    def count(self) -> Count:
        return Count(self.available, len(self._holders), self.total)

    def take(self, count: int) -> list[int]:
        """So many pages for one holder; what is remembered of them is forgotten. Raises TritiumError for more than are
        available.
        """
        if count > self.available:
            raise TritiumError(f"{count} pages are wanted of {self.available} that are free")
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._unused.popitem(last=False)
                del self._by_key[self._keys.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The remembered pages of the longest beginning of `keys`, held once more from now on."""
        found = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            self._unused.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
            found.append(page)
        return found

    def remember(self, page: int, key: bytes) -> None:
        """Says what a held page holds. Of two pages with one key the first is the one that is remembered."""
        if key not in self._by_key and page not in self._keys:
            self._by_key[key] = page
            self._keys[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Takes one holder off each. The last of a prompt's pages is the first to be forgotten."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._keys:
                self._unused[page] = None
            else:
                self._free.append(page)

    def forget(self) -> None:
        """Forgets what pages hold."""
        self._free += self._unused
        self._unused.clear()
        self._by_key.clear()
        self._keys.clear()
