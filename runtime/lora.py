"""LoRA (Hu et al. 2021, arXiv:2106.09685): small trainable matrices beside frozen weights, y = W x + scale B A x.

An adapter sits on the linear layer that it is for. A packed layer (q, k and v; gate and up) is one to the runtime and
several to a checkpoint: each of these parts has an A and a B of its own, and `targets` are called as in the checkpoint.
The files that `peft` reads are in lora_files.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import TritiumError, nearest
from .plan import LowRank
from .quantisation import check_dense
from .registry import get_family
from .weight_map import Piece, WeightMap

if TYPE_CHECKING:
    from .decoder import Decoder

ALL_LINEAR = "all-linear"
LARGEST_ALPHA = 1e6
WITHOUT = "experts, router, embeddings and head take no adapter"


@dataclass(frozen=True)
class LoRA:
    """What all adapters of a model have in common."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)  # ends of the names of a checkpoint's layers
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        """Raises TritiumError for a value that is out of range or of another type."""
        if type(self.rank) is not int or self.rank < 1:
            raise TritiumError(f"rank: must be a whole number above 0, got {self.rank!r}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < LARGEST_ALPHA:
            raise TritiumError(f"alpha: must be a number above 0 and below {LARGEST_ALPHA}, got {self.alpha!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise TritiumError(f"dropout: must be a number of 0 or more and below 1, got {self.dropout!r}")
        if type(self.rslora) is not bool:
            raise TritiumError(f"rslora: must be true or false, got {self.rslora!r}")
        if not self.targets or not all(isinstance(target, str) and target for target in self.targets):
            raise TritiumError(f"targets: must be names of layers, or {ALL_LINEAR!r}, got {list(self.targets)!r}")

    @property
    def scale(self) -> float:
        """alpha / rank; with `rslora` alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class Part:
    """A part of a linear layer that has an A and a B of its own, and the rows of the weight that it is."""

    piece: Piece  # the checkpoint's tensor
    start: int
    rows: int


class Adapter(nn.Module):
    """The adapters of one linear layer's parts, stacked: A [parts * rank, in], B [all the parts' rows, rank].

    float32, or float64 where the weight is; each forward casts them to the dtype that it computes in.
    """

    def __init__(self, linear: nn.Linear, parts: Sequence[Part], how: LoRA) -> None:
        super().__init__()
        weight = linear.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = sum(part.rows for part in parts)
        self.how, self.parts, self.width = how, tuple(parts), weight.shape[0]
        self.a = nn.Parameter(torch.empty(len(parts) * how.rank, weight.shape[1], dtype=dtype, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, how.rank, dtype=dtype, device=weight.device))

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """A as `peft` draws it, Kaiming-uniform with a = sqrt(5), so that its entries lie within 1 / sqrt(in)."""
        drawn = torch.empty(self.a.shape, dtype=self.a.dtype)
        self.a.copy_(nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator))

    def by_part(self) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """(part, its A [rank, in], its B [rows, rank]), views."""
        b = self.b.split([part.rows for part in self.parts])
        yield from zip(self.parts, self.a.split(self.how.rank), b, strict=True)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """scale * A [R, in], and B [out, R] with every part's in its rows and columns."""
        if self.b.shape[0] == self.width and len(self.parts) == 1:
            return self.a * self.how.scale, self.b
        whole = self.b.new_zeros(self.width, self.a.shape[0])
        for index, (part, _, b) in enumerate(self.by_part()):
            first = index * self.how.rank
            whole[part.start : part.start + part.rows, first : first + self.how.rank] = b
        return self.a * self.how.scale, whole

    def bind(self, weight: Tensor, bias: Tensor | None) -> LowRank:
        """The layer's plan, in the dtype of `weight`."""
        a, b = self.matrices()
        return LowRank(weight, bias, a.to(weight.dtype), b.to(weight.dtype), self.how.dropout if self.training else 0.0)

    def merged(self, weight: Tensor) -> Tensor:
        """weight + scale * B A, in the adapter's dtype."""
        a, b = self.matrices()
        return torch.addmm(weight.to(self.b.dtype), b, a)


def adapters(model: "Decoder") -> dict[str, Adapter]:
    """A model's adapters, by the name of the layer that each is for."""
    suffix = ".adapter"
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))
    return {name.removesuffix(suffix): module for name, module in found}


def weight_map(model: "Decoder") -> WeightMap:
    """The map of the model's own parameters, without those of adapters."""
    own = [entry for entry in model.named_parameters() if ".adapter." not in entry[0]]
    return WeightMap(get_family(model.config.family), model.config, own)


