"""Pages have 32 tokens instead of 256, or what a test's module says, so that short sequences have several."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tritium.runtime import batch, decoding, fused, kv_cache, persistent, steps
from tritium.runtime.engine import engine, rounds

from tests.runtime.conftest import wide_tiles  # noqa: F401 - a fixture

HERE = Path(__file__).parent
PAGE = 32


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Around each test here, its module's fixtures included. A fixture of a module would go on into others' tests where
    several processes take tests from one another.
    """
    if item.path.parent != HERE:  # pytest calls this for every test there is
        return (yield)
    size = getattr(item.getparent(pytest.Module).module, "PAGE", PAGE)  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch, decoding, fused, kv_cache, persistent, steps, engine, rounds):
            patch.setattr(module, "PAGE_SIZE", size)
        return (yield)
