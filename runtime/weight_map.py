"""Weight maps: which checkpoint tensors make up each parameter, as data that is run forwards and backwards.

The `weights` table of a family.yaml names every parameter with the rule that fills it. Rules nest:

    NAME                                 the tensor itself
    {cat: [RULE, ...], rows: [N, ...]}   tensors one above the other, N rows each (a ModelSpec attribute)
    {permute_rope: RULE, heads: N}       rows of N heads that pair neighbours for the rotation, to pair halves

Loading walks a rule down to the tensors it reads and writes each into its rows of the parameter; saving walks the same
rule and reads them back, so a map has no second, inverse form that could disagree.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .errors import TritiumError
from .registry import Family
from .spec import ModelSpec

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor and the rows of a parameter that it fills."""

    source: str
    parameter: str
    start: int
    shape: tuple[int, ...]  # of the checkpoint's tensor
    load: tuple[Transform, ...]  # in order, checkpoint -> parameter
    save: tuple[Transform, ...]  # in order, parameter -> checkpoint

    def fill(self, parameter: Tensor, tensor: Tensor) -> None:
        """Writes the tensor into its rows, in the parameter's dtype and on its device."""
        for transform in self.load:
            tensor = transform(tensor)
        parameter[self.start : self.start + self.shape[0]].copy_(tensor)

    def read(self, parameter: Tensor) -> Tensor:
        """The checkpoint tensor back from the parameter."""
        tensor = parameter[self.start : self.start + self.shape[0]]
        for transform in self.save:
            tensor = transform(tensor)
        return tensor.contiguous()


def to_half_split(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring pairs (0,1), (2,3), ... to halves (0, D/2), (1, D/2 + 1), ..."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _pieces(
    rule: Any, parameter: str, layer: str, start: int, shape: tuple[int, ...], spec: ModelSpec, where: str
) -> Iterator[Piece]:
    if isinstance(rule, str):
        yield Piece(rule.replace("{layer}", layer), parameter, start, shape, (), ())
    elif isinstance(rule, Mapping) and set(rule) == {"cat", "rows"}:
        rows = [int(getattr(spec, name)) for name in rule["rows"]]
        if sum(rows) != shape[0] or len(rows) != len(rule["cat"]):
            raise TritiumError(f"{where}: {parameter} has {shape[0]} rows, its map {rows}")
        for part, count in zip(rule["cat"], rows, strict=True):
            yield from _pieces(part, parameter, layer, start, (count, *shape[1:]), spec, where)
            start += count
    elif isinstance(rule, Mapping) and set(rule) == {"permute_rope", "heads"}:
        heads = int(spec[rule["heads"]])
        for piece in _pieces(rule["permute_rope"], parameter, layer, start, shape, spec, where):
            yield Piece(
                piece.source,
                parameter,
                piece.start,
                piece.shape,
                (*piece.load, lambda tensor: to_half_split(tensor, heads)),
                (lambda tensor: to_interleaved(tensor, heads), *piece.save),
            )
    else:
        raise TritiumError(f"{where}: {parameter} has the unknown weight rule {rule!r}")


class WeightMap:
    """A family's map applied to one model: its pieces by checkpoint tensor."""

    def __init__(self, family: Family, spec: ModelSpec, parameters: Iterable[tuple[str, Tensor]]) -> None:
        where = str(family.folder / "family.yaml")
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        self.ignore = family.ignore
        self.pieces: dict[str, Piece] = {}
        self.redundant: set[str] = set()  # sources of parameters that this model shares with others
        mapped = set()
        for pattern, rule in family.weights.items():
            layers = [str(layer) for layer in range(spec.num_layers)] if "{layer}" in pattern else [""]
            for layer in layers:
                name = pattern.replace("{layer}", layer)
                if name not in shapes:
                    if isinstance(rule, str):
                        self.redundant.add(rule.replace("{layer}", layer))
                    continue
                mapped.add(name)
                for piece in _pieces(rule, name, layer, 0, shapes[name], spec, where):
                    self.pieces[piece.source] = piece
        if unmapped := sorted(set(shapes) - mapped):
            raise TritiumError(f"{where}: weights does not map {_listed(unmapped)}")

    def check(self, found: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises one TritiumError that lists all that is missing, unknown or misshapen in a checkpoint."""
        missing = [name for name in self.pieces if name not in found]
        unknown = [name for name in found if name not in self.pieces and not self.ignores(name)]
        misshapen = [
            f"{name} is {list(found[name])}, expected {list(piece.shape)}"
            for name, piece in self.pieces.items()
            if name in found and tuple(found[name]) != piece.shape
        ]
        problems = [
            f"{what} {len(names)}: {_listed(names)}"
            for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
            if names
        ]
        if problems:
            raise TritiumError(f"{where}: tensors do not fit the model: {'; '.join(problems)}")

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor without the model using it."""
        return name in self.redundant or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
