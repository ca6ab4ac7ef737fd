"""Modules of packages that Tritium does not ask for: they are there where somebody comes from them."""

import importlib
from functools import partial
from typing import Any

from ..errors import TritiumError


def module_of(package: str, requirement: str, module: str) -> Any:
    """A module of a package. Raises TritiumError, with what to install, where that is absent or too old to have it."""
    try:
        return importlib.import_module(f"{package}.{module}")
    except ImportError as error:
        raise TritiumError(f"needs {package} with {module}: pip install '{requirement}' ({error})") from None


theirs = partial(module_of, "transformers", "transformers>=5.17")
