"""The definition of a whole step: token after token it is a decoder over the whole sequence, written out anew."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels.decode_step import decode_step_reference
from tritium.kernels.quantised_linear import dequantise_reference, quantise
from tritium.kernels.step_tables import StepLayers
from tritium.runtime.accuracy import widened

EPS, CONTEXT, PAGE, PAGES = 1e-5, 64, 16, 2  # pages a row
WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 32, 4, 2, 8, 24, 40
LAYER_LISTS = [name for name in StepLayers._fields if name not in ("rotates", "qk_norms", "windows")]


def arguments(
    rows: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rotates: tuple[bool, ...] = (True, True),
    qk_norm: str = "weighted",  # "unweighted" is so in layers that rotate, as in MobileLLM
    windows: tuple[int, ...] | None = None,
    biased: bool = False,
    bits: int = 16,
    rope_dtype: torch.dtype | None = None,
    logn: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """What a step of a small model takes, with empty caches; lengths count the first token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(dtype).to(device)

    number, packed = len(rotates), (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes = {
        "qkv": (packed, WIDTH),
        "out": (WIDTH, HEADS * HEAD_DIM),
        "up": (2 * HIDDEN, WIDTH),
        "down": (WIDTH, HIDDEN),
    }
    lists: dict[str, Any] = dict.fromkeys(StepLayers._fields)
    for name, (height, depth) in shapes.items():
        weights = [draw(height, depth, scale=depth**-0.5) for _ in rotates]
        if bits < 16:
            made = [quantise(weight, bits) for weight in weights]
            weights, lists[f"{name}_scales"] = [one.values for one in made], [one.scale for one in made]
        lists[f"{name}_weights"] = weights
        lists[f"{name}_biases"] = [draw(height, scale=0.3) for _ in rotates] if biased else None
    for name in ("k_caches", "v_caches"):
        lists[name] = [
            torch.full((KV_HEADS, rows * PAGES, PAGE, HEAD_DIM), math.nan, dtype=dtype, device=device) for _ in rotates
        ]
    lists["attention_norms"] = [draw(WIDTH, scale=0.2, mean=1.0) for _ in rotates]
    lists["mlp_norms"] = [draw(WIDTH, scale=0.2, mean=1.0) for _ in rotates]
    if qk_norm == "weighted":
        lists["qk_norm_weights"] = [draw(HEADS + KV_HEADS, HEAD_DIM, scale=0.2, mean=1.0) for _ in rotates]
    lists["rotates"] = list(rotates)
    lists["qk_norms"] = [qk_norm == "weighted" or (qk_norm == "unweighted" and rotated) for rotated in rotates]
    lists["windows"] = list(windows or [0] * number)
    head = draw(VOCABULARY, WIDTH, scale=WIDTH**-0.5)
    quantised = quantise(head, 8) if bits < 16 else None
    angles = torch.outer(torch.arange(CONTEXT).float(), 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    return {
        "embedding": draw(VOCABULARY, WIDTH),
        "tokens": torch.arange(3, 3 + rows, device=device) % VOCABULARY,
        "layers": StepLayers(**lists),
        "norm": draw(WIDTH, scale=0.2, mean=1.0),
        "head": head if quantised is None else quantised.values,
        "eps": EPS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "table": torch.stack((angles.cos(), angles.sin()), 1).to(device),
        "positions": torch.zeros(rows, dtype=torch.int64, device=device),
        "rope_dtype": rope_dtype or dtype,
        "norm_first": qk_norm == "weighted",
        "query_scale": torch.linspace(1.0, 2.0, CONTEXT, device=device) if logn else None,
        "slots": torch.arange(rows, device=device) * PAGES * PAGE,
        "page_table": torch.arange(rows * PAGES, dtype=torch.int32, device=device).view(rows, PAGES),
        "lengths": torch.ones(rows, dtype=torch.int32, device=device),
        "scale": HEAD_DIM**-0.5,
        "head_scale": None if quantised is None else quantised.scale,
    }


def move_on(held: dict[str, Any], tokens: Tensor) -> None:
    """To the next token of each row, in place."""
    held["tokens"].copy_(tokens)
    for name in ("positions", "lengths", "slots"):
        held[name] += 1


def mapped(held: dict[str, Any], change: Any) -> dict[str, Any]:
    """The same with `change` applied to whatever is not a list, and to the layers' tensors."""
    lists = {
        name: value if value is None or name not in LAYER_LISTS else [change(tensor) for tensor in value]
        for name, value in held["layers"]._asdict().items()
    }
    found = {name: value if name == "layers" else change(value) for name, value in held.items()}
    return {**found, "layers": StepLayers(**lists)}


def copied(held: dict[str, Any]) -> dict[str, Any]:
    return mapped(held, lambda value: value.clone() if isinstance(value, Tensor) else value)


def whole(held: dict[str, Any], tokens: list[int]) -> Tensor:
    """Logits [V] behind the last of one sequence's tokens: the decoder over all of it at once, without a cache."""
    layers, n = held["layers"], len(tokens)

    def dense(name: str, layer: int) -> Tensor:
        weight, scales = getattr(layers, f"{name}_weights")[layer], getattr(layers, f"{name}_scales")
        depth = {"qkv": WIDTH, "out": HEADS * HEAD_DIM, "up": WIDTH, "down": HIDDEN}[name]
        return weight if scales is None else dequantise_reference(weight, scales[layer])[:, :depth]

    def linear(x: Tensor, name: str, layer: int) -> Tensor:
        biases = getattr(layers, f"{name}_biases")
        return x @ dense(name, layer).T + (0 if biases is None else biases[layer])

    def normed(x: Tensor, weight: Tensor | float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight

    def rotated(x: Tensor) -> Tensor:  # [n, heads, D], as a product of complex numbers
        pairs = torch.complex(x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :])
        angles = torch.complex(held["table"][:n, 0], held["table"][:n, 1]).unsqueeze(1)
        turned = pairs * angles
        return torch.cat((turned.real, turned.imag), -1)

    x = held["embedding"][torch.tensor(tokens)]
    for layer, rotates in enumerate(layers.rotates):
        qkv = linear(normed(x, layers.attention_norms[layer]), "qkv", layer).view(n, -1, HEAD_DIM)
        qk, v = qkv[:, : HEADS + KV_HEADS], qkv[:, HEADS + KV_HEADS :]
        weight = layers.qk_norm_weights[layer] if layers.qk_norm_weights else 1.0
        if layers.qk_norms[layer] and held["norm_first"]:
            qk = normed(qk, weight)
        if rotates:
            qk = rotated(qk)
        if layers.qk_norms[layer] and not held["norm_first"]:
            qk = normed(qk, weight)
        q, k = qk[:, :HEADS], qk[:, HEADS:]
        if rotates and held["query_scale"] is not None:
            q = q * held["query_scale"][:n, None, None]
        ages = torch.arange(n)[:, None] - torch.arange(n)[None, :]
        seen = (ages >= 0) & (ages < (layers.windows[layer] or n))
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * held["scale"]
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("hqk,khd->qhd", p, v).flatten(1), "out", layer)
        gate, up = linear(normed(x, layers.mlp_norms[layer]), "up", layer).chunk(2, 1)
        x = x + linear(torch.nn.functional.silu(gate) * up, "down", layer)
    head = held["head"] if held["head_scale"] is None else held["head"] * held["head_scale"][:, None]
    return normed(x[-1], held["norm"]) @ head.T


KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "mobilellm": {"rotates": (True, False), "qk_norm": "unweighted"},
    "qwen1": {"qk_norm": "none", "biased": True, "logn": True},
    "windows": {"qk_norm": "none", "windows": (0, 5)},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_a_decoder(kind: str) -> None:
    """Two rows, 18 tokens each, in float64: logits, across pages, and the likeliest token."""
    held = mapped(arguments(**KINDS[kind]), widened)
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(0, VOCABULARY, (18, 2), generator=generator)
    held["tokens"].copy_(sequence[0])
    for step in range(18):
        logits, best = decode_step_reference(**held)
        for row in range(2) if step in (0, 1, 7, 15, 16, 17) else ():
            torch.testing.assert_close(logits[row], whole(held, sequence[: step + 1, row].tolist()))
        assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits.argmax(1))
        if step < 17:
            move_on(held, sequence[step + 1])


def test_ids_from_the_limit_on_are_never_chosen() -> None:
    held = arguments()
    logits, best = decode_step_reference(**held, limit=30)
    assert logits[:, 30:].eq(-math.inf).all()
    assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits[:, :30].argmax(1))
