"""Tensor parallelism: how a spec's parameters are cut over processes that compute every layer together.

Attention is cut by key/value heads with their query heads, feed-forwards and experts by their width. Norms, router,
embeddings and head are whole on every process, and so is everything between the layers. The cuts are those of DTensor:
each part of a packed parameter is `Shard(dim)`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TritiumError
from ..quantisation import check_dense
from ..spec import ModelSpec
from .exchange import Exchange

if TYPE_CHECKING:
    from ..decoder import Decoder

PARTIAL = (".attention.q_norm.weight", ".attention.k_norm.weight", ".mlp.router.weight")
"""Whole on every process, but met only by that process's heads or experts: their gradients are summands."""


@dataclass(frozen=True)
class Split:
    """How a parameter is cut: each of its parts, of so many entries along `dim`, into equal pieces."""

    dim: int
    parts: tuple[int, ...]  # more than one where a parameter is packed: QKV, gate and up

    def take(self, whole: Tensor, index: int, count: int) -> Tensor:
        """Piece `index` of `count`."""
        pieces = [part.chunk(count, self.dim)[index] for part in whole.split(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def shape(self, piece: Tensor) -> tuple[int, ...]:
        """The whole parameter's."""
        return tuple(sum(self.parts) if dim == self.dim else size for dim, size in enumerate(piece.shape))

    def whole(self, piece: Tensor, mesh: Any) -> Tensor:
        """The whole parameter from the pieces of all processes of a one-dimensional DeviceMesh, on each of them."""
        from torch.distributed.tensor import DTensor, Shard

        lengths = [part // mesh.size() for part in self.parts]
        parts = [
            DTensor.from_local(part.contiguous(), mesh, [Shard(self.dim)], run_check=False).full_tensor()
            for part in piece.split(lengths, self.dim)
        ]
        return torch.cat(parts, self.dim)


def splits(spec: ModelSpec) -> dict[str, Split]:
    """The parameters of a model that are cut, and how."""
    qkv, up = (spec.query_dim, spec.kv_dim, spec.kv_dim), (spec.hidden_dim,) * (2 if spec.mlp == "gated" else 1)
    found = {}
    for layer, has_experts in enumerate(spec.expert_layers):
        prefix = f"stack.layers.{layer}"
        found[f"{prefix}.attention.qkv.weight"] = found[f"{prefix}.attention.qkv.bias"] = Split(0, qkv)
        found[f"{prefix}.attention.out.weight"] = Split(1, (spec.query_dim,))
        if has_experts:
            found[f"{prefix}.mlp.up"] = Split(1, (spec.expert_dim,) * 2)
            found[f"{prefix}.mlp.down"] = Split(2, (spec.expert_dim,))
        else:
            found[f"{prefix}.mlp.up.weight"] = found[f"{prefix}.mlp.up.bias"] = Split(0, up)
            found[f"{prefix}.mlp.down.weight"] = Split(1, (spec.hidden_dim,))
    return found


def local_spec(spec: ModelSpec, count: int) -> ModelSpec:
    """The spec of what one of `count` processes holds. Raises TritiumError where they cannot share a model evenly."""
    cut = {"num_kv_heads", "num_heads"}
    cut |= {"expert_dim"} if any(spec.expert_layers) else set()
    cut |= {"hidden_dim"} if not all(spec.expert_layers) else set()
    for name in sorted(cut, reverse=True):
        if spec[name] % count:
            raise TritiumError(
                f"tensor parallelism over {count} processes: the model's {name} is {spec[name]}, which "
                f"must be a multiple of {count}"
            )
    return dataclasses.replace(spec, **{name: spec[name] // count for name in cut})


@torch.no_grad()
def split_model(model: "Decoder", index: int, count: int, group: Any) -> None:
    """Makes a whole model process `index`'s of `count`: its parameters are cut, its layers exchange over `group`.

    The parameters are new tensors: make optimizers afterwards. Raises TritiumError for a model that cannot be cut so.
    """
    check_dense(model, "tensor parallelism")
    local, cuts = local_spec(model.config, count), splits(model.config)
    for module, name, full_name in _parameters(model):
        parameter = getattr(module, name)
        if (cut := cuts.get(full_name)) is not None:
            piece = cut.take(parameter, index, count)
            setattr(module, name, nn.Parameter(piece, requires_grad=parameter.requires_grad))
    exchange = Exchange(group)
    for block in model.stack.blocks:
        block.exchange = exchange
        block.attention.num_heads, block.attention.num_kv_heads = local.num_heads, local.num_kv_heads
    model.exchange, model.local_config = exchange, local


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(module, its own name of a parameter, the model's name of it)."""
    for path, module in model.named_modules():
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                yield module, name, f"{path}.{name}" if path else name
