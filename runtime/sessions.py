"""What a model keeps of its last decoding, that the next one finds its cache, buffers and captured steps in place."""

import dataclasses
import threading
from collections.abc import Sequence, Set
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .decoding import Decoding, bucket
from .errors import TritiumError
from .plan import Plan

if TYPE_CHECKING:
    from .decoder import Decoder
    from .generation import SamplingOptions


class Sessions:
    """The last `Decoding` of a model, for whoever comes next with the same options."""

    def __init__(self) -> None:
        self._kept: Decoding | None = None
        self.epoch = 0  # how often the model's weights were moved
        self._lock = threading.Lock()

    def take(
        self,
        model: "Decoder",
        plan: Plan,
        rows: int,
        capacity: int,
        options: "SamplingOptions",
        stops: Sequence[int],
        vocabulary: int | None,
        scored: bool = False,
    ) -> Decoding:
        """The one that was given back, where it fits, or a new one. Nobody else has it until it is given back.

        Raises TritiumError where the cache of a new one does not fit.
        """
        key = (model.backend, model.device, model.dtype, bucket(rows), options.choice, tuple(stops), vocabulary, scored)
        with self._lock:
            kept, self._kept = self._kept, None
        found = None
        if kept is not None and kept.key == key and kept.rows >= rows and kept.capacity >= capacity:
            owned = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
            with kept.working():
                kept.cache.clear()
                found = kept if renewed(kept.plan, plan, owned) else None
        del kept  # its memory, before more is asked for
        found = found or Decoding(model, plan, rows, capacity, options, stops, vocabulary, None, scored)
        found.key, found.epoch = key, self.epoch
        return found

    def check(self, decoding: Decoding) -> None:
        """Raises TritiumError where the model was moved since the decoding was taken: it goes by weights that are no
        more.
        """
        if decoding.epoch != self.epoch:
            raise TritiumError("the model was moved, or cast, while it generated: begin again")

    def give_back(self, decoding: Decoding) -> None:
        with self._lock:
            if decoding.epoch == self.epoch:
                self._kept = decoding

    def clear(self) -> None:
        """Frees what is kept, and has nothing kept of what is lent."""
        with self._lock:
            self._kept = None
            self.epoch += 1

    def __deepcopy__(self, memo: Any) -> "Sessions":
        return Sessions()

    def __reduce__(self) -> tuple[Any, ...]:
        return Sessions, ()


def renewed(old: Any, new: Any, owned: Set[int]) -> bool:
    """Makes an old plan say what a new one of the same model does, in place, where captured steps read it.

    What is no parameter but made of some, such as the norms of q and k as one tensor or an adapter with its scale, is
    copied; parameters, which lie in the storages `owned`, must be the same ones. False where more differs than such
    values: then the old plan is of no use.
    """
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor):
            return False
        if old.data_ptr() == new.data_ptr():
            return old.shape == new.shape and old.dtype == new.dtype and old.stride() == new.stride()
        if new.untyped_storage().data_ptr() in owned or old.shape != new.shape or old.dtype != new.dtype:
            return False
        old.copy_(new)
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(renewed(a, b, owned) for a, b in zip(old, new, strict=True))
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        names = [entry.name for entry in dataclasses.fields(old)]
        return all(renewed(getattr(old, name), getattr(new, name), owned) for name in names)
    return bool(old is new or old == new)
