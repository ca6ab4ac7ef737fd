"""The results file: written after every case, so that a run can be cut short and taken up again."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritium.runtime.errors import TritiumError
from tritium.runtime.files import read_json

from .harness import table
from .machine import PARTS

RESULTS = Path(__file__).resolve().parent / "results"
BAD = ("wrong", "failed", "timed out")


def file_of(device_name: str) -> Path:
    """Where the results of a GPU live: `NVIDIA H200` -> results/nvidia-h200.json."""
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def read(path: Path) -> dict[str, Any]:
    """A record from a file, or an empty one where there is none. Raises TritiumError for a file of another kind."""
    if not path.exists():
        return {"rows": {}}
    found = read_json(path)
    if "rows" not in found:
        raise TritiumError(f"{path}: not a record of the operations' benchmarks; it has no `rows`")
    return found


class Record:
    """The environment, ceilings, tests and rows of one device's results. A row is named `operation: case`."""

    def __init__(self, path: Path, environment: Mapping[str, Any], fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.values = read(path)
        self.values["environment"] = {**environment, "fingerprint": fingerprint}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.values["rows"]

    def done(self, key: str) -> bool:
        """Whether this row was measured with the code as it is now."""
        row = self.rows.get(key, {})
        return row.get("status") == "measured" and row.get("fingerprint") == self.fingerprint

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Adds a row and saves. A figure, even of older code, gives way to a new one or to a defect, not to a check."""
        if row["status"] in ("right", "skipped") and self.rows.get(key, {}).get("status") == "measured":
            return
        origin = {"commit": self.values["environment"].get("commit"), "fingerprint": self.fingerprint}
        self.rows[key] = {**row, **origin, "date": self.values["environment"].get("date")}
        self.save()

    def note(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.save()

    def save(self) -> None:
        save(self.path, self.values)


def save(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a results file, whole or not at all. Raises TritiumError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise TritiumError(f"{path}: cannot be written ({error.strerror}); name a file by --json") from None


def order(keys: Iterable[str], prior: Mapping[str, Any]) -> list[str]:
    """What is to be timed, and when: first what no results file of this device has."""
    return sorted(keys, key=lambda key: prior.get(key, {}).get("status") == "measured")


def rate(row: Mapping[str, Any]) -> str:
    if "tokens_per_second" in row:
        return f"{row['tokens_per_second']:.0f} tok/s"
    if row["ceiling"] == "matmul":
        return f"{row['achieved_per_second'] / 1e12:.1f} TFLOP/s"
    return f"{row['achieved_per_second'] / 1e9:.1f} GB/s"


def ceilings(limits: Mapping[str, float]) -> str:
    """What was measured of the machine, in a line."""
    costs = {name: limits[f"{name}_seconds"] for name in ("launch", "barrier") if f"{name}_seconds" in limits}
    return (
        f"ceilings: read {limits['read_bytes_per_second'] / 1e9:.0f} GB/s, copy "
        f"{limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"matmul {limits['matmul_flop_per_second'] / 1e12:.2f} TFLOP/s"
        + "".join(f", {name} {seconds * 1e6:.2f} us" for name, seconds in costs.items())
    )


def gaps(head: Sequence[str], rows: Sequence[tuple[Sequence[str], float, Mapping[str, Any]]]) -> str:
    """Decode steps beside their floors: (what stands in the columns of `head`, microseconds, Gap.as_dict()) each.

    Parts that are nothing in every row are left out.
    """
    shown = [part for part in PARTS if any(gap["parts_us"][part] >= 0.05 for _, _, gap in rows)]
    lines = [(*head, "us", "floor", "share", *shown, "unexplained", "largest")]
    for labels, taken, gap in rows:
        numbers = [gap["parts_us"][part] for part in shown] + [gap["unexplained_us"]]
        figures = (f"{number:.1f}" for number in (taken, gap["floor_us"]))
        parts = (f"{number:.1f}" for number in numbers)
        lines.append((*labels, *figures, f"{gap['share_of_floor']:.0%}", *parts, gap["largest"]))
    return table(lines)


def summary(record: Mapping[str, Any]) -> str:
    """The rows as tables, one an operation, then what is wrong and which peers were not there."""
    rows = record["rows"]
    parts = []
    absent: dict[tuple[str, str], int] = {}  # (operation: peer, why) -> cases
    for operation in dict.fromkeys(key.partition(": ")[0] for key in rows):
        lines = [(operation, "us", "achieved", "of ceiling", "best peer", "peer/ours", "others")]
        for key, row in rows.items():
            name, _, case = key.partition(": ")
            if name != operation or row["status"] != "measured":
                continue
            for peer, why in row["absent"].items():
                absent[f"{operation}: {peer}", why] = absent.get((f"{operation}: {peer}", why), 0) + 1
            ratios = {peer: f"{ratio:.2f}" for peer, ratio in row["ratios"].items()}
            best = row["best_peer"]
            others = ", ".join(f"{peer} {ratio}" for peer, ratio in ratios.items() if peer != best)
            if peaks := row.get("peak_bytes"):
                others += "; peak GiB: " + ", ".join(f"{who} {size / 2**30:.1f}" for who, size in peaks.items())
            share = f"{row['share_of_ceiling']:.0%} {row['ceiling']}"
            timing = f"{row['times']['tritium']['p50']:.1f}"
            lines.append((case, timing, rate(row), share, best or "-", ratios.get(best, "-"), others or "-"))
        if len(lines) > 1:
            parts.append(table(lines))
    steps = [((key.partition(": ")[2],), row["times"]["tritium"]["p50"], row["gap"]) for key, row in rows.items()
             if row["status"] == "measured" and "gap" in row]  # fmt: skip
    parts += [gaps(("steps, and what the floor of each is made of",), steps)] if steps else []
    unmeasured = [f"{key}: {row['status']}, {row.get('reason', 'not timed yet')}" for key, row in rows.items()
                  if row["status"] != "measured"]  # fmt: skip
    now = record["environment"].get("fingerprint")
    older = [f"{key}: of {row['commit']}, {row['date']}, older code" for key, row in rows.items()
             if row["status"] == "measured" and row["fingerprint"] != now]  # fmt: skip
    parts += ["\n".join(older)] if older else []
    parts += ["\n".join(unmeasured)] if unmeasured else []
    parts += ["\n".join(f"absent: {peer}, {n} cases ({why})" for (peer, why), n in absent.items())] if absent else []
    where = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    limits = record.get("ceilings")
    if limits:
        parts.append(ceilings(limits))
    if tests := record.get("tests"):
        parts.append(f"tests on this device: {tests['summary']}")
    if where.get("smoke"):
        parts.append("a trial of the benchmark itself, in Triton's interpreter: none of these times means anything")
    parts.append(f"{where['device']}; {versions}; commit {where['commit']}; {where['date']}")
    return "\n\n".join(parts)
