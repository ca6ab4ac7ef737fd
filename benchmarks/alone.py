"""The benchmarks that run alone, on a CPU too, and write results files of their own."""

from typing import Any

from . import decode, loading, quantised, serving

ALONE = {"decode": decode, "loading": loading, "quantised": quantised, "serving": serving}


def summary(found: dict[str, Any]) -> str:
    """Such a file as a table, by what its rows have."""
    row = found["results"][0]
    marks = {"load_seconds": loading, "divergence": quantised, "contender": serving}
    return next((benchmark for mark, benchmark in marks.items() if mark in row), decode).summary(found)
