"""The step in one launch against its phases launched one by one, and against its definition; the barrier on a GPU."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from tritium.kernels import tuning
from tritium.kernels.decode_linear import decode_linear_residual, norm_head, norm_linear, norm_linear_swiglu
from tritium.kernels.decode_step import decode_step, decode_step_reference
from tritium.kernels.launch import INTERPRETED
from tritium.kernels.rope_decode_attention import rope_decode_attention
from tritium.kernels.step_tables import StepLayers, step_scratch, step_tables
from tritium.runtime.accuracy import widened

from ..rule import DEVICE, assert_rule, needs_gpu, same_bits
from .test_decode_step import HEADS, KINDS, KV_HEADS, WIDTH, arguments, copied, mapped, move_on

pytestmark = pytest.mark.usefixtures("poisoned")


def phase_by_phase(held: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same step, a launch a phase."""
    layers: StepLayers = held["layers"]

    def of(tensors: Sequence[Tensor] | None, layer: int) -> Tensor | None:
        return None if tensors is None else tensors[layer]

    x = held["embedding"][held["tokens"]]
    for layer, rotates in enumerate(layers.rotates):
        qkv = norm_linear(
            x, layers.attention_norms[layer], held["eps"], layers.qkv_weights[layer],
            of(layers.qkv_biases, layer), of(layers.qkv_scales, layer),
        )  # fmt: skip
        attended = rope_decode_attention(
            qkv, held["num_heads"], held["num_kv_heads"], held["table"] if rotates else None,
            held["positions"] if rotates else None, held["rope_dtype"], layers.qk_norms[layer],
            of(layers.qk_norm_weights, layer), held["eps"], held["norm_first"],
            held["query_scale"] if rotates else None, layers.k_caches[layer], layers.v_caches[layer], held["slots"],
            held["page_table"], held["lengths"], held["scale"], layers.windows[layer] or None,
        ).flatten(1)  # fmt: skip
        x = decode_linear_residual(
            attended, layers.out_weights[layer], of(layers.out_biases, layer), x, of(layers.out_scales, layer)
        )
        hidden = norm_linear_swiglu(
            x, layers.mlp_norms[layer], held["eps"], layers.up_weights[layer], of(layers.up_biases, layer),
            of(layers.up_scales, layer),
        )  # fmt: skip
        x = decode_linear_residual(
            hidden, layers.down_weights[layer], of(layers.down_biases, layer), x, of(layers.down_scales, layer)
        )
    return norm_head(x, held["norm"], held["eps"], held["head"], held["head_scale"])


def filled(held: dict[str, Any], length: int) -> dict[str, Any]:
    """With keys and values of that many tokens before the one to come."""
    generator = torch.Generator().manual_seed(5)
    for cache in (*held["layers"].k_caches, *held["layers"].v_caches):
        for row in range(len(held["tokens"])):
            pages = cache.view(cache.shape[0], len(held["tokens"]), -1, cache.shape[-1])  # a row's lie one by one
            drawn = torch.randn(cache.shape[0], length, cache.shape[-1], generator=generator)
            pages[:, row, :length] = drawn.to(cache)
    for name in ("positions", "lengths", "slots"):
        held[name] += length
    return held


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU sums may be spread over other warps")
@pytest.mark.parametrize("kind", KINDS)
def test_has_the_bits_of_its_phases(kind: str) -> None:
    """Behind a whole page: logits, packed keys and caches."""
    held = filled(arguments(1, device=DEVICE, dtype=torch.float16, **KINDS[kind]), 16)
    mine, theirs = copied(held), copied(held)
    logits, best = decode_step(**mine)
    wanted, wanted_best = phase_by_phase(theirs)
    assert same_bits(logits, wanted)
    assert torch.equal(best, wanted_best)
    for name in ("k_caches", "v_caches"):
        pairs = zip(getattr(mine["layers"], name), getattr(theirs["layers"], name), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rule(dtype: torch.dtype) -> None:
    """Against the definition in float64, behind a whole page."""
    held = filled(arguments(device=DEVICE, dtype=dtype), 17)
    logits, best = decode_step(**copied(held))
    reference, _ = decode_step_reference(**copied(held))
    truth, _ = decode_step_reference(**mapped(copied(held), widened))
    assert_rule(logits, reference, truth)
    assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits.argmax(1))


