"""The learning rate by its formula, and the figures of the meter by hand."""

import math
from collections.abc import Iterator

import pytest
import torch
from tritium.runtime.registry import get_family
from tritium.runtime.training import log
from tritium.runtime.training.config import Optimizer, Schedule
from tritium.runtime.training.optimizer import Average, clip_gradients, gradient_norm, learning_rate

RATES = Optimizer(learning_rate=1.0, minimum_rate=0.1)


def test_learning_rate() -> None:
    schedule = Schedule(steps=14, warmup=4)
    rates = [learning_rate(step, RATES, schedule) for step in range(14)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert rates[9] == pytest.approx(0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0.1
    constant = Schedule(steps=14, warmup=0.5, decay="constant")
    assert [learning_rate(step, RATES, constant) for step in (0, 6, 7, 13)] == pytest.approx([0.125, 0.875, 1.0, 1.0])
    assert learning_rate(0, RATES, Schedule(steps=1)) == 1.0


def test_clipping() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 1)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = gradient_norm(parameters)
    assert float(norm) == 5.0
    clip_gradients(parameters, norm, 10.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0]
    clip_gradients(parameters, norm, 1.0)
    assert torch.cat([parameters[0].grad, parameters[1].grad]).tolist() == pytest.approx([0.6, 0.0, 0.8], rel=1e-5)
    assert parameters[2].grad is None


def test_average_in_place_is_given_back() -> None:
    """Also where what is done with it fails."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average([parameter], 10)
    parameter.data.fill_(3.0)
    average.update(46)
    seen = []

    def failing() -> None:
        with average.in_place():
            seen.append(parameter.item())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert seen == [pytest.approx(1.2)]
    assert parameter.item() == 3.0


def test_matmul_parameters() -> None:
    """Every matrix once for each time a token meets it: the head though it is tied, experts as far as chosen."""
    gpt = get_family("gpt").spec("124M")
    assert log.matmul_parameters(gpt) == 12 * 12 * 768**2 + 50257 * 768
    dense = get_family("qwen3").spec("0.6B")
    assert log.matmul_parameters(dense) == 28 * 1024 * (2 * 2048 + 2 * 1024 + 3 * 3072) + 151936 * 1024
    experts = get_family("qwen3").spec("30B-A3B")
    layer = 2048 * (2 * 4096 + 2 * 512 + 128 + 3 * 768 * 8)
    assert log.matmul_parameters(experts) == 48 * layer + 151936 * 2048
    shared = get_family("mobilellm").spec("125m-layer-share")
    once = shared.replace(layer_repeat=1)
    head = shared.vocab_size * shared.embedding_dim
    assert log.matmul_parameters(shared) - head == 2 * (log.matmul_parameters(once) - head)


def test_the_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in pauses does not count, and each reading begins anew."""
    clock: Iterator[float] = iter([0.0, 10.0, 12.0, 20.0, 22.0, 22.0, 26.0, 26.0])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    spec = get_family("gpt").spec("small")
    meter = log.Meter(spec, peak=1e9)
    meter.go_on()
    meter.add([100, 300])
    meter.pause()
    meter.go_on()
    operations = 6 * log.matmul_parameters(spec) * 400 + 6 * 6 * 384 * (100**2 + 300**2)
    assert meter.read() == {"tokens_per_second": 100.0, "mfu": pytest.approx(operations / 4 / 1e9, abs=1e-4)}
    meter.add([80])
    assert meter.read()["tokens_per_second"] == 20.0


def test_the_peak_is_a_rate() -> None:
    assert 1e8 < log.measure_peak(torch.device("cpu"), torch.float32) < 1e14
