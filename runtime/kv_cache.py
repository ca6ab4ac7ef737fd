"""The paged key/value cache: pages of 256 tokens from one pool, a page table and a length for every row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import TritiumError, out_of_memory_named
from .spec import ModelSpec

PAGE_SIZE = 256  # tokens; also the split of decode attention, a multiple of every key/value tile


class KVCache:
    """Keys and values of up to `rows` sequences of at most `capacity` tokens each.

    Each layer's keys and values are [num_kv_heads, pages, PAGE_SIZE, head_dim]: one page of one head is contiguous, and
    a row whose pages follow one another is a plain strided view. Every row owns the pages that its capacity takes; with
    `pages` the pool has so many instead, and `give_pages` says whose they are, of which page 0 is nobody's.
    """

    def __init__(
        self,
        spec: ModelSpec,
        rows: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        pages: int | None = None,
    ) -> None:
        if capacity > spec.context_length:
            raise TritiumError(f"a cache of {capacity} tokens exceeds the context length of {spec.context_length}")
        self.device = torch.device(device)
        self.capacity = capacity
        self.lengths = [0] * rows
        self.prompts = [0] * rows  # tokens of each row's prompt, known when its first tokens come
        self._pages_per_row = -(-capacity // PAGE_SIZE)
        num_pages = rows * self._pages_per_row if pages is None else pages
        # Zeroed: masked keys still meet a probability of 0 in the product, and 0 * NaN would be NaN.
        shape = (spec.num_cache_slots, 2, spec.num_kv_heads, num_pages, PAGE_SIZE, spec.head_dim)
        needed = math.prod(shape) * dtype.itemsize
        held = f"{rows} x {capacity}" if pages is None else f"{pages * PAGE_SIZE}"
        with out_of_memory_named(f"keys and values of {held} tokens", needed, device):
            self._pool = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [layer[0] for layer in self._pool]
        self.values = [layer[1] for layer in self._pool]
        # Every layer's view token by token, made once: making one costs as much as a small operation.
        self.slot_keys = [layer.flatten(1, 2).transpose(0, 1) for layer in self.keys]
        self.slot_values = [layer.flatten(1, 2).transpose(0, 1) for layer in self.values]
        table = torch.arange(rows * self._pages_per_row).view(rows, self._pages_per_row)
        self.assign_pages(table if pages is None else torch.zeros_like(table))

    def assign_pages(self, page_table: Tensor) -> None:
        """Sets which pages each row owns: int64 [rows, pages per row], every page named at most once."""
        self.page_table = page_table.to(self.device, torch.int32)
        self._host_table: list[list[int]] = page_table.tolist()
        rows, per_row = page_table.shape
        in_order = torch.arange(rows * per_row).view(rows, per_row)
        self._in_order = torch.equal(page_table.cpu(), in_order)

    def give_pages(self, row: int, pages: Sequence[int]) -> None:
        """Sets which pages a row has of a pool that its owner shares out; page 0 stands where it has none."""
        self._in_order = False
        self._host_table[row] = [*pages, *[0] * (self._pages_per_row - len(pages))]
        self.page_table[row] = torch.tensor(self._host_table[row], dtype=torch.int32)

    def copy_out(self, pages: Sequence[int]) -> Tensor:
        """What those pages hold, in the host's memory: [slots, 2, num_kv_heads, len(pages), PAGE_SIZE, head_dim]."""
        shape = self._pool.shape
        copy = torch.empty((*shape[:3], len(pages), *shape[4:]), dtype=self._pool.dtype)
        for place, page in enumerate(pages):  # one by one: there may be no room on the device for more
            copy[:, :, :, place] = self._pool[:, :, :, page]
        return copy

    def copy_in(self, pages: Sequence[int], copy: Tensor) -> None:
        """Puts what `copy_out` gave into those pages."""
        for place, page in enumerate(pages):
            self._pool[:, :, :, page] = copy[:, :, :, place].to(self.device)

    def dense(self, rows: Sequence[int], length: int) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """Every layer's (keys, values) as views [num_kv_heads * rows, length, head_dim], without a copy.

        None where the pages of a row do not follow one another, or `rows` are not all rows in order.
        """
        if not self._in_order or list(rows) != list(range(len(self.lengths))):
            return None
        slots, two, heads, pages, size, head_dim = self._pool.shape
        rows_pool = self._pool.view(slots, two, heads * len(rows), pages // len(rows) * size, head_dim)
        keys, values = rows_pool.narrow(3, 0, length).unbind(1)
        return keys.unbind(0), values.unbind(0)

    def slots(self, rows: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Where the next `counts` tokens of each row go: int64 [T] into the flat pool.

        Raises TritiumError when a row would outgrow the cache; nothing is written then.
        """
        self.check_room(rows, counts)
        slots = []
        for row, count in zip(rows, counts, strict=True):
            before = self.lengths[row]
            pages = self._host_table[row]
            slots += [pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(before, before + count)]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def check_room(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Raises TritiumError when a row would outgrow the cache with `counts` more tokens."""
        for row, count in zip(rows, counts, strict=True):
            before = self.lengths[row]
            if before + count > self.capacity:
                raise TritiumError(f"row {row}: {before} + {count} tokens do not fit the cache's {self.capacity}")

    def begin(self, rows: Sequence[int], prompts: Sequence[int]) -> None:
        """Notes how long the prompts are of those rows that hold nothing yet."""
        for row, prompt in zip(rows, prompts, strict=True):
            if not self.lengths[row]:
                self.prompts[row] = prompt

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Counts tokens just written as held."""
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count

    def clear(self) -> None:
        """Forgets every sequence and zeroes the pool."""
        self.lengths = [0] * len(self.lengths)
        self._pool.zero_()
