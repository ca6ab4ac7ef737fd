"""The definition of a step's end: against the same said row by row in Python."""

from typing import Any

import torch
from torch import Tensor
from tritium.kernels.advance import NOTHING, advance_reference

PAGE, STEPS, STOPS = 16, 3, [7, 9]


def state(rows: int = 4, at: int = 14, device: str = "cpu") -> dict[str, Any]:
    """Rows that stand at `at`, at + 1 ...; page tables in no order; nothing has ended."""
    positions = torch.arange(at, at + rows, device=device)
    table = torch.randperm(4 * rows, generator=torch.Generator().manual_seed(rows)).view(rows, 4)
    return {
        "tokens": torch.arange(100, 100 + rows, device=device),
        "positions": positions,
        "lengths": (positions + 1).to(torch.int32),
        "slots": torch.full((rows,), -5, device=device),
        "page_table": table.to(torch.int32).to(device),
        "page_size": PAGE,
        "ended": torch.zeros(rows, dtype=torch.int32, device=device),
        "history": torch.full((STEPS, rows), -77, device=device),
        "step": torch.zeros(1, dtype=torch.int64, device=device),
        "stops": torch.tensor(STOPS, device=device),
        "angles": positions * 10,
        "uniforms": torch.arange(rows * STEPS, dtype=torch.float32, device=device).view(rows, STEPS),
        "uniform": torch.full((rows,), 0.5, device=device),
    }


# Rows: goes on; meets a stop at the first step; at the second; is broken at the second.
SAMPLED = [[3, 7, 4, 5], [6, 2, 9, -1], [8, 1, 1, 1], [5, 5, 5, 5]]


def said_row_by_row(before: dict[str, Any], sampled: list[list[int]]) -> dict[str, list[Any]]:
    rows = len(sampled[0])
    found = {
        name: before[name].tolist()
        for name in ("tokens", "positions", "lengths", "slots", "history", "angles", "ended")
    }
    for n, tokens in enumerate(sampled):
        for row in range(rows):
            if n < STEPS:
                found["history"][n][row] = NOTHING if found["ended"][row] else tokens[row]
            if found["ended"][row] or tokens[row] in STOPS or tokens[row] < 0:
                found["ended"][row], found["slots"][row] = 1, -1
                continue
            found["tokens"][row] = tokens[row]
            for name, by in (("positions", 1), ("lengths", 1), ("angles", 1)):
                found[name][row] += by
            at = found["positions"][row]
            found["slots"][row] = before["page_table"][row, at // PAGE].item() * PAGE + at % PAGE
    return found


def check(operation: Any, steps: int = STEPS, device: str = "cpu") -> dict[str, Tensor]:
    """Runs the operation and compares everything with what Python says; gives the state."""
    held = state(device=device)
    expected = said_row_by_row(held, SAMPLED[:steps])
    for n in range(steps):
        operation(torch.tensor(SAMPLED[n], device=device), **held)
        assert held["step"].item() == n + 1
        if n + 1 < STEPS:
            assert torch.equal(held["uniform"], held["uniforms"][:, n + 1])
    assert {name: held[name].tolist() for name in expected} == expected
    return held


def test_is_what_is_said() -> None:
    held = check(advance_reference)
    assert held["ended"].tolist() == [0, 1, 1, 1]
    assert held["history"][1].tolist() == [6, NOTHING, 9, -1]


def test_the_optional_parts_are_left_out() -> None:
    held = state()
    for name in ("angles", "uniforms", "uniform"):
        held[name] = None
    advance_reference(torch.tensor(SAMPLED[0]), **held)
    assert held["positions"].tolist() == [15, 15, 17, 18]
