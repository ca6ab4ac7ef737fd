"""The tuning tables as the tuner handles them: overridden while launchers run, and rewritten where they stand."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from tritium.kernels import tuning

Use = Mapping[str, Any]
Row = tuple[str, str, int]  # kernel, table, index


@contextmanager
def overriding(row: Row | None = None, use: Use | None = None) -> Iterator[set[Row]]:
    """Within it, launchers get `use` where the tables say `row`; gives the rows that were taken."""
    taken: set[Row] = set()
    original = tuning.config

    @functools.cache
    def looked_up(arch: str, kernel: str, key: tuple[tuple[str, Any], ...]) -> tuple[dict[str, Any], set[Row]]:
        merged: dict[str, Any] = {}
        rows = set()
        for table in tuning.TABLES:
            if entries := tuning.load(arch)[kernel].get(table):
                here = kernel, table, tuning.find(arch, kernel, table, key)
                rows.add(here)
                merged |= use if here == row and use is not None else entries[here[2]]["use"]
        return merged, rows

    def config(kernel: str, device: torch.device, **key: Any) -> Mapping[str, Any]:
        merged, rows = looked_up(tuning.architecture(device), kernel, tuple(sorted(key.items())))
        taken.update(rows)
        return merged

    tuning.config = config
    try:
        yield taken
    finally:
        tuning.config = original


def flow(use: Use) -> str:
    """A configuration as the tables write it: {ROWS: 1, num_warps: 4}."""
    return f"{{{', '.join(f'{name}: {_scalar(value)}' for name, value in use.items())}}}"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).partition("\n")[0]


def rewritten(text: str, row: Row, use: Use) -> str:
    """The file with one row's values replaced where they stand: everything else keeps every character."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert node is not None
    kernel, table, index = row
    entry = _under(_under(node, kernel), table).value[index]
    places = [
        (value.start_mark.index, value.end_mark.index, use[name.value]) for name, value in _under(entry, "use").value
    ]
    for start, end, value in sorted(places, reverse=True):
        if yaml.safe_load(text[start:end]) != value:
            text = text[:start] + _scalar(value) + text[end:]
    return text


def _under(node: Any, key: str) -> Any:
    return next(value for name, value in node.value if name.value == key)


def forget() -> None:
    """Makes the tables be read anew."""
    tuning.load.cache_clear()
    tuning._merged.cache_clear()
