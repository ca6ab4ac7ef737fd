"""The benchmarks that run alone, on a CPU too, and write results files of their own."""

from typing import Any

from . import decode, loading

ALONE = {"decode": decode, "loading": loading}


def summary(found: dict[str, Any]) -> str:
    """Such a file as a table, by what its rows have."""
    return (loading if "load_seconds" in found["results"][0] else decode).summary(found)
