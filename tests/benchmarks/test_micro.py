"""Each small call under pytest-benchmark, after its gate: `pytest tests/benchmarks/test_micro.py --benchmark-enable`.

In Triton's interpreter tiny shapes run once, as plain tests; on a GPU, with `-m gpu`, those of models.
"""

from typing import Any

import pytest
import torch
from tritium.benchmarks.case import Case, Draw, wrong
from tritium.benchmarks.measure import SMALL
from tritium.benchmarks.suite import KERNELS
from tritium.benchmarks.worker import find

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TINY = [(kernel, case) for kernel in KERNELS for case in find(kernel, smoke=True).values()]
ON_GPU = [(kernel, case) for kernel in KERNELS for case in find(kernel, smoke=False).values() if case.moved < SMALL]


def measure(benchmark: Any, case: Case) -> None:
    with torch.inference_mode():
        assert wrong(case, case.ours, DEVICE, seed=7) is None
        call = case.ours(*case.make(Draw(DEVICE, 8)))

        def finished() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(finished)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="shapes for the interpreter")
@pytest.mark.parametrize(("kernel", "case"), TINY, ids=[f"{kernel}: {case.name}" for kernel, case in TINY])
def test_interpreted(benchmark: Any, kernel: str, case: Case) -> None:
    measure(benchmark, case)


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "case"), ON_GPU, ids=[f"{kernel}: {case.name}" for kernel, case in ON_GPU])
def test_on_gpu(benchmark: Any, kernel: str, case: Case) -> None:
    measure(benchmark, case)
