"""Launch configurations as data: one YAML file a GPU architecture, written by hand or by `tritium tune`.

Each kernel has two tables of rows. `order` holds what fixes the order of summation (blocks along a reduction, warps of
a reduction, the class of matrix instruction) and is never keyed by how many tokens or rows there are, so that a
sequence's bits do not depend on its batch; `schedule` holds the rest. A row is

    - when: {width: "<=1024", itemsize: 2}     # every condition must hold: a value, a list of values, or a bound
      use: {ROWS: 4, num_warps: 4}             # launch arguments: constexprs, num_warps, num_stages
      triton: ">=3.7"                          # optional: versions of Triton for which the row stands

and the first row that holds is taken, one of each table.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ..launch import INTERPRETED, triton

FOLDER = Path(__file__).parent
TABLES = ("order", "schedule")
BATCH_KEYS = frozenset({"tokens", "rows", "queries", "programs", "outputs"})
"""What a `schedule` may be keyed by and an `order` may not."""


def architecture(device: torch.device) -> str:
    """The name of the file for a device, such as sm_90: its own, else the nearest older one, else the oldest.

    The interpreter runs the rows of sm_90; a meta tensor stands for whatever Triton's active driver drives.
    """
    if INTERPRETED:
        return "sm_90"
    if device.type == "meta":
        target = triton.runtime.driver.active.get_current_target()
        return nearest(target.arch if target.backend == "hip" else f"sm_{target.arch}")
    return _of_device(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _of_device(index: int) -> str:
    if torch.version.hip is not None:
        return nearest(torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return nearest(f"sm_{major}{minor}")


def nearest(name: str) -> str:
    """The file to use for an architecture: the newest that is not newer; gfx942 for any AMD GPU."""
    if not name.startswith("sm_"):
        return "gfx942"
    numbers = sorted(int(path.stem[3:]) for path in FOLDER.glob("sm_*.yaml"))
    return f"sm_{max((number for number in numbers if number <= int(name[3:])), default=numbers[0])}"


def config(kernel: str, device: torch.device, **key: Any) -> Mapping[str, Any]:
    """The launch arguments of `kernel` on `device` for a shape that `key` describes.

    Raises LookupError where no row holds.
    """
    return _merged(architecture(device), kernel, tuple(sorted(key.items())))


@functools.cache
def _merged(arch: str, kernel: str, key: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    tables = load(arch)
    if kernel not in tables:
        raise LookupError(f"kernels/tuning/{arch}.yaml has no tables for {kernel}")
    merged: dict[str, Any] = {}
    for table in TABLES:
        if rows := tables[kernel].get(table):
            merged |= rows[find(arch, kernel, table, key)]["use"]
    return merged


def find(arch: str, kernel: str, table: str, key: tuple[tuple[str, Any], ...]) -> int:
    """Which row of a table holds for `key`: its index."""
    values = dict(key)
    for index, row in enumerate(load(arch)[kernel][table]):
        if all(holds(condition, values[name]) for name, condition in row.get("when", {}).items()) and holds(
            row.get("triton", ">=0"), _version(triton.__version__)
        ):
            return index
    raise LookupError(f"kernels/tuning/{arch}.yaml: no row of {kernel}.{table} holds for {values}")


def holds(condition: Any, value: Any) -> bool:
    """Whether `value` is the condition, one of it, or within the bound that it states (`<=64`, `>=64`, `<3.7`)."""
    if isinstance(condition, list):
        return value in condition
    bound = re.fullmatch(r"(<=|>=|<|>)\s*([\d.]+)", condition) if isinstance(condition, str) else None
    if bound is None:
        return bool(value == condition)
    limit = _version(bound[2]) if isinstance(value, tuple) else float(bound[2])
    return {"<=": value <= limit, ">=": value >= limit, "<": value < limit, ">": value > limit}[bound[1]]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@functools.cache
def load(arch: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The tables of one architecture: kernel -> table -> rows."""
    tables: dict[str, dict[str, list[dict[str, Any]]]] = yaml.safe_load((FOLDER / f"{arch}.yaml").read_text("utf-8"))
    return tables
