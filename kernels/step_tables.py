"""What kernels/decode_step.py is told of a model's layers: the lists of their tensors, and the table made of them.

Not an operation. The kernel finds the weights and caches of a layer by their addresses, which stand in a row of the
table; its columns are named here, for both sides.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import tl
from .quantised_linear import bits_of, quantised_shapes
from .rope_decode_attention import Scratch, rope_decode_attention_scratch

FAR = 1 << 30  # the window of a layer that has none

# Columns of the table. A projection has three: weight, bias and scale.
QKV, OUT, UP, DOWN = tl.constexpr(0), tl.constexpr(3), tl.constexpr(6), tl.constexpr(9)
ATTENTION_NORM, MLP_NORM, QK_NORM = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
KEYS, VALUES = tl.constexpr(15), tl.constexpr(16)
ROTATES, WINDOW = tl.constexpr(17), tl.constexpr(18)
COLUMNS = tl.constexpr(19)

Tensors = Sequence[Tensor]


class StepLayers(NamedTuple):
    """A model's layers in the order in which they run, an entry each. With scales, weights and scales are `Quantised`s
    of one number of bits.
    """

    attention_norms: Tensors  # [E]
    qkv_weights: Tensors  # [(Hq + 2 Hk) D, E]
    out_weights: Tensors  # [E, Hq D]
    mlp_norms: Tensors  # [E]
    up_weights: Tensors  # [2 F, E], the gate's rows first
    down_weights: Tensors  # [E, F]
    k_caches: Tensors  # [Hk, pages, page_size, D]
    v_caches: Tensors
    rotates: Sequence[bool]
    qk_norms: Sequence[bool]  # whether q and k are normalised: alike in all layers that rotate, and in all others
    windows: Sequence[int]  # 0: none
    qk_norm_weights: Tensors | None = None  # [Hq + Hk, D]; only where all layers normalise
    qkv_biases: Tensors | None = None
    out_biases: Tensors | None = None
    up_biases: Tensors | None = None
    down_biases: Tensors | None = None
    qkv_scales: Tensors | None = None
    out_scales: Tensors | None = None
    up_scales: Tensors | None = None
    down_scales: Tensors | None = None


class StepTables(NamedTuple):
    """Where the layers' weights and caches lie: good as long as none of them moves."""

    pointers: Tensor  # [layers, COLUMNS] int64
    kept: tuple[Tensor, ...]  # what is pointed to


class StepScratch(NamedTuple):
    """What a step writes besides its results. One step after another may use it, of as many rows."""

    stream: Tensor  # [R, E]
    qkv: Tensor  # [R, (Hq + 2 Hk) D]
    attended: Tensor  # [R, Hq, D]
    hidden: Tensor  # [R, F]
    attention: Scratch
    arrivals: Tensor  # [1] int32


def step_tables(layers: StepLayers) -> StepTables:
    """The table of a model's layers, on their device.

    Raises ValueError where a tensor is not contiguous (a cache: within a head), or begins elsewhere than at a multiple
    of 16 bytes.
    """
    columns = [
        layers.qkv_weights, layers.qkv_biases, layers.qkv_scales,
        layers.out_weights, layers.out_biases, layers.out_scales,
        layers.up_weights, layers.up_biases, layers.up_scales,
        layers.down_weights, layers.down_biases, layers.down_scales,
        layers.attention_norms, layers.mlp_norms, layers.qk_norm_weights, layers.k_caches, layers.v_caches,
    ]  # fmt: skip
    kept = tuple(tensor for column in columns if column is not None for tensor in column)
    for tensor in kept:
        if (why := misplaced(tensor)) is not None:
            raise ValueError(f"a tensor {list(tensor.shape)} {tensor.dtype} of the layers {why}")
    rows = [
        [0 if column is None else column[layer].data_ptr() for column in columns]
        + [int(rotates), layers.windows[layer] or FAR]
        for layer, rotates in enumerate(layers.rotates)
    ]
    return StepTables(torch.tensor(rows, dtype=torch.int64, device=layers.qkv_weights[0].device), kept)


