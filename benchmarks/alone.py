"""The benchmarks that run alone, on a CPU too, and write results files of their own."""

from typing import Any

from . import decode, loading, quantised

ALONE = {"decode": decode, "loading": loading, "quantised": quantised}


def summary(found: dict[str, Any]) -> str:
    """Such a file as a table, by what its rows have."""
    row = found["results"][0]
    return (loading if "load_seconds" in row else quantised if "divergence" in row else decode).summary(found)
