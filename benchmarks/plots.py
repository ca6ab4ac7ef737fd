"""A picture of a results file: each case's share of its ceiling, a panel an operation, with the best peer beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(record: Mapping[str, Any], path: Path) -> str:
    """Writes a PNG file; what was done, in a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: it needs matplotlib (pip install matplotlib)"
    panels = _panels(record)
    if not panels:
        return "no plot: nothing was measured"
    heights = [0.9 + 0.28 * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (operation, rows) in zip(axes, panels.items(), strict=True):
        places = range(len(rows))
        axis.barh([at - 0.2 for at in places], [ours for _, ours, _ in rows], 0.38, label="Tritium")
        axis.barh([at + 0.2 for at in places], [peer for _, _, peer in rows], 0.38, label="best peer", color="0.7")
        axis.set_yticks(places, [name for name, _, _ in rows], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1.0, color="k", linewidth=0.8)
        axis.set_title(operation, fontsize=9, loc="left")
    axes[0].legend(fontsize=8)
    where = record["environment"]
    axes[-1].set_xlabel(
        f"share of the measured ceiling; {where['device']}, {where['date']}, commit {where['commit']}", fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    return f"plot: {path}"


def _panels(record: Mapping[str, Any]) -> dict[str, list[tuple[str, float, float]]]:
    """Operation -> (case, our share of the ceiling, the best peer's)."""
    panels: dict[str, list[tuple[str, float, float]]] = {}
    for key, row in record["rows"].items():
        if row["status"] == "measured":
            operation, _, case = key.partition(": ")
            share = row["share_of_ceiling"]
            peer = share / row["ratios"][row["best_peer"]] if row["best_peer"] else 0.0
            panels.setdefault(operation, []).append((case, share, peer))
    return panels
