"""How time is taken: in turn, cold, captured where calls are small; on a stand-in for a GPU, whose clock calls wind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tritium.benchmarks import measure
from tritium.benchmarks.measure import Stopwatch, ceilings, floor, input_sets

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_the_stopwatch_runs_contenders_in_turn() -> None:
    seen: list[str] = []
    watch = Stopwatch(CPU, seconds=0.0)
    contenders = {name: [lambda name=name: seen.append(name)] for name in "ab"}
    timed = watch.series(contenders, small=True, host=False)
    assert {name: (entry["method"], entry["repetitions"]) for name, entry in timed.items()} == {
        "a": ("clock", 10),
        "b": ("clock", 10),
    }
    assert seen[-20:] == ["a", "b"] * 10
    assert timed["a"]["p20"] <= timed["a"]["p50"] <= timed["a"]["p80"]
    assert all(value > 0 for value in ceilings(CPU, smoke=True).values())


def test_the_floor_is_the_larger_time() -> None:
    limits = {"read_bytes_per_second": 1e3, "copy_bytes_per_second": 2e3, "matmul_flop_per_second": 1e4}
    assert floor(reads=100, writes=5, flop=10, limits=limits) == (0.105, "read")
    assert floor(reads=100, writes=100, flop=10, limits=limits) == (0.1, "copy")
    assert floor(reads=100, writes=100, flop=5000, limits=limits) == (0.5, "matmul")


class Gpu:
    """A clock in milliseconds, events that read it, graphs that replay what was called while they were captured."""

    def __init__(self) -> None:
        self.now = 0.0
        self.captured: list[float] | None = None
        self.may_capture = True
        self.flushes = 0

    def takes(self, milliseconds: float) -> Callable[[], None]:
        def call() -> None:
            if self.captured is None:
                self.now += milliseconds
            elif not self.may_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            else:
                self.captured.append(milliseconds)

        return call

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
        gpu = self

        class Event:
            def __init__(self, **options: Any) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            calls: tuple[float, ...] = ()

            def replay(self) -> None:
                gpu.now += sum(self.calls)

        class Capture:
            def __init__(self, graph: Graph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                gpu.captured = []

            def __exit__(self, *error: object) -> None:
                self.graph.calls, gpu.captured = tuple(gpu.captured or ()), None

        class Stream:
            def __init__(self, *args: Any) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *error: object) -> None:
                pass

        class Other:
            def sum(self) -> None:
                gpu.flushes += 1
                gpu.now += 100.0  # outside the events

        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": Capture,
            "Stream": Stream,
            "stream": lambda stream: stream,
            "current_stream": lambda device: Stream(),
            "synchronize": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        watch = Stopwatch(CPU, seconds=0.02)
        watch.device, watch._other = CUDA, Other()  # type: ignore[assignment]
        return watch


def test_large_calls_are_timed_between_events_behind_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    watch = gpu.install(monkeypatch)
    timed = watch.series({"fast": [gpu.takes(1.0)], "slow": [gpu.takes(5.0)]}, small=False, host=False)
    assert timed["fast"]["p50"] == pytest.approx(1e-3)
    assert timed["slow"]["p50"] == pytest.approx(5e-3)
    assert (timed["fast"]["method"], timed["fast"]["repetitions"], timed["slow"]["repetitions"]) == ("events", 20, 10)
    assert gpu.flushes == 20 + 10 + 2


def test_small_calls_are_replayed_over_all_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    watch = gpu.install(monkeypatch)
    timed = watch.series({"ours": [gpu.takes(1.0), gpu.takes(2.0), gpu.takes(3.0)]}, small=True, host=False)["ours"]
    assert (timed["p50"], timed["method"], gpu.flushes) == (pytest.approx(2e-3), "graph", 0)


def test_what_cannot_be_captured_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    gpu.may_capture = False
    watch = gpu.install(monkeypatch)
    timed = watch.series({"ours": [gpu.takes(2.0)] * 2}, small=True, host=False)["ours"]
    assert (timed["p50"], timed["method"]) == (pytest.approx(2e-3), "events")


def test_inputs_rotate_through_more_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = 50 * 2**20

    class Properties:
        L2_cache_size = cache

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert input_sets(measure.SMALL, CUDA) == 1
    assert input_sets(10 * 2**20, CUDA) * 10 * 2**20 >= 3 * cache
    assert input_sets(1000, CUDA) == 64
    assert input_sets(1000, CPU) == 1
