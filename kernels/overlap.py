"""How one phase of a decode step follows another: device functions, and the launch options that go with them.

Not an operation. What a phase reads besides the results of the phase before (its weights, above all) it may ask for
before that phase has ended: it calls `start`, issues those loads, calls `wait`, and reads the rest only then. What
`wait` waits for is one of

    NONE       nothing: a stream runs one kernel after another
    DEPENDENT  the kernel before it in the stream, which was launched so that this one may start early: sm_90 and newer
    GRID       all programs of this very launch to have called `arrive`: the barrier of a step that is one launch
"""

from typing import Any

import torch

from .launch import INTERPRETED, tl, triton
from .tuning import architecture

try:
    from triton.language.extra import cuda as _cuda
except ImportError:  # no Triton here
    _cuda = None
gdc_launch_dependents: Any = getattr(_cuda, "gdc_launch_dependents", None)
gdc_wait: Any = getattr(_cuda, "gdc_wait", None)

NONE = tl.constexpr(0)
DEPENDENT = tl.constexpr(1)
GRID = tl.constexpr(2)


def dependent(device: torch.device, chained: bool) -> dict[str, Any]:
    """Launch options of a kernel that follows another in a stream: SYNC, and what lets it start early where it can.

    `chained` says that it may: what it reads before it waits was written before the launch in front of it.
    """
    arch = architecture(device)
    if not chained or INTERPRETED or not arch.startswith("sm_") or int(arch[3:]) < 90:
        return {"SYNC": 0, "PREFETCH": False}
    return {"SYNC": 1, "PREFETCH": True, "launch_pdl": True}


@triton.jit
def start(SYNC: tl.constexpr):
    """Lets the kernel behind this one start as soon as there is room for it."""
    if SYNC == DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(arrivals_ptr, target, SYNC: tl.constexpr):
    """Returns once the phase before has ended and its results can be read. GRID: once `target` arrivals are counted."""
    if SYNC == DEPENDENT:
        gdc_wait()
    if SYNC == GRID:
        while tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()


@triton.jit
def arrive(arrivals_ptr, SYNC: tl.constexpr):
    """GRID: counts this program's part of the phase as done, its stores included."""
    if SYNC == GRID:
        tl.debug_barrier()
        tl.atomic_add(arrivals_ptr, 1, sem="release", scope="gpu")


@triton.jit
def prefetch(pointers, PREFETCH: tl.constexpr):
    """Asks for the cache lines of these pointers (any shape) to be brought into the L2."""
    if PREFETCH:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )
