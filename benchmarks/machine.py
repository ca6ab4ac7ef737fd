"""What a decode step must cost on a machine: its floor in named parts, so that the gap to a measurement has a name.

A step reads every weight once (of a mixture, the experts that its rows choose), the keys and values of every row, and
writes the logits. Vectors, the rows of the embedding and what passes from phase to phase are as nothing beside that.
Its phases are launches of one captured graph, or the parts of one persistent launch with a barrier between any two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tritium.kernels.quantised_linear import BLOCK
from tritium.runtime.kv_cache import PAGE_SIZE
from tritium.runtime.quantisation import HEAD_BITS, SCHEMES
from tritium.runtime.spec import ModelSpec

Form = Literal["fused", "persistent"]

DENSE = 5  # phases: norm + QKV, attention, projection, norm + gate-up, down
MIXTURE = 3 + 1 + 1 + 7  # the first three, norm, router, and what kernels/ has for the rest
WITHIN = 2  # beside the layers: embedding, norm + head
BEHIND = 2  # sampling, and the advance to the next step: launches in any form
PARTS = ("weights", "cache", "logits", "products", "launches", "barriers")
MEMORY = PARTS[:3]
"""The parts of a floor, and those of them that memory takes."""


@dataclass(frozen=True)
class Step:
    """The work of one decode step: bytes, operations, and how often a phase follows another."""

    weights: int  # bytes read
    cache: int  # bytes read, keys and values
    logits: int  # bytes written
    flop: int
    launches: int
    barriers: int

    def scaled(self, factor: int) -> "Step":
        """The same with elements so many times as wide."""
        wider = {name: factor * getattr(self, name) for name in MEMORY}
        return replace(self, **wider)


def decode_step(
    spec: ModelSpec,
    rows: int,
    keys: float,
    item: int = 2,
    quantise: str | None = None,
    form: Form = "fused",
) -> Step:
    """The least work of a step of `rows` rows that see `keys` keys each, their new one included.

    `item` is bytes an element of weights, cache and logits. `quantise` is a scheme of runtime/quantisation.py. A
    layer that runs several times in succession is read once.
    """
    bits, head_bits = (16, 16) if quantise is None else (SCHEMES[quantise], HEAD_BITS)
    hidden = spec.embedding_dim
    attention = ((spec.query_dim + 2 * spec.kv_dim, hidden), (hidden, spec.query_dim))
    dense = ((2 if spec.mlp == "gated" else 1) * spec.hidden_dim, hidden), (hidden, spec.hidden_dim)
    expert = 3 * spec.expert_dim * hidden  # elements
    weights = multiplied = phases = 0.0
    seen = 0.0  # keys, over all layers
    for has_experts, window in zip(spec.expert_layers, spec.windows, strict=True):
        matrices = attention if has_experts else (*attention, *dense)
        weights += sum(matrix_bytes(n, k, item, bits) for n, k in matrices)
        elements = sum(n * k for n, k in matrices)
        if has_experts:
            router = spec.num_experts * hidden
            weights += (router + touched(spec, rows) * expert) * item
            elements += router + spec.experts_per_token * expert
        multiplied += elements * spec.layer_repeat
        seen += (keys if window is None else min(keys, window)) * spec.layer_repeat
        phases += (MIXTURE if has_experts else DENSE) * spec.layer_repeat
    head = spec.vocab_size, hidden
    weights += matrix_bytes(*head, item, head_bits)
    phases += WITHIN
    return Step(
        weights=round(weights),
        cache=round(2 * seen * spec.kv_dim * item * rows),
        logits=rows * spec.vocab_size * item,
        flop=round(2 * rows * (multiplied + math.prod(head) + 2 * seen * spec.query_dim)),
        launches=BEHIND + (int(phases) if form == "fused" else 1),
        barriers=0 if form == "fused" else int(phases) - 1,
    )


def matrix_bytes(n: int, k: int, item: int, bits: int = 16) -> int:
    """Of a weight [n, k] with its scales: see kernels/quantised_linear.py. 16 bits: as it is, `item` bytes each."""
    if bits == 16:
        return n * k * item
    if bits == 8:
        return n * k + 4 * n
    blocks = -(-k // BLOCK)
    return n * blocks * (BLOCK // 2 + item)


def touched(spec: ModelSpec, rows: int) -> float:
    """Distinct experts that `rows` rows are expected to choose, where each chooses evenly: each leaves an expert out
    with probability 1 - k / E.
    """
    return spec.num_experts * (1 - (1 - spec.experts_per_token / spec.num_experts) ** rows)


def floor_parts(step: Step, limits: Mapping[str, float]) -> dict[str, float]:
    """Seconds by name; their sum is the floor. `limits` are what ceilings() of measure.py measured.

    `products` is how much longer the matrix products take than the memory, if they do: both run at once.
    """
    read = limits["read_bytes_per_second"]
    memory = {
        "weights": step.weights / read,
        "cache": step.cache / read,
        "logits": step.logits / limits["copy_bytes_per_second"],
    }
    products = step.flop / limits["matmul_flop_per_second"] - sum(memory.values())
    return {
        **memory,
        "products": max(0.0, products),
        "launches": step.launches * limits["launch_seconds"],
        "barriers": step.barriers * limits["barrier_seconds"] if step.barriers else 0.0,
    }


@dataclass(frozen=True)
class Gap:
    """A measured step beside its floor, seconds."""

    seconds: float
    parts: Mapping[str, float]

    @property
    def floor(self) -> float:
        return sum(self.parts.values())

    @property
    def reading(self) -> float:
        """What memory alone takes: the floor of a step without launches."""
        return sum(self.parts[name] for name in MEMORY)

    @property
    def share(self) -> float:
        """Of the measured time, what the floor explains."""
        return self.floor / self.seconds

    @property
    def unexplained(self) -> float:
        """What is left; below zero where phases overlap that the floor has one after another."""
        return self.seconds - self.floor

    @property
    def largest(self) -> str:
        """The name of the largest part, what is unexplained being one."""
        named = {**self.parts, "unexplained": self.unexplained}
        return max(named, key=named.__getitem__)

    def as_dict(self) -> dict[str, object]:
        """As results files have it, in microseconds."""
        return {
            "parts_us": {name: value * 1e6 for name, value in self.parts.items()},
            "floor_us": self.floor * 1e6,
            "reading_us": self.reading * 1e6,
            "unexplained_us": self.unexplained * 1e6,
            "share_of_floor": self.share,
            "largest": self.largest,
        }


def footprint(
    spec: ModelSpec, parameters: int, rows: int, capacity: int, item: int, quantise: str | None = None
) -> int:
    """Bytes that so many parameters take, and a cache of `rows` sequences of at most `capacity` tokens.

    Of a quantised model, about: the embedding stays as it was.
    """
    pages = -(-capacity // PAGE_SIZE) * rows
    cache = pages * PAGE_SIZE * 2 * spec.kv_dim * spec.num_cache_slots * item
    embedding = spec.vocab_size * spec.embedding_dim
    if quantise is None or not parameters:
        return parameters * item + cache
    rest = parameters if spec.tie_embeddings else parameters - embedding
    return embedding * item + matrix_bytes(rest // spec.embedding_dim, spec.embedding_dim, item, 8) + cache
