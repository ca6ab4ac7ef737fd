"""What each family's sizes amount to, computed from their specs."""

import torch

from .decoder import Decoder
from .registry import families
from .spec import ModelSpec


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of a model of this spec, counted on the meta device."""
    with torch.device("meta"):
        return Decoder(spec, "torch").num_parameters()


def cache_bytes_per_token(spec: ModelSpec) -> int:
    """Bytes that one token's keys and values take in the cache, in the spec's dtype."""
    return spec.num_cache_slots * 2 * spec.kv_dim * spec.torch_dtype.itemsize


def model_table() -> str:
    """Every family and size, a line each."""
    rows = [("family", "size", "parameters", "context", "weights", "cache/token", "variants")]
    for family in families().values():
        for size in family.sizes:
            spec = family.spec(size)
            parameters = parameter_count(spec)
            if size in family.bundled:
                variants = "bundled"
            else:
                variants = ", ".join(family.variants) if size in family.published else "random weights only"
            weights = f"{parameters * spec.torch_dtype.itemsize / 2**20:,.0f} MiB"
            cache = f"{cache_bytes_per_token(spec) / 1024:g} KiB"
            rows.append((family.name, size, f"{parameters:,}", f"{spec.context_length:,}", weights, cache, variants))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {2, 3, 4, 5}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