def module_of(piece: Piece) -> str:
    """The checkpoint's name of the layer whose weight a piece is."""
    return piece.source.removesuffix(".weight")


def find_parts(model: "Decoder", weights: WeightMap, targets: Sequence[str]) -> dict[str, list[Part]]:
    """What the targets name, by the name of the linear layer. Raises TritiumError for one that takes no adapter."""
    linears = {
        f"{name}.weight": module
        for name, module in model.stack.named_modules(prefix="stack")
        if isinstance(module, nn.Linear) and not name.endswith(".router")
    }
    pieces = [piece for piece in weights.pieces.values() if piece.source.endswith(".weight")]
    others = [piece for piece in pieces if piece.parameter not in linears]
    # Where some layers have experts, `peft` takes a name that is also in these for theirs.
    taken = {last_name(piece) for piece in others}
    able = [piece for piece in pieces if piece.parameter in linears and last_name(piece) not in taken]
    chosen: set[str] = set()
    for target in targets:
        named = able if target == ALL_LINEAR else [piece for piece in able if _is_named(weights, piece, target)]
        if not named:
            wrong = next((piece.source for piece in others if _is_named(weights, piece, target)), None)
            what = f"no layer is called {target!r}" if wrong is None else f"{target!r} is {wrong}, and {WITHOUT}"
            raise TritiumError(
                f"targets: {what}; {nearest(target, (ALL_LINEAR, *dict.fromkeys(map(last_name, able))))}"
            )
        chosen.update(piece.source for piece in named)
    found: dict[str, list[Part]] = {}
    for piece in able:
        if piece.source in chosen:
            rows = range(linears[piece.parameter].out_features)[piece.place[0] if piece.place else slice(None)]
            assert isinstance(rows, range)
            found.setdefault(piece.parameter.removesuffix(".weight"), []).append(Part(piece, rows.start, len(rows)))
    return found


def last_name(piece: Piece) -> str:
    return module_of(piece).rpartition(".")[2]


def _is_named(weights: WeightMap, piece: Piece, target: str) -> bool:
    """Whether a target is the name, or the end of the name, of a weight's layer: the rule of `peft`."""
    return f".{weights.prefix}{module_of(piece)}".endswith(f".{target}")


def attach(model: "Decoder", found: Mapping[str, Sequence[Part]], how: LoRA) -> dict[str, Adapter]:
    """Puts adapters on the layers, not drawn yet, and freezes all else."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parts in found.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.adapter = Adapter(linear, parts, how).train(linear.training)
    return adapters(model)


def check_free(model: "Decoder") -> None:
    """Raises TritiumError for a model that cannot be given adapters."""
    check_dense(model, "LoRA")
    if adapters(model):
        raise TritiumError("the model has LoRA adapters already: merge_lora first")
    if model.exchange is not None:
        raise TritiumError("LoRA: the model's layers are shared by several processes; adapters are for whole ones")


def trainable(model: "Decoder") -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def add_lora(
    model: "Decoder",
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ALL_LINEAR,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Gives the layers that `targets` name adapters of this rank, and freezes everything else. Gives the names of the
    parameters that are trained: for every layer A [parts * rank, in], drawn from `seed`, and B [rows, rank], zero, so
    that the model computes what it did.

    A target is the name of a layer in the family's checkpoints, or its end (`q_proj`, `mlp.c_proj`): all layers of that
    name have one; "all-linear" is every projection of attention and feed-forward. The scale is alpha / rank, with
    `rslora` alpha / sqrt(rank). `dropout` is of what adapters are given, in training. Raises TritiumError for a target
    that takes none, a value out of range, and a model that has adapters.
    """
    how = LoRA(rank, alpha, (targets,) if isinstance(targets, str) else tuple(targets), dropout, rslora)
    check_free(model)
    generator = torch.Generator().manual_seed(seed)
    for adapter in attach(model, find_parts(model, weight_map(model), how.targets), how).values():
        adapter.draw(generator)
    return trainable(model)


@torch.no_grad()
def merge_lora(model: "Decoder") -> "Decoder":
    """Adds scale * B A to the weights, in float32 and rounded once, and removes the adapters: the model is an ordinary
    one again, all of it trainable. Raises TritiumError for a model without adapters.
    """
    found = adapters(model)
    if not found:
        raise TritiumError("the model has no LoRA adapters to merge")
    for name, adapter in found.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(adapter.merged(linear.weight))
        del linear.adapter
    return model.requires_grad_(True)