def some(held: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """These rows alone, in this order, on caches of their own."""
    ours = ("tokens", "positions", "slots", "page_table", "lengths")
    return copied({name: value[rows] if name in ours else value for name, value in held.items()})


def test_a_row_does_not_depend_on_the_others() -> None:
    """To the bit: one row, two and five, lengths apart, one without a slot beside them; ids below a limit only."""
    held = filled(arguments(5, device=DEVICE, dtype=torch.float16), 3)
    for name in ("positions", "slots", "lengths"):
        held[name][1] += 9
    held["slots"][4] = -1
    logits, best = decode_step(**some(held, [0, 1, 2, 3, 4]), limit=20)
    assert logits[:, 20:].eq(float("-inf")).all()
    assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits.argmax(1))
    for rows in ([1], [3, 1]):
        alone, alone_best = decode_step(**some(held, rows), limit=20)
        assert same_bits(alone, logits[rows])
        assert torch.equal(alone_best, best[rows])


def test_given_memory_is_used_again() -> None:
    """Two steps in the same tables, scratch and outputs; all programs arrive at the end of every phase."""
    held = filled(arguments(device=DEVICE, dtype=torch.float16), 15)
    layers, rows = held["layers"], 2
    scratch = step_scratch(held["embedding"], layers, rows, held["num_heads"], held["num_kv_heads"], 2)
    logits, work = held["embedding"].new_empty(rows, len(held["head"])), torch.zeros(rows, 3, dtype=torch.int64)
    best = work.to(DEVICE)[:, 1]
    given = {"out": logits, "best": best, "tables": step_tables(layers), "scratch": scratch, "programs": 1}
    found = []
    for _ in range(2):
        best.zero_()
        decode_step(**held, **given)
        found.append((logits.clone(), best.clone()))
        assert scratch.arrivals.item() == 2 + 5 * len(layers.rotates)
        assert not scratch.attention.counts.any()
    assert same_bits(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    fresh, _ = decode_step(**held)
    assert same_bits(fresh, logits)


def test_a_gpu_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "config", lambda *_, **key: {})
    with pytest.raises(RuntimeError, match="have no row for a step in one launch"):
        decode_step(**arguments(device=DEVICE))


def test_refusals() -> None:
    """One line each, before anything runs."""
    held = arguments(device=DEVICE)
    layers: StepLayers = held["layers"]
    quantised = arguments(device=DEVICE, bits=8)["layers"]
    shifted = torch.empty(WIDTH + 1, device=DEVICE)[1:]
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"out_weights\[1\] must be", {"layers": layers._replace(out_weights=[layers.out_weights[0], held["head"]])}),
        ("mlp_norms has 1 entries for 2 layers", {"layers": layers._replace(mlp_norms=layers.mlp_norms[:1])}),
        ("quantised, or none is", {"layers": quantised._replace(up_scales=None)}),
        ("alike in all layers that rotate", {"layers": layers._replace(qk_norms=[True, False], qk_norm_weights=None)}),
        (
            "only for layers that all normalise",
            {"layers": layers._replace(rotates=[True, False], qk_norms=[True, False])},
        ),
        ("multiple of 16 bytes", {"layers": layers._replace(mlp_norms=[layers.mlp_norms[0], shifted])}),
        ("a window of -1 keys", {"layers": layers._replace(windows=[0, -1])}),
        ("tokens contiguous int64", {"tokens": held["tokens"].int()}),
        ("head must be contiguous", {"head": held["head"][:, :8]}),
        ("best must be", {"best": torch.zeros(2, device=DEVICE)}),
        ("out must be contiguous", {"out": torch.zeros(2, 7, device=DEVICE)}),
        ("scratch is for", {"scratch": step_scratch(held["embedding"], layers, 1, HEADS, KV_HEADS, 2)}),
    ]
    for message, change in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            decode_step(**{**held, **change})


def test_registered() -> None:
    held = filled(arguments(1, device=DEVICE, dtype=torch.float16, rotates=(True,)), 2)
    flat: list[Any] = []
    for name, value in held.items():
        flat += list(value) if name == "layers" else [value]
    head_scale = flat.pop()
    opcheck(torch.ops.tritium.decode_step, tuple(flat), {"head_scale": head_scale})


@needs_gpu
def test_all_programs_wait_for_each_other() -> None:
    """The barrier: 200 steps by all programs have the bits of one program's, which has nobody to wait for; again and
    again. The interpreter runs programs one after another, and could not get past the first.
    """
    one = filled(arguments(5, device=DEVICE, dtype=torch.bfloat16, rotates=(True, False) * 4, qk_norm="unweighted"), 1)
    every, again = copied(one), copied(one)
    for step in range(200):
        logits, best = decode_step(**one, programs=1)
        for held in (every, again):
            found, found_best = decode_step(**held)
            assert same_bits(found, logits), step
            assert torch.equal(found_best, best), step
            if step % 28 < 27:  # within the two pages
                move_on(held, logits.argmax(1))
        if step % 28 < 27:
            move_on(one, logits.argmax(1))
        else:
            for held in (one, every, again):
                for name in ("positions", "slots", "lengths"):
                    held[name] -= 27
