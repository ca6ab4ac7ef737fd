"""Weight maps: which checkpoint tensors make up each parameter, as data that is run forwards and backwards.

The `weights` table of a family.yaml names every parameter with the rule that fills it. Rules nest:

    NAME                                 the tensor itself
    {cat: [RULE, ...], rows: [N, ...]}   tensors one above the other, N rows each (a ModelSpec attribute)
    {permute_rope: RULE, heads: N}       rows of N heads that pair neighbours for the rotation, to pair halves
    {transpose: RULE}                    a matrix stored [in, out]
    {stack: RULE, over: N}               N tensors, one behind the other along a new first dimension; {expert} counts
    {one_of: [RULE, ...]}                the first whose tensors the checkpoint has; saving writes the first

Loading walks a rule down to the tensors it reads and writes each into its rows of the parameter; saving walks the same
rule and reads them back, so a map has no second, inverse form that could disagree.
"""

import fnmatch
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .errors import TritiumError, nearest
from .registry import Family
from .spec import ModelSpec

Transform = Callable[[Tensor], Tensor]
_LAYER = "stack.layers.{layer}."
PARAMETERS = (  # what a decoder's parameters are called, whatever its traits
    *("embedding.weight", "position_embedding.weight", "stack.norm.weight", "stack.norm.bias", "head.weight"),
    *(f"{_LAYER}{norm}.{kind}" for norm in ("attention_norm", "mlp_norm") for kind in ("weight", "bias")),
    *(f"{_LAYER}attention.{part}.{kind}" for part in ("qkv", "out") for kind in ("weight", "bias")),
    *(f"{_LAYER}attention.{norm}.weight" for norm in ("q_norm", "k_norm")),
    *(f"{_LAYER}mlp.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")),
    *(f"{_LAYER}mlp.{part}" for part in ("router.weight", "up", "down")),
)
TIED = "head.weight"  # the parameter that a model with tied embeddings does not have


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor and the place in a parameter that it fills."""

    source: str
    parameter: str
    place: tuple[int | slice, ...]  # of the parameter
    shape: tuple[int, ...]  # of the checkpoint's tensor
    load: tuple[Transform, ...] = ()  # in order, checkpoint -> parameter
    save: tuple[Transform, ...] = ()  # in order, parameter -> checkpoint

    def fill(self, parameter: Tensor, tensor: Tensor) -> None:
        """Writes the tensor into its place, in the parameter's dtype and on its device."""
        for transform in self.load:
            tensor = transform(tensor)
        parameter[self.place].copy_(tensor)

    @property
    def is_turned(self) -> bool:
        """Whether the checkpoint has the matrix as [in, out]."""
        return Tensor.t in self.load

    def fill_rows(self, rows: Tensor, tensor: Tensor) -> None:
        """Writes a matrix [out, any] of the layer's output rows, as the checkpoint orders them, into `rows`, which are
        ordered as the parameter's are.
        """
        tensor = tensor.t() if self.is_turned else tensor
        for transform in self.load:
            tensor = transform(tensor)
        rows.copy_(tensor)

    def read_rows(self, rows: Tensor) -> Tensor:
        """The reverse of `fill_rows`."""
        for transform in self.save:
            rows = transform(rows)
        return (rows.t() if self.is_turned else rows).contiguous()

    @property
    def is_same(self) -> bool:
        """Whether the checkpoint's tensor is the parameter."""
        return not self.place and not self.load

    @property
    def is_view(self) -> bool:
        """Whether the checkpoint's tensor can be a view of the parameter's memory."""
        return all(transform is Tensor.t for transform in self.save)

    def view(self, parameter: Tensor) -> Tensor:
        """The checkpoint's tensor from the parameter: in its memory where `is_view`."""
        tensor = parameter[self.place]
        for transform in self.save:
            tensor = transform(tensor)
        return tensor

    def read(self, parameter: Tensor) -> Tensor:
        """The checkpoint tensor back from the parameter."""
        return self.view(parameter).contiguous()


