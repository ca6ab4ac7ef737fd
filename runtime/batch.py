"""Ragged batches: how the tokens of several sequences lie packed one after another, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.qk_norm_rope import rope_rows
from .errors import TritiumError
from .kv_cache import PAGE_SIZE, KVCache
from .rope import RotaryEmbedding


class Angles(NamedTuple):
    """What a batch's tokens are rotated by, as the kernels take it."""

    table: Tensor  # float32 [rows of it, 2, D / 2]
    rows: Tensor  # [T] int64, each token's row of the table
    query_scale: Tensor | None  # float32 [rows of the table], the factor on the query


class Rope(NamedTuple):
    """The same gathered for every token: full-width cos and sin [T, 1, D], and the factor [T]."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None


@dataclass
class Batch:
    """One forward's tokens: rows (sequences) r hold tokens starts[r]:starts[r + 1] of the packed [T, ...] tensors."""

    starts: Sequence[int]  # [rows + 1]
    lengths: Sequence[int]  # [rows], keys of each row once this forward's are in, its own new ones included
    positions: Tensor  # [T] int64
    cache: KVCache | None = None
    rows: Sequence[int] = ()  # the cache's rows that this batch's rows are, where there is a cache
    slots: Tensor | None = None  # [T] int64, where each token's key and value go in the cache
    is_fresh: bool = True  # no row has earlier keys
    is_decode: bool = False  # every row brings exactly one token, and has its prompt behind it
    prompts: Sequence[int] = ()  # [rows], tokens of each row's prompt: what some scaling rules go by
    _angles: dict[RotaryEmbedding, Angles] = field(default_factory=dict)
    _rope: dict[tuple[RotaryEmbedding, torch.dtype], Rope] = field(default_factory=dict)
    _bias: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def fresh(cls, counts: Sequence[int], device: torch.device) -> "Batch":
        """Whole sequences of `counts` tokens, no cache."""
        positions = [torch.arange(count, device=device) for count in counts]
        return cls(
            starts=[0, *accumulate(counts)],
            lengths=list(counts),
            positions=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64, device=device),
            prompts=list(counts),
        )

    @classmethod
    def traced(cls, starts: Tensor, positions: Tensor, longest: int) -> "Batch":
        """Whole sequences whose bounds only the device knows: `starts` [rows + 1] int32, none above `longest` tokens.

        What torch.compile traces holds for other lengths too; tokens behind the last row are padding.
        """
        batch = cls(starts=(), lengths=[longest], positions=positions)
        batch.device_starts = starts
        return batch

    @classmethod
    def appended(
        cls, cache: KVCache, rows: Sequence[int], counts: Sequence[int], prompts: Sequence[int] | None = None
    ) -> "Batch":
        """`counts` new tokens, at least one, for each of the cache's `rows`, behind what it holds of them already.

        A row's first tokens are its prompt. Where they are only the beginning of it (a prefill in pieces), `prompts`
        says how long each row's whole prompt is. Raises TritiumError where that does not fit the cache.
        """
        if not counts or min(counts) < 1:
            raise TritiumError(f"counts: every row must bring at least one token, got {list(counts)}")
        slots = cache.slots(rows, counts)
        cache.begin(rows, counts if prompts is None else prompts)
        before = [cache.lengths[row] for row in rows]
        # The last piece of a prompt is a prefill, be it one token: its bits are those of the whole prompt's.
        prompted = [held >= cache.prompts[row] for row, held in zip(rows, before, strict=True)]
        positions = [at for start, count in zip(before, counts, strict=True) for at in range(start, start + count)]
        return cls(
            starts=[0, *accumulate(counts)],
            lengths=[b + c for b, c in zip(before, counts, strict=True)],
            positions=torch.tensor(positions, dtype=torch.int64, device=cache.device),
            cache=cache,
            rows=list(rows),
            slots=slots,
            is_fresh=not any(before),
            is_decode=all(prompted) and max(counts) == 1,
            prompts=[cache.prompts[row] for row in rows],
        )

    def step(self) -> "Batch":
        """This decode batch one token further, after a forward: in place, and without a copy from the host.

        Raises TritiumError where a row would outgrow the cache.
        """
        assert self.is_decode
        assert self.cache is not None
        assert self.slots is not None
        self.cache.check_room(self.rows, [1] * len(self.rows))
        for rotary in self._angles:
            _check_positions(rotary, self.longest + 1)
        self.lengths = [length + 1 for length in self.lengths]
        self.is_fresh = False
        self.positions += 1
        for angles in self._angles.values():
            if angles.rows is not self.positions:
                angles.rows.add_(1)
        page = self.page_table.gather(1, (self.positions // PAGE_SIZE).unsqueeze(1)).squeeze(1)
        self.slots.copy_(page.to(torch.int64) * PAGE_SIZE + self.positions % PAGE_SIZE)
        if "device_lengths" in self.__dict__:
            self.device_lengths += 1
        self.__dict__.pop("dense", None)
        self._rope.clear()
        self._bias.clear()
        return self

    @cached_property
    def device_starts(self) -> Tensor:
        """`starts` where the kernels read it: int32 [rows + 1]."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.positions.device)

    @cached_property
    def device_lengths(self) -> Tensor:
        """`lengths` where the kernels read it: int32 [rows]."""
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.positions.device)

    @cached_property
    def page_table(self) -> Tensor:
        """The pages of this batch's rows: int32 [rows, pages a row]."""
        assert self.cache is not None
        return self.cache.page_table[list(self.rows)]

    @cached_property
    def dense(self) -> tuple[Sequence[Tensor], Sequence[Tensor]] | None:
        """For a decode step, every layer's keys and values as dense views, where the cache has them."""
        return self.cache.dense(self.rows, self.longest) if self.is_decode and self.cache is not None else None

    @property
    def longest(self) -> int:
        """Most keys of any row."""
        return max(self.lengths) if self.lengths else 0

    def angles(self, rotary: RotaryEmbedding) -> Angles:
        """The table of angles and each token's row in it, put together once a batch.

        Raises TritiumError where a row reaches beyond the table.
        """
        if rotary not in self._angles:
            _check_positions(rotary, self.longest)
            if rotary.by_prompt and not self.prompts and self.lengths:
                raise TritiumError("rope_scaling: a rule that goes by the prompt's length cannot be compiled")
            device = self.positions.device
            stretches = [rotary.stretch(prompt) for prompt in self.prompts]
            distinct = tuple(sorted(set(stretches))) or (1.0,)
            rows = self.positions
            if len(distinct) > 1:
                first = [distinct.index(stretch) * rotary.context_length for stretch in stretches]
                counts = [end - start for start, end in pairwise(self.starts)]
                offsets = [offset for offset, count in zip(first, counts, strict=True) for _ in range(count)]
                rows = rows + torch.tensor(offsets, dtype=torch.int64, device=device)
            table = rotary.table(device, distinct)
            self._angles[rotary] = Angles(table, rows, rotary.query_scale(device, len(distinct)))
        return self._angles[rotary]

    def rope(self, rotary: RotaryEmbedding, dtype: torch.dtype) -> Rope:
        """What each token is rotated by in `dtype`, gathered once a forward."""
        if (rotary, dtype) not in self._rope:
            table, rows, scale = self.angles(rotary)
            cos, sin = table[rows].to(dtype).unbind(1)
            self._rope[rotary, dtype] = Rope(*rope_rows(cos, sin), None if scale is None else scale[rows])
        return self._rope[rotary, dtype]

    def decode_bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows or 1, 1, L or 1]: 0 where a row's only query sees a key of the dense view, -inf where not."""
        if window not in self._bias:
            longest = self.longest
            if window is None and min(self.lengths) == longest:
                self._bias[window] = torch.zeros(1, 1, 1, dtype=dtype, device=self.positions.device)
            else:
                key = torch.arange(longest, device=self.positions.device)
                query = self.positions.unsqueeze(1)
                seen = key <= query if window is None else (key <= query) & (key > query - window)
                bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
                self._bias[window] = bias.unsqueeze(1)
        return self._bias[window]


def _check_positions(rotary: RotaryEmbedding, longest: int) -> None:
    """Raises TritiumError where a row reaches beyond the table of angles."""
    if longest > rotary.context_length:
        raise TritiumError(f"{longest} positions exceed the context length of {rotary.context_length}")


def _check_mask(attention_mask: Tensor, rows: int, length: int) -> None:
    """Raises TritiumError for a mask of another shape."""
    if tuple(attention_mask.shape) != (rows, length):
        raise TritiumError(
            f"attention_mask: must be [batch, length] = [{rows}, {length}], got {list(attention_mask.shape)}"
        )


@dataclass
class Padding:
    """How a padded [B, S] input and its packed [T] form map onto each other."""

    shape: tuple[int, int]
    index: Tensor | None  # [T] flat places of the real tokens; None when nothing is padded
    counts: Sequence[int]  # real tokens a row
    total: Tensor | None = None  # how many of the packed ones are real, where only the device knows

    @classmethod
    def of(cls, like: Tensor, attention_mask: Tensor | None) -> "Padding":
        """From an input [B, S, ...] and a mask [B, S] (true or 1 at real tokens; left, right or any padding)."""
        batch, length = like.shape[:2]
        if attention_mask is None:
            return cls((batch, length), None, [length] * batch)
        _check_mask(attention_mask, batch, length)
        mask = attention_mask.to(like.device) != 0
        if bool(mask.all()):
            return cls((batch, length), None, [length] * batch)
        return cls((batch, length), mask.flatten().nonzero().squeeze(1), mask.sum(1).tolist())

    @classmethod
    def traced(cls, like: Tensor, attention_mask: Tensor | None) -> tuple["Padding", Batch]:
        """The same without a look at the mask's values: the packed form has room for all, padding behind the rest."""
        rows, length = like.shape[:2]
        each = torch.arange(length, device=like.device)
        if attention_mask is None:
            starts = torch.arange(rows + 1, dtype=torch.int32, device=like.device) * length
            return cls((rows, length), None, ()), Batch.traced(starts, each.repeat(rows), length)
        _check_mask(attention_mask, rows, length)
        mask = attention_mask != 0
        index = torch.argsort(~mask.flatten(), stable=True)
        positions = (mask.cumsum(1) - 1).clamp(min=0).flatten()[index]
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls((rows, length), index, (), starts[-1]), Batch.traced(starts, positions, length)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], zeros at the padding."""
        if self.index is None:
            return packed.unflatten(0, self.shape)
        if self.total is not None:
            behind = torch.arange(packed.shape[0], device=packed.device) >= self.total
            packed = packed.masked_fill(behind.view(-1, *[1] * (packed.dim() - 1)), 0.0)
        flat = packed.new_zeros((self.shape[0] * self.shape[1], *packed.shape[1:]))
        return flat.index_copy(0, self.index, packed).unflatten(0, self.shape)
