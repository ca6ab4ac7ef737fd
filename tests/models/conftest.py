"""As for tests/runtime: whole models run here too."""

from tests.runtime.conftest import wide_tiles

__all__ = ["wide_tiles"]
