"""In the interpreter a program costs much and an element nothing: decode steps of whole models take wide tiles."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tritium.kernels import tuning
from tritium.kernels.launch import INTERPRETED, triton

WIDE = {"ROWS": 128, "BLOCK_N": 128}  # of the table's `schedule`: no bit depends on it


@pytest.fixture(autouse=True, scope="session")
def wide_tiles() -> Iterator[None]:
    config = tuning.config

    def widened(kernel: str, *args: Any, **key: Any) -> Any:
        found = config(kernel, *args, **key)
        return {**found, **WIDE} if kernel == "decode_linear" else found

    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch.setattr(tuning, "config", widened)
        yield


@pytest.fixture
def unguarded_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter reads its arguments on the host, as no GPU does."""
    if INTERPRETED:
        original = triton.runtime.interpreter.GridExecutor.__call__

        def unguarded(self: Any, *args: Any, **options: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():
                return original(self, *args, **options)

        monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", unguarded)
