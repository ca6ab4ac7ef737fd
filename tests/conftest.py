"""Shared fixtures. Tests run against the checkout, as `tritium`."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels are decorated for the one or the other
    os.environ["TRITON_INTERPRET"] = "1"
    from . import interpreter

    interpreter.install()

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what poisoned memory asks of the vendor's matmuls
# Tiny models gain nothing from threads, and lose much to them when several tests or programs share the cores.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need one and are deselected without it, not skipped one by one.

    With one, the tests that otherwise run in the interpreter (they take tests/rule.py's device) are GPU tests too.
    Tests marked `long` are spread evenly, as each of several workers begins with a stretch of the list.
    """
    if torch.cuda.is_available():
        for item in items:
            folders = item.path.relative_to(config.rootpath).parts
            if "benchmarks" not in folders and {"DEVICE", "draw"} & set(dir(getattr(item, "module", None))):
                item.add_marker("gpu")
        return
    kept = [item for item in items if "gpu" not in item.keywords]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if "gpu" in item.keywords])
    longest = [item for item in kept if "long" in item.keywords]
    items[:] = [item for item in kept if "long" not in item.keywords]
    for index, item in reversed(list(enumerate(longest))):
        items.insert(index * len(kept) // len(longest), item)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (integers: the largest), so that whatever a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
    torch.cuda.empty_cache()  # several processes may test on one GPU
