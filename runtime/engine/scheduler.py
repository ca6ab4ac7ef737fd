"""Who is in the cache, whose prompt goes on, and who must wait: first come, first served.

A request is seated when there is a row for it and room for its whole prompt. When those that decode need more pages
than are left, the youngest is put off: what its pages hold goes to the host's memory and comes back as it was, because
keys that decode steps wrote have other bits than a prefill of the same tokens would write. A prompt that was not
through yet just begins anew.
"""

from bisect import insort
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .pages import Pages
from .request import Job


class Store(Protocol):
    """What the pages are of: KVCache."""

    def give_pages(self, row: int, pages: Sequence[int]) -> None: ...
    def copy_out(self, pages: Sequence[int]) -> Tensor: ...
    def copy_in(self, pages: Sequence[int], copy: Tensor) -> None: ...


class Scheduler:
    """The jobs that wait and those that are seated, both in order of arrival."""

    def __init__(self, pages: Pages, store: Store, page_size: int, rows: int, at_once: int) -> None:
        self.pages = pages
        self.waiting: list[Job] = []
        self.seated: list[Job] = []
        self._store, self._page_size, self._at_once = store, page_size, at_once
        self._rows = list(range(rows - 1, -1, -1))

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def add(self, job: Job) -> None:
        insort(self.waiting, job, key=lambda each: each.number)

    def remove(self, job: Job) -> None:
        """Takes a job out, wherever it is, and frees what it had."""
        if job in self.waiting:
            self.waiting.remove(job)
        self._unseat(job)
        job.saved = None

    def _unseat(self, job: Job) -> None:
        if job.row is None:
            return
        self.seated.remove(job)
        self._rows.append(job.row)
        self.pages.release(job.pages)
        job.row, job.pages, job.remembered = None, [], 0

    def admit(self) -> None:
        """Seats those that wait, as long as there is room for the next."""
        while self.waiting and self._rows and self._seat(self.waiting[0]):
            insort(self.seated, self.waiting.pop(0), key=lambda each: each.number)

    def _seat(self, job: Job) -> bool:
        # One token more than it holds, or it would be put off at once; and some pages for those that grow beside it.
        tokens = max(job.held, len(job.prompt)) + (job.left > 1 or job.saved is not None)
        reserve = -(-len(self.seated) // 8)
        found = self.pages.match(job.keys[: (len(job.prompt) - 1) // self._page_size]) if job.saved is None else []
        needed = self.pages_of(tokens) - len(found)
        if needed + reserve > self.pages.available:
            self.pages.release(found)
            return False
        pages, row = found + self.pages.take(needed), self._rows[-1]
        try:
            self._store.give_pages(row, pages)
            if job.saved is not None:
                self._store.copy_in(pages[: job.saved.shape[3]], job.saved)
        except BaseException:
            self.pages.release(pages)
            raise
        if job.saved is None:
            job.filled, job.remembered = len(found) * self._page_size, len(found)
            job.request.reused = job.filled
        job.saved, job.pages, job.row = None, pages, self._rows.pop()
        return True

    def pieces(self) -> list[tuple[Job, int]]:
        """Whose prompts go on, by how many tokens each."""
        budget, found = self._at_once, []
        for job in self.seated:
            if job.prefilling and budget:
                found.append((job, min(budget, len(job.prompt) - job.held)))
                budget -= found[-1][1]
        return found

    def note(self, job: Job, tokens: int) -> None:
        """So many tokens more of a job's prompt are in the cache; with the last its first token is due."""
        filled = job.filled + tokens
        full = min(filled // self._page_size, len(job.keys))
        for index in range(job.remembered, full):
            self.pages.remember(job.pages[index], job.keys[index])
        job.remembered = max(job.remembered, full)
        if filled < len(job.prompt):
            job.filled = filled

    def grow(self, steps: int) -> list[Job]:
        """Those that decode, with pages for so many steps, or as many as each has left; the youngest are put off where
        that takes more than there is.
        """
        grown: list[Job] = []
        for job in list(self.seated):
            if job.row is None or job.prefilling:
                continue
            needed = self.pages_of(job.held + min(steps, job.left)) - len(job.pages)
            while needed > self.pages.available and job.row is not None:
                self._put_off(self.seated[-1])
            if job.row is None:
                continue
            if needed > 0:
                job.pages = job.pages + self.pages.take(needed)
                self._store.give_pages(job.row, job.pages)
            grown.append(job)
        return grown

    def _put_off(self, job: Job) -> None:
        if not job.prefilling:
            job.saved = self._store.copy_out(job.pages[: self.pages_of(job.held)])
        self._unseat(job)
        self.add(job)
