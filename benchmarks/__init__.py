"""Timings against a floor and against peers, in the same run: `python -m tritium.benchmarks`."""
