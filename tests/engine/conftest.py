"""Pages have 32 tokens instead of 256, or what a test's module says, so that short sequences have several."""

from collections.abc import Iterator

import pytest
from tritium.runtime import batch, decoding, fused, kv_cache, persistent, steps
from tritium.runtime.engine import engine, rounds

from tests.runtime.conftest import wide_tiles  # noqa: F401 - a fixture

PAGE = 32


@pytest.fixture(autouse=True, scope="module")
def small_pages(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch, decoding, fused, kv_cache, persistent, steps, engine, rounds):
            patch.setattr(module, "PAGE_SIZE", getattr(request.module, "PAGE", PAGE))
        yield