def misplaced(tensor: Tensor) -> str | None:
    """Why the kernel cannot read a tensor where it lies; None where it can."""
    part = tensor[:1] if tensor.dim() == 4 else tensor  # a cache: heads may lie apart
    if not part.is_contiguous():
        return f"is not contiguous: its strides are {list(tensor.stride())}"
    if tensor.data_ptr() % 16:
        return "begins elsewhere than at a multiple of 16 bytes"
    return None


def step_scratch(
    embedding: Tensor, layers: StepLayers, rows: int, num_heads: int, num_kv_heads: int, splits: int
) -> StepScratch:
    """Scratch for so many rows, of at most `splits` pages each."""
    width, hidden = embedding.shape[1], layers.up_weights[0].shape[0] // 2
    head_dim = layers.k_caches[0].shape[3]
    return StepScratch(
        embedding.new_empty((rows, width)),
        embedding.new_empty((rows, (num_heads + 2 * num_kv_heads) * head_dim)),
        embedding.new_empty((rows, num_heads, head_dim)),
        embedding.new_empty((rows, hidden)),
        rope_decode_attention_scratch(rows, num_heads, num_kv_heads, head_dim, splits, embedding.device),
        torch.zeros(1, dtype=torch.int32, device=embedding.device),
    )


def check_layers(layers: StepLayers, embedding: Tensor, num_heads: int, num_kv_heads: int) -> int:
    """The bits of a layer's weights. Raises TypeError and ValueError where the layers do not fit or are not alike."""
    number, width, dtype = len(layers.rotates), embedding.shape[1], embedding.dtype
    quantised = layers.qkv_scales is not None
    if not number:
        raise ValueError("there must be a layer")
    stored = layers.qkv_weights[0].dtype
    bits = bits_of(layers.qkv_weights[0]) if quantised else 8 * dtype.itemsize
    head_dim, tall = layers.k_caches[0].shape[-1], layers.up_weights[0].shape[0]
    attended = num_heads * head_dim
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "attention_norms": ((width,), dtype),
        "mlp_norms": ((width,), dtype),
        "qk_norm_weights": ((num_heads + num_kv_heads, head_dim), dtype),
        "k_caches": (tuple(layers.k_caches[0].shape), dtype),
        "v_caches": (tuple(layers.k_caches[0].shape), dtype),
    }
    for name, height, depth in (
        ("qkv", attended + 2 * num_kv_heads * head_dim, width),
        ("out", width, attended),
        ("up", tall, width),
        ("down", width, tall // 2),
    ):
        values, scale = quantised_shapes(height, depth, bits)
        shapes[f"{name}_weights"] = values if quantised else (height, depth), stored
        shapes[f"{name}_biases"] = (height,), dtype
        shapes[f"{name}_scales"] = scale, dtype if bits == 4 else torch.float32
        if quantised != (getattr(layers, f"{name}_scales") is not None):
            raise ValueError("all projections of the layers are quantised, or none is")
    for name, (shape, wanted) in shapes.items():
        tensors = getattr(layers, name)
        if tensors is None:
            continue
        if len(tensors) != number:
            raise ValueError(f"{name} has {len(tensors)} entries for {number} layers")
        for layer, tensor in enumerate(tensors):
            if tensor.shape != shape or tensor.dtype != wanted or tensor.device != embedding.device:
                found = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
                raise ValueError(f"{name}[{layer}] must be {list(shape)} {wanted} on {embedding.device}, got {found}")
            if name.endswith("caches") and tensor.stride() != layers.k_caches[0].stride():
                raise ValueError(f"{name}[{layer}] must be laid out like k_caches[0], got {list(tensor.stride())}")
    if tall % 2:
        raise ValueError(f"a gated weight must have as many up rows as gate rows, got {tall} in all")
    if not len(layers.qk_norms) == len(layers.windows) == number:
        raise ValueError(f"qk_norms and windows must have an entry for each of {number} layers")
    if len(set(zip(layers.rotates, layers.qk_norms, strict=True))) > len(set(layers.rotates)):
        raise ValueError("the norm of q and k must be alike in all layers that rotate, and in all that do not")
    if layers.qk_norm_weights is not None and not all(layers.qk_norms):
        raise ValueError("qk_norm_weights are only for layers that all normalise q and k")
    if min(layers.windows) < 0:
        raise ValueError(f"a window of {min(layers.windows)} keys: it must be at least 1, or 0 for none")
    return bits
