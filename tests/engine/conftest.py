"""In the interpreter pages have 32 tokens instead of 256, so that short sequences have several."""

from collections.abc import Iterator

import pytest
from tritium.runtime import batch, decoding, fused, kv_cache, persistent, steps
from tritium.runtime.engine import engine, rounds

from tests.rule import DEVICE
from tests.runtime.conftest import wide_tiles  # noqa: F401 - a fixture

PAGE = 256 if DEVICE == "cuda" else 32  # the smallest that the key tiles fit


@pytest.fixture(autouse=True, scope="package")
def small_pages() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (batch, decoding, fused, kv_cache, persistent, steps, engine, rounds):
            patch.setattr(module, "PAGE_SIZE", PAGE)
        yield
