"""How a row of a tuning table is found: conditions, order, version bounds, architectures."""

from typing import Any

import pytest
import torch
from tritium.kernels import tuning


@pytest.mark.parametrize(
    ("condition", "inside", "outside"),
    [
        ("<=64", [1, 64], [65]),
        (">=64", [64, 65], [63]),
        ("<64", [63], [64]),
        (">64", [65], [64]),
        ([2, 4], [2, 4], [3]),
        (7, [7], [8]),
        (True, [True], [False]),
        (">=3.7", [(3, 7), (3, 10), (4, 0)], [(3, 6)]),
        ("<3.7", [(3, 6)], [(3, 7), (3, 10)]),
    ],
)
def test_conditions(condition: Any, inside: list[Any], outside: list[Any]) -> None:
    """Bounds at their borders; versions by their numbers, not as text."""
    assert [tuning.holds(condition, value) for value in inside] == [True] * len(inside)
    assert [tuning.holds(condition, value) for value in outside] == [False] * len(outside)


def test_rows_by_order_bound_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row that holds, of each table; rows for another Triton do not."""
    tables = {
        "k": {
            "order": [{"when": {"width": "<=8"}, "use": {"BLOCK_K": 1}}, {"use": {"BLOCK_K": 2}}],
            "schedule": [{"use": {"GROUP": 9}, "triton": ">=99"}, {"use": {"GROUP": 3}}, {"use": {"GROUP": 4}}],
        },
        "narrow": {"order": [{"when": {"width": 1}, "use": {}}]},
    }
    monkeypatch.setattr(tuning, "load", lambda arch: tables)
    tuning._merged.cache_clear()
    try:
        assert tuning._merged("none", "k", (("width", 8),)) == {"BLOCK_K": 1, "GROUP": 3}
        assert tuning._merged("none", "k", (("width", 9),)) == {"BLOCK_K": 2, "GROUP": 3}
        with pytest.raises(LookupError, match="no tables for other"):
            tuning._merged("none", "other", ())
        with pytest.raises(LookupError, match=r"no row of narrow\.order holds for {'width': 2}"):
            tuning._merged("none", "narrow", (("width", 2),))
    finally:
        tuning._merged.cache_clear()


def test_the_nearest_architecture() -> None:
    """Its own file, else the newest older one, else the oldest; any AMD GPU has one."""
    found = {name: tuning.nearest(name) for name in ("sm_90", "sm_89", "sm_75", "sm_103", "sm_120", "gfx90a", "gfx942")}
    assert found == {
        "sm_90": "sm_90", "sm_89": "sm_80", "sm_75": "sm_80", "sm_103": "sm_100", "sm_120": "sm_100",
        "gfx90a": "gfx942", "gfx942": "gfx942",
    }  # fmt: skip


def test_poisoned_memory_shows(poisoned: None) -> None:
    """The fixture that every kernel test stands on."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(8, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