def to_half_split(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring pairs (0,1), (2,3), ... to halves (0, D/2), (1, D/2 + 1), ..."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class _Target:
    """What a rule fills: a region of one parameter, in the layer and of the expert that names are made of."""

    parameter: str
    names: Mapping[str, str]  # what {layer} and {expert} stand for
    place: tuple[int | slice, ...]
    shape: tuple[int, ...]  # of the region

    def source(self, name: str) -> str:
        for word, number in self.names.items():
            name = name.replace(f"{{{word}}}", number)
        return name


def _pieces(rule: Any, target: _Target, spec: ModelSpec, found: Container[str] | None, where: str) -> Iterator[Piece]:
    if isinstance(rule, str):
        yield Piece(target.source(rule), target.parameter, target.place, target.shape)
    elif isinstance(rule, Mapping) and set(rule) == {"cat", "rows"}:
        rows = [_number(spec, name, where) for name in rule["rows"]]
        if sum(rows) != target.shape[0] or len(rows) != len(rule["cat"]):
            raise TritiumError(f"{where}: {target.parameter} has {target.shape[0]} rows, its map {rows}")
        start = 0
        for part, count in zip(rule["cat"], rows, strict=True):
            rows_of = replace(
                target, place=(*target.place, slice(start, start + count)), shape=(count, *target.shape[1:])
            )
            yield from _pieces(part, rows_of, spec, found, where)
            start += count
    elif isinstance(rule, Mapping) and set(rule) == {"permute_rope", "heads"}:
        heads = _number(spec, rule["heads"], where)
        for piece in _pieces(rule["permute_rope"], target, spec, found, where):
            load = (*piece.load, lambda tensor: to_half_split(tensor, heads))
            yield replace(piece, load=load, save=(lambda tensor: to_interleaved(tensor, heads), *piece.save))
    elif isinstance(rule, Mapping) and set(rule) == {"transpose"}:
        turned = replace(target, shape=target.shape[::-1])
        for piece in _pieces(rule["transpose"], turned, spec, found, where):
            yield replace(piece, load=(*piece.load, Tensor.t), save=(Tensor.t, *piece.save))
    elif isinstance(rule, Mapping) and set(rule) == {"stack", "over"}:
        count = _number(spec, rule["over"], where)
        if count != target.shape[0]:
            raise TritiumError(f"{where}: {target.parameter} stacks {target.shape[0]}, its map {count}")
        for index in range(count):
            names = {**target.names, "expert": str(index)}
            part = replace(target, names=names, place=(*target.place, index), shape=target.shape[1:])
            yield from _pieces(rule["stack"], part, spec, found, where)
    elif isinstance(rule, Mapping) and set(rule) == {"one_of"} and rule["one_of"]:
        ways = [list(_pieces(way, target, spec, found, where)) for way in rule["one_of"]]
        there = [way for way in ways if found is not None and any(piece.source in found for piece in way)]
        yield from (there or ways)[0]
    else:
        raise TritiumError(f"{where}: {target.parameter} has the unknown weight rule {rule!r}")


def _number(spec: ModelSpec, name: Any, where: str) -> int:
    """A count that a rule names: a spec field, or a width that follows from some."""
    value = getattr(spec, name, None) if isinstance(name, str) else None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TritiumError(f"{where}: a weight rule counts by {name!r}, which is no number of the spec")
    return value


class WeightMap:
    """A family's map applied to one model: its pieces by checkpoint tensor. Without a family (the layout of `tritium`
    itself) every tensor is called as its parameter is.

    `found` are the names of a checkpoint's tensors, where there is one: they decide between the ways of `one_of`.
    """

    def __init__(
        self,
        family: Family | None,
        spec: ModelSpec,
        parameters: Iterable[tuple[str, Tensor]],
        found: Collection[str] | None = None,
    ) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        self.pieces: dict[str, Piece] = {}
        self.ignore: tuple[str, ...] = ()
        self.prefix = ""
        if family is None:
            self.pieces = {name: Piece(name, name, (), shape) for name, shape in shapes.items()}
            return
        where = str(family.folder / "family.yaml")
        self.ignore = family.ignore
        self.prefix = family.optional_prefix
        named = None if found is None else {self.canonical(name) for name in found}
        mapped = set()
        for pattern, rule in family.weights.items():
            if pattern not in PARAMETERS:
                raise TritiumError(
                    f"{where}: weights: no parameter is called {pattern!r}; {nearest(pattern, PARAMETERS)}"
                )
            for layer in range(spec.num_layers) if "{layer}" in pattern else [0]:
                name = pattern.replace("{layer}", str(layer))
                if name in shapes:
                    mapped.add(name)
                    target = _Target(name, {"layer": str(layer)}, (), shapes[name])
                    for piece in _pieces(rule, target, spec, named, where):
                        if piece.source in self.pieces:
                            raise TritiumError(f"{where}: {piece.source} is mapped to {name} and to what is before it")
                        self.pieces[piece.source] = piece
                elif name == TIED:  # a checkpoint may hold its tensor all the same
                    self.ignore += (rule,)
        if unmapped := sorted(set(shapes) - mapped):
            raise TritiumError(f"{where}: weights does not map {_listed(unmapped)}")

    def canonical(self, name: str) -> str:
        """A checkpoint tensor's name without the family's optional prefix, as `pieces` has it."""
        return name.removeprefix(self.prefix)

    def check(self, found: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises one TritiumError that lists all that is missing, unknown or misshapen in a checkpoint."""
        used = {name: shape for name, shape in found.items() if name in self.pieces or not self.ignores(name)}
        check_shapes({name: piece.shape for name, piece in self.pieces.items()}, used, where)

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor without the model using it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignore)


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises one TritiumError that lists all that is missing, unknown or misshapen among the tensors found."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{what} {len(names)}: {_listed(names)}"
        for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen))
        if names
    ]
    if problems:
        raise TritiumError(f"{where}: tensors do not fit the model: {'; '.join(problems)}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
