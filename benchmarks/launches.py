"""What it costs that one phase follows another: a launch in a captured graph, a barrier within one launch."""

import torch
from torch import Tensor
from tritium.kernels.launch import INTERPRETED, launch, obstacle, tl, triton
from tritium.kernels.overlap import GRID, arrive, dependent, start, wait

from .case import Call
from .measure import Stopwatch, ceilings

LAUNCHES = 512  # in one graph
BARRIERS = 512  # in one launch
WARPS = 8


@triton.jit
def _tick_kernel(count_ptr, SYNC: tl.constexpr, PREFETCH: tl.constexpr):
    """Counts one further, once the kernel before it has done so."""
    start(SYNC)
    wait(count_ptr, 0, SYNC)
    tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def _barriers_kernel(arrivals_ptr, count):
    """`count` times, every program waits for all of them: arrivals_ptr is int32 and 0 at first."""
    programs = tl.num_programs(0)
    for turn in range(count):
        arrive(arrivals_ptr, GRID)
        wait(arrivals_ptr, (turn + 1) * programs, GRID)


def tick(count: Tensor) -> None:
    """Adds one to an int32 [1] by a kernel of its own, which begins as early as those of a decode step do."""
    launch(_tick_kernel, (1,), count, num_warps=1, **dependent(count.device, True))


def barriers(arrivals: Tensor, count: int, programs: int) -> None:
    """`count` barriers of so many programs, which must all have room on the device at once; arrivals int32 [1]."""
    arrivals.zero_()
    launch(_barriers_kernel, (programs,), arrivals, count, num_warps=WARPS)


def costs(watch: Stopwatch) -> dict[str, float]:
    """`launch_seconds` of a kernel that does next to nothing and waits for the one before it, the best of torch's and
    ours; `barrier_seconds` across a program on every multiprocessor, where Triton drives the device.

    On a CPU a launch is the call of an operation.
    """
    device, many = watch.device, 2 if watch.smoke else LAUNCHES
    count = torch.zeros(1, dtype=torch.int32, device=device)
    triton_runs = obstacle(count.device) is None
    ways: dict[str, Call] = {"torch": lambda: count.add_(1)}
    if triton_runs and not INTERPRETED:
        ways["triton"] = lambda: tick(count)
    # Each a graph of `many` in a row, of which none can begin its work before the one before it has ended.
    timed = [watch.series({name: [call] * many}, small=True, host=False)[name]["p50"] for name, call in ways.items()]
    found = {"launch_seconds": min(timed)}
    if triton_runs:
        programs = 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
        turns = 2 if INTERPRETED else BARRIERS
        # The difference of two lengths: the launch itself, and zeroing the counter, are in both.
        calls: dict[str, list[Call]] = {
            "one": [lambda: barriers(count, turns, programs)],
            "two": [lambda: barriers(count, 2 * turns, programs)],
        }
        each = watch.series(calls, small=True, host=False)
        found["barrier_seconds"] = max(0.0, each["two"]["p50"] - each["one"]["p50"]) / turns
    return found


def limits(device: torch.device, smoke: bool = False) -> dict[str, float]:
    """All that floors divide by: the ceilings of measure.py, and the costs of launches and barriers."""
    found = ceilings(device, smoke)
    return {**found, **costs(Stopwatch(device, 0.0 if smoke else 0.1, smoke))}
