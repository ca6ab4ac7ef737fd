"""Pages and the order of service, without a model: schedules in which every sequence must find its own tokens."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritium.runtime.engine.pages import Count, Pages, page_keys
from tritium.runtime.engine.request import Job, Request
from tritium.runtime.engine.scheduler import Scheduler
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions

SIZE = 4


class Copy:
    """What stands for a tensor of saved pages."""

    def __init__(self, pages: list[list[int]]) -> None:
        self.pages = pages
        self.shape = (0, 0, 0, len(pages))


class Memory:
    """Pages that hold token ids, as a cache holds what was computed of them."""

    def __init__(self, pages: int) -> None:
        self.pages = [[-1] * SIZE for _ in range(pages + 1)]
        self.rows: dict[int, list[int]] = {}

    def give_pages(self, row: int, pages: Sequence[int]) -> None:
        self.rows[row] = list(pages)

    def copy_out(self, pages: Sequence[int]) -> Any:
        return Copy([list(self.pages[page]) for page in pages])

    def copy_in(self, pages: Sequence[int], copy: Any) -> None:
        for page, held in zip(pages, copy.pages, strict=True):
            self.pages[page] = list(held)

    def write(self, row: int, at: int, token: int) -> None:
        page = self.rows[row][at // SIZE]
        assert page != 0
        self.pages[page][at % SIZE] = token

    def read(self, row: int, count: int) -> list[int]:
        return [self.pages[self.rows[row][at // SIZE]][at % SIZE] for at in range(count)]


class World:
    """A scheduler, and what an engine would do by it: new tokens are a function of all that came before."""

    def __init__(self, total: int, rows: int, at_once: int) -> None:
        self.memory = Memory(total)
        self.scheduler = Scheduler(Pages(total, first=1), self.memory, SIZE, rows, at_once)
        self.jobs: list[Job] = []
        self.computed = 0  # tokens of prompts

    def submit(self, prompt: list[int], limit: int) -> Job:
        request = Request(prompt, SamplingOptions(limit), ())
        self.jobs.append(Job(request, len(self.jobs), 0, page_keys(prompt, SIZE, b"")))
        self.scheduler.add(self.jobs[-1])
        return self.jobs[-1]

    def follow(self, job: Job) -> None:
        """The next token, from what the memory says of the sequence: it must be what was written for it."""
        assert job.row is not None
        seen = self.memory.read(job.row, job.held if job.tokens else len(job.prompt))
        assert seen == [*job.prompt, *job.tokens][: len(seen)]
        job.tokens.append(sum(seen) % 7)
        if not job.left:
            self.scheduler.remove(job)

    def turn(self, steps: int) -> None:
        self.scheduler.admit()
        pieces = self.scheduler.pieces()
        for job, count in pieces:
            assert job.row is not None
            assert count > 0
            self.computed += count
            for at in range(job.filled, job.filled + count):
                self.memory.write(job.row, at, job.prompt[at])
        for job, count in pieces:
            through = job.filled + count == len(job.prompt)
            self.scheduler.note(job, count)
            if through:
                self.follow(job)
        for job in self.scheduler.grow(steps):
            for _ in range(min(steps, job.left)):
                assert job.row is not None
                self.memory.write(job.row, job.held, job.tokens[-1])
                seen = self.memory.read(job.row, job.held + 1)
                assert seen == [*job.prompt, *job.tokens]
                job.tokens.append(sum(seen) % 7)
            if not job.left:
                self.scheduler.remove(job)
        self.check()

    def check(self) -> None:
        count, seated = self.scheduler.pages.count(), self.scheduler.seated
        assert count.free + count.held == count.total
        assert {page for job in seated for page in job.pages} == set(self.scheduler.pages._holders)
        assert len({job.row for job in seated}) == len(seated)
        assert len(self.scheduler._rows) + len(seated) == self.rows
        assert [job.number for job in seated] == sorted(job.number for job in seated)
        waiting = [job.number for job in self.scheduler.waiting]
        assert waiting == sorted(waiting)

    @property
    def rows(self) -> int:
        return len(self.scheduler._rows) + len(self.scheduler.seated)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_random_schedules(seed: int) -> None:
    """Small memories, many beginnings in common, cancellations at any time: all end, each with its own tokens."""
    draw = random.Random(seed)
    total, rows = draw.randint(3, 12), draw.randint(1, 5)
    world = World(total, rows, draw.randint(1, 20))
    for _ in range(draw.randint(1, 12)):
        length = draw.randint(1, 2 * SIZE + 2)
        beginning = [draw.randint(1, 2)] * draw.randint(0, length)
        prompt = beginning + [draw.randint(1, 9) for _ in range(length - len(beginning))]
        world.submit(prompt, draw.randint(1, total * SIZE - len(prompt) + 1))
        for _ in range(draw.randint(0, 3)):
            world.turn(draw.randint(1, 5))
            assert world.rows == rows
        if draw.random() < 0.3:
            world.scheduler.remove(draw.choice(world.jobs))
            world.check()
    for _ in range(3000):
        if not (world.scheduler.waiting or world.scheduler.seated):
            break
        world.turn(draw.randint(1, 5))
    assert world.scheduler.waiting + world.scheduler.seated == []
    assert world.scheduler.pages.count() == (total, 0, total)


def test_pages_are_found_by_all_that_came_before() -> None:
    keys = page_keys([1, 2, 3, 4, 5, 6, 7], 2, b"")
    assert len(keys) == 3
    assert page_keys([1, 2, 3, 4, 9], 2, b"") == keys[:2]
    assert page_keys([9, 2, 3, 4], 2, b"")[1] != keys[1]  # the same page behind another
    assert page_keys([1, 2], 2, b"another") != keys[:1]
    assert page_keys([1], 2, b"") == []


def test_what_is_remembered_goes_when_room_is_needed() -> None:
    """The longest unused first, of one prompt its last page; what is held, never."""
    pages = Pages(4, first=1)
    first = pages.take(3)
    for page, key in zip(first, (b"a", b"b", b"c"), strict=True):
        pages.remember(page, key)
    pages.release(first[1:])
    assert pages.count() == Count(3, 1, 4)
    assert len(pages.take(2)) == 2  # the page that holds nothing, then c
    assert pages.match([b"a", b"b", b"c"]) == first[:2]
    assert pages.count() == Count(0, 4, 4)
    with pytest.raises(TritiumError, match="1 pages are wanted of 0 that are free"):
        pages.take(1)
    pages.release(first[:2])
    assert pages.count().held == 3  # a is held twice, by its first holder still
    pages.release(first[:1])
    pages.forget()
    assert pages.match([b"a"]) == []
    assert pages.count() == Count(2, 2, 4)


def test_a_page_is_known_once() -> None:
    """Of two that compute the same one is remembered, and the other is free again."""
    pages = Pages(2)
    first, second = pages.take(2)
    pages.remember(first, b"a")
    pages.remember(second, b"a")
    pages.release([first])
    pages.release([second])
    assert pages.match([b"a"]) == [first]
    assert pages.take(1) == [second]


def test_beginnings_in_common_are_computed_once() -> None:
    world = World(20, 4, 100)
    prompt = list(range(3 * SIZE + 1))
    world.submit(prompt, 2)
    world.turn(1)
    again = [world.submit(prompt, 2), world.submit(prompt[: 2 * SIZE], 2), world.submit([*prompt[:SIZE], 99], 2)]
    world.turn(1)
    assert [job.request.reused for job in again] == [3 * SIZE, SIZE, SIZE]
    assert world.computed == len(prompt) + 1 + SIZE + 1


def test_the_youngest_is_put_off_and_the_oldest_never() -> None:
    """Three that grow in a memory for one and a half: they end in the order in which they came."""
    world = World(6, 3, 100)
    jobs = [world.submit([number] * 3, 18) for number in range(3)]
    ended: list[Job] = []
    put_off: set[int] = set()
    while len(ended) < 3:
        world.turn(2)
        ended += [job for job in jobs if not job.left and job not in ended]
        put_off |= {job.number for job in world.scheduler.waiting if job.tokens}
    assert ended == jobs
    assert put_off == {1, 2}


def test_room_is_left_for_those_that_grow() -> None:
    """Would break: whoever takes the last page is put off again as soon as another needs one."""
    world = World(4, 2, 100)
    first, second = world.submit([1] * SIZE, 5), world.submit([2] * (SIZE + 1), 1)
    world.turn(1)
    assert (first.row is None, second.row is None) == (False, True)  # two pages are free, and one is for the first
    while first.left:
        world.turn(1)
    world.turn(1)
    assert not second.left


def test_a_long_prompt_waits_for_room_and_nobody_passes_it() -> None:
    world = World(4, 4, 100)
    first = world.submit([1] * (2 * SIZE), 4)
    world.turn(1)
    long, short = world.submit([2] * (3 * SIZE), 2), world.submit([3], 2)
    world.turn(1)
    assert [job.row is None for job in (first, long, short)] == [False, True, True]
    for _ in range(6):
        world.turn(1)
    assert not long.left
    assert not short.left
