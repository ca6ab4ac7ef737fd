"""The model of the machine counts what models hold, and a gap's parts add up to what was measured."""

import dataclasses

import pytest
import torch
from tritium.benchmarks.launches import barriers, limits, tick
from tritium.benchmarks.machine import Gap, Step, decode_step, floor_parts, footprint, matrix_bytes, touched
from tritium.benchmarks.shapes import spec
from tritium.kernels.quantised_linear import quantise
from tritium.runtime.decoder import Decoder
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.registry import get_family
from tritium.runtime.spec import ModelSpec
from tritium.runtime.summary import parameter_count

CPU = torch.device("cpu")


def matrices(model_spec: ModelSpec) -> int:
    """Elements of all that a forward multiplies with, as the decoder itself has it."""
    with torch.device("meta"):
        model = Decoder(model_spec, "torch")
    held = sum(parameter.numel() for parameter in model.stack.parameters() if parameter.dim() > 1)
    return held + model_spec.vocab_size * model_spec.embedding_dim


@pytest.mark.parametrize("name", ["tiny", "qwen3 0.6B", "mobilellm 950m", "qwen3 8B"])
def test_a_dense_step_reads_every_matrix_once(name: str) -> None:
    model = spec(name)
    step = decode_step(model, 1, 1)
    assert step.weights == 2 * matrices(model)
    assert decode_step(model, 1, 1, item=4).weights == 2 * step.weights
    assert decode_step(model, 32, 1).weights == step.weights  # however many rows share it
    assert step.flop == 2 * (matrices(model) + 2 * model.num_layers * model.query_dim)


def test_a_mixture_reads_the_experts_that_are_chosen() -> None:
    model = spec("qwen3 30B-A3B")
    expert = 3 * 2048 * 768
    idle = 48 * (128 - 8) * expert
    assert decode_step(model, 1, 1).weights == 2 * (matrices(model) - idle)
    assert decode_step(model, 10**6, 1).weights == 2 * matrices(model)
    assert decode_step(model, 1, 1).flop == 2 * (matrices(model) - idle + 2 * 48 * 32 * 128)
    small = spec("tiny mixture")
    assert touched(small, 1) == pytest.approx(2)
    assert touched(small, 2) == pytest.approx(8 * (1 - 0.75**2))  # by hand: 3.5 of 8


def test_the_cache_by_hand() -> None:
    """Layers, windows, and layers that run twice."""
    model = spec("qwen3 0.6B")
    assert decode_step(model, 8, 4096).cache == 28 * 2 * 8 * 128 * 2 * 4096 * 8
    windowed = model.replace(num_layers=3, windows=[None, 100, 5000])
    assert decode_step(windowed, 1, 4096).cache == (4096 + 100 + 4096) * 2 * 8 * 128 * 2
    once, twice = (decode_step(model.replace(layer_repeat=times), 2, 64) for times in (1, 2))
    assert twice.cache == 2 * once.cache
    assert twice.weights == once.weights
    head = 2 * 2 * 151936 * 1024  # of two rows
    assert twice.flop - head == 2 * (once.flop - head)
    assert twice.launches == 2 * 28 * 5 + 4


def test_phases_are_launches_or_lie_between_barriers() -> None:
    """By hand: five a dense layer, twelve a mixture's, and four around them."""
    dense, mixture = spec("qwen3 0.6B"), spec("qwen3 30B-A3B")
    assert decode_step(dense, 1, 1).launches == 28 * 5 + 4
    assert decode_step(mixture, 1, 1).launches == 48 * 12 + 4
    assert decode_step(dense, 1, 1).barriers == 0
    persistent = decode_step(dense, 1, 1, form="persistent")
    assert (persistent.launches, persistent.barriers) == (3, 28 * 5 + 1)  # sampling and advance are behind it


@pytest.mark.parametrize(("bits", "k"), [(8, 128), (8, 100), (4, 128), (4, 100)])
def test_quantised_bytes_are_those_that_are_stored(bits: int, k: int) -> None:
    held = quantise(torch.randn(6, k, dtype=torch.bfloat16), bits)
    assert matrix_bytes(6, k, 2, bits) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_quantised_step() -> None:
    model = spec("qwen3 8B")
    layers, head = 36 * 4096 * (6144 + 4096 + 3 * 12288), 151936 * 4096
    rows = 36 * (6144 + 4096 + 2 * 12288 + 4096) + 151936
    assert decode_step(model, 1, 1, quantise="int8").weights == layers + head + 4 * rows
    assert decode_step(model, 1, 1, quantise="int4").weights == layers * 34 // 64 + head + 4 * 151936
    assert decode_step(model, 1, 64, quantise="int4").cache == decode_step(model, 1, 64).cache


LIMITS = {
    "read_bytes_per_second": 100.0, "copy_bytes_per_second": 50.0, "matmul_flop_per_second": 10.0,
    "launch_seconds": 0.5, "barrier_seconds": 0.25,
}  # fmt: skip


def test_the_floor_is_the_sum_of_its_parts() -> None:
    parts = floor_parts(Step(weights=200, cache=100, logits=25, flop=30, launches=4, barriers=2), LIMITS)
    assert parts == {"weights": 2, "cache": 1, "logits": 0.5, "products": 0, "launches": 2, "barriers": 0.5}
    bound = floor_parts(Step(weights=200, cache=100, logits=25, flop=45, launches=4, barriers=0), LIMITS)
    assert bound["products"] == pytest.approx(1.0)  # beyond the 3.5 seconds of the memory
    gap = Gap(8.0, parts)
    assert (gap.floor, gap.reading, gap.share, gap.unexplained) == (6.0, 3.5, 0.75, 2.0)
    assert gap.largest == "weights"
    assert Gap(9.0, parts).largest == "unexplained"
    assert gap.as_dict()["unexplained_us"] == 2e6
    without = {name: value for name, value in LIMITS.items() if name != "barrier_seconds"}
    assert floor_parts(Step(200, 100, 25, 30, 4, 0), without)["barriers"] == 0


def test_wider_elements_are_more_bytes_and_no_more_launches() -> None:
    step = Step(weights=200, cache=100, logits=25, flop=30, launches=4, barriers=2)
    assert step.scaled(2) == dataclasses.replace(step, weights=400, cache=200, logits=50)


def test_the_footprint_is_what_is_allocated() -> None:
    model = spec("tiny")
    cache = KVCache(model, 3, 300, torch.float32)
    held = sum(pool.numel() * 4 for pool in (*cache.keys, *cache.values))
    assert footprint(model, parameter_count(model), 3, 300, 4) == held + 4 * parameter_count(model)
    large = get_family("qwen3").spec("8B")
    whole, eighth = (footprint(large, parameter_count(large), 0, 1, 2, how) for how in (None, "int8"))
    assert 0.5 < eighth / whole < 0.6


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_the_kernels_that_are_timed_do_what_is_timed() -> None:
    count = torch.zeros(1, dtype=torch.int32)
    for _ in range(3):
        tick(count)
    assert count.item() == 3
    barriers(count, 5, 1)  # begins at 0; each program arrives as often as there are barriers
    assert count.item() == 5


def test_costs_are_measured_with_the_ceilings() -> None:
    found = limits(CPU, smoke=True)
    assert set(found) == set(LIMITS)
    assert all(value > 0 for name, value in found.items() if name != "barrier_seconds")
