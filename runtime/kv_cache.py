"""The paged key/value cache: pages of 256 tokens from one pool, a page table and a length for every row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import TritiumError
from .spec import ModelSpec

PAGE_SIZE = 256  # tokens; also the split of decode attention, a multiple of every key/value tile


class KVCache:
    """Keys and values of up to `rows` sequences of at most `capacity` tokens each.

    Each layer's keys and values are [num_kv_heads, pages, PAGE_SIZE, head_dim]: one page of one head is contiguous, and
    a row whose pages follow one another is a plain strided view.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        if capacity > spec.context_length:
            raise TritiumError(f"a cache of {capacity} tokens exceeds the context length of {spec.context_length}")
        self.device = torch.device(device)
        self.capacity = capacity
        self.lengths = [0] * rows
        self._pages_per_row = -(-capacity // PAGE_SIZE)
        num_pages = rows * self._pages_per_row
        # Zeroed: masked keys still meet a probability of 0 in the product, and 0 * NaN would be NaN.
        shape = (spec.num_cache_slots, 2, spec.num_kv_heads, num_pages, PAGE_SIZE, spec.head_dim)
        pool = torch.zeros(shape, dtype=dtype, device=device)
        self.keys = [layer[0] for layer in pool]
        self.values = [layer[1] for layer in pool]
        self.assign_pages(torch.arange(num_pages).view(rows, self._pages_per_row))

    def assign_pages(self, page_table: Tensor) -> None:
        """Sets which pages each row owns: int64 [rows, pages per row], every page named at most once."""
        self.page_table = page_table.to(self.device)
        rows, per_row = page_table.shape
        self._dense = bool((page_table.flatten() == torch.arange(rows * per_row)).all())
        # The views of every layer are made once: making one costs as much as a small operation.
        self.slot_keys = [layer.flatten(1, 2).transpose(0, 1) for layer in self.keys]
        self.slot_values = [layer.flatten(1, 2).transpose(0, 1) for layer in self.values]
        if self._dense:
            shape = (-1, per_row * PAGE_SIZE, self.keys[0].shape[-1])
            self._dense_keys = [layer.view(shape) for layer in self.keys]
            self._dense_values = [layer.view(shape) for layer in self.values]

    def dense(self, slot: int, rows: Sequence[int], length: int) -> tuple[Tensor, Tensor] | None:
        """Layer `slot`'s (keys, values) as [num_kv_heads * rows, length, head_dim] views, where the pages allow it."""
        if not self._dense or len(rows) != len(self.lengths):
            return None
        return self._dense_keys[slot].narrow(1, 0, length), self._dense_values[slot].narrow(1, 0, length)

    def slots(self, rows: Sequence[int], counts: Sequence[int], positions: Tensor) -> Tensor:
        """Where the next `counts` tokens of each row go: int64 [T] into the flat pool.

        Raises TritiumError when a row would outgrow the cache; nothing is written then.
        """
        for row, count in zip(rows, counts, strict=True):
            if self.lengths[row] + count > self.capacity:
                raise TritiumError(
                    f"row {row}: {self.lengths[row]} + {count} tokens do not fit the cache's {self.capacity}"
                )
        index = torch.tensor([row for row, count in zip(rows, counts, strict=True) for _ in range(count)])
        pages = self.page_table[index.to(self.device), positions // PAGE_SIZE]
        return pages * PAGE_SIZE + positions % PAGE_SIZE

    def advance(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Counts tokens just written as held."""
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count

    def clear(self) -> None:
        """Forgets every sequence and zeroes the pool."""
        self.lengths = [0] * len(self.lengths)
        for layer in (*self.keys, *self.values):
            layer.zero_()
