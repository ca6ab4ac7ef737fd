"""Time on a device: cold caches, contenders in turn, medians; and the ceilings that a machine really has."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from .case import Call
from .harness import Timing, clock

SMALL = 64 * 2**20  # bytes; calls that move less are replayed from a captured graph, so that launches do not show
FEWEST, MOST = 10, 200  # repetitions
WARM_UP = 3


def input_sets(moved: int, device: torch.device) -> int:
    """How many sets of inputs to rotate among, so that none is found in the cache."""
    if device.type != "cuda" or moved >= SMALL:
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-3 * cache // max(moved, 1))))


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device, seconds: float, smoke: bool = False) -> None:
        self.device, self.seconds, self.smoke = device, seconds, smoke
        self._other = torch.empty(0)
        if device.type == "cuda":
            # Beyond the cache, and long enough for the host to get ahead of the device meanwhile.
            size = max(2**30, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
            self._other = torch.ones(size // 4, device=device)

    def series(self, contenders: Mapping[str, Sequence[Call]], small: bool, host: bool) -> dict[str, dict[str, Any]]:
        """Seconds a call of each contender, given as one call an input set: percentiles, method, repetitions.

        A contender that cannot be captured is timed by events, and its entry says so.
        """
        once: dict[str, Callable[[], float]] = {}
        methods: dict[str, str] = {}
        for name, calls in contenders.items():
            once[name], methods[name] = self._timer(list(calls), small, host)
        rounds = {name: self._rounds(timer, 3 if host else FEWEST) for name, timer in once.items()}
        seconds: dict[str, list[float]] = {name: [] for name in once}
        for index in range(max(rounds.values(), default=0)):
            for name, timer in once.items():
                if index < rounds[name]:
                    seconds[name].append(timer())
        return {
            name: {**asdict(Timing.of(series)), "method": methods[name], "repetitions": len(series)}
            for name, series in seconds.items()
        }

    def _rounds(self, timer: Callable[[], float], fewest: int) -> int:
        if self.smoke:
            return 1
        return max(fewest, min(MOST, int(self.seconds / max(timer(), 1e-6))))

    def _timer(self, calls: list[Call], small: bool, host: bool) -> tuple[Callable[[], float], str]:
        """A function that times one call, and how it does."""
        for call in calls[:1] * (1 if self.smoke or host else WARM_UP) + calls[1:]:
            call()
        if self.device.type != "cuda" or host:
            return self._by_clock(calls[0]), "clock"
        if small:
            try:
                return self._by_graph(calls), "graph"
            except Exception:  # what cannot be captured raises many kinds
                torch.cuda.synchronize(self.device)
        return self._by_events(calls), "events"

    def _by_clock(self, call: Call) -> Callable[[], float]:
        def timer() -> float:
            start = clock(self.device)
            call()
            return clock(self.device) - start

        return timer

    def _by_events(self, calls: list[Call]) -> Callable[[], float]:
        """Between two events, behind a flush of the cache during which the host runs ahead."""
        state = {"next": 0}
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timer() -> float:
            call = calls[state["next"] % len(calls)]
            state["next"] += 1
            self._other.sum()  # read, not written: what is left in the cache need not go back to memory
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return timer

    def _by_graph(self, calls: list[Call]) -> Callable[[], float]:
        """A captured pass over all input sets, which together outgrow the cache, replayed; seconds a call."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timer() -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / len(calls)

        return timer


def ceilings(device: torch.device, smoke: bool = False) -> dict[str, float]:
    """What this device reaches: bytes a second read and copied, operations a second of a matrix product.

    The best median of a few ways to do each, on random data.
    """
    on_cpu = device.type != "cuda"
    elements, side = (2**26, 1024) if on_cpu else (2**30, 8192)
    if smoke:
        elements, side = 2**18, 128
    dtype = torch.float32 if on_cpu else torch.bfloat16
    watch = Stopwatch(device, 0.0 if smoke else 0.2, smoke)

    def best(work: int, *calls: Call) -> float:
        timed = watch.series({str(index): [call] for index, call in enumerate(calls)}, small=False, host=False)
        return work / min(entry["p50"] for entry in timed.values())

    def streamed() -> dict[str, float]:
        x = torch.randn(elements, device=device)  # 4 GiB, 256 MiB on a CPU
        y = torch.empty_like(x)
        reads = (x.sum, x.amax, lambda: x.view(2048, -1).sum(1))
        copies = (lambda: y.copy_(x), lambda: torch.neg(x, out=y))
        return {
            "read_bytes_per_second": best(4 * elements, *reads),
            "copy_bytes_per_second": best(8 * elements, *copies),
        }

    found = streamed()
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    found["matmul_flop_per_second"] = best(2 * side**3, lambda: F.linear(a, b), lambda: a @ b)
    return found


def floor(reads: int, writes: int, flop: int, limits: Mapping[str, float]) -> tuple[float, str]:
    """(seconds that no implementation beats by much, the ceiling that says so: read, copy or matmul)."""
    # Nearly pure reading has a ceiling of its own, below that of a copy on some devices.
    kind = "read" if writes * 10 < reads else "copy"
    memory = (reads + writes) / limits[f"{kind}_bytes_per_second"]
    matrix = flop / limits["matmul_flop_per_second"]
    return (matrix, "matmul") if matrix > memory else (memory, kind)
