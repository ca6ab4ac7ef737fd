"""What each family's sizes amount to, computed from their specs."""

from collections import Counter
from functools import cache

import torch

from .decoder import Decoder
from .layers import TransformerBlock
from .registry import families
from .spec import ModelSpec


@cache
def parameter_count(spec: ModelSpec) -> int:
    """Parameters of a model of this spec, counted on the meta device: one layer of each kind is built."""
    names = ("rope_layers", "qk_norm_layers", "windows", "expert_layers")
    kinds = list(zip(*(spec[name] for name in names), strict=True))
    count = 0
    with torch.device("meta"):
        for kind, layers in Counter(kinds).items():
            count += layers * _size(TransformerBlock(spec, kinds.index(kind)))
        one = Decoder(spec.replace(num_layers=1, **dict(zip(names, kinds[0], strict=True))), "torch")
        return count + _size(one) - _size(one.stack.layers[0])


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cache_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes that one token's keys and values take in the cache, in the spec's dtype."""
    return spec.num_cache_slots * 2 * spec.kv_dim * spec.torch_dtype.itemsize


def active_parameters(spec: ModelSpec, parameters: int) -> int:
    """Of so many parameters, those that a token's forward uses: without the experts that are not picked for it."""
    idle = spec.num_experts - spec.experts_per_token
    return parameters - sum(spec.expert_layers) * idle * 3 * spec.embedding_dim * spec.expert_dim


def model_table() -> str:
    """Every family and size, a line each."""
    rows = [("family", "size", "parameters", "active", "context", "weights", "cache/token", "variants")]
    for family in families().values():
        for size in family.sizes:
            spec = family.spec(size)
            parameters = parameter_count(spec)
            variants = ", ".join(family.repositories(size)) or "random weights only"
            rows.append(
                (
                    family.name,
                    size,
                    f"{parameters:,}",
                    f"{active_parameters(spec, parameters):,}",
                    f"{spec.context_length:,}",
                    f"{parameters * spec.torch_dtype.itemsize / 2**20:,.0f} MiB",
                    f"{cache_bytes_per_token(spec) / 1024:g} KiB",
                    "bundled" if size in family.bundled else variants,
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {2, 3, 4, 5, 6}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
