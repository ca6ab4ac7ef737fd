"""The kernel of a step's end against its definition: every state to the bit, many rows, the last step, refusals."""

from typing import Any

import pytest
import torch
from tritium.kernels.advance import advance, advance_reference

from ..rule import DEVICE
from .test_advance import SAMPLED, STEPS, check, state


def test_is_the_definition() -> None:
    held = check(advance, device=DEVICE)
    again = check(advance_reference, device=DEVICE)
    assert all(torch.equal(held[name], again[name]) for name in held if isinstance(held[name], torch.Tensor))


@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("stops", [[], [0], [5, 2, 11]], ids=str)
def test_many_rows(rows: int, stops: list[int]) -> None:
    """More rows than a block holds; none, one and several stop tokens; rows that had ended before."""
    sampled = torch.arange(rows, device=DEVICE) % 13 - 1
    mine, theirs = state(rows, 3, DEVICE), state(rows, 3, DEVICE)
    for held, operation in ((mine, advance), (theirs, advance_reference)):
        held["positions"].remainder_(60)
        held["stops"] = torch.tensor(stops, dtype=torch.int64, device=DEVICE)
        held["ended"][::5] = 1
        operation(sampled, **held)
    for name, value in mine.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, theirs[name]), name


def test_a_step_too_many_is_not_noted() -> None:
    """Behind the last step nothing is written where it would not belong, and the last column of numbers stays."""
    room = torch.full((STEPS + 2, 4), -77, device=DEVICE)
    held = state(device=DEVICE)
    held["history"] = room[:STEPS]
    for n in range(4):
        advance(torch.tensor(SAMPLED[n], device=DEVICE), **held)
    assert room[STEPS:].eq(-77).all()
    assert torch.equal(held["uniform"], held["uniforms"][:, -1])
    assert held["step"].item() == 4


def test_no_rows() -> None:
    held = state(0, device=DEVICE)
    advance(torch.zeros(0, dtype=torch.int64, device=DEVICE), **held)
    assert held["step"].item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, r"lengths must be contiguous \[4\] torch.int32"),
        ({"history": torch.zeros(3, 5, dtype=torch.int64)}, "history must be contiguous"),
        ({"uniforms": None}, "uniforms and uniform come together"),
        ({"page_size": 0}, "there must be room"),
        ({"ended": torch.zeros(8, dtype=torch.int32)[::2]}, "ended must be contiguous"),
        ({"stops": torch.zeros(1, dtype=torch.int64, device="meta")}, "stops lies on meta"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    held = state(device=DEVICE)
    held |= {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        advance(torch.tensor(SAMPLED[0], device=DEVICE), **held)


def test_opcheck_and_compile() -> None:
    held = state(device=DEVICE)
    sampled = torch.tensor(SAMPLED[0], device=DEVICE)
    torch.library.opcheck(torch.ops.tritium.advance, (sampled, *held.values()))
    expected = state(device=DEVICE)
    advance_reference(sampled, **expected)
    compiled = torch.compile(lambda *args: torch.ops.tritium.advance(*args), backend="aot_eager", fullgraph=True)
    compiled(sampled, *held.values())
    assert torch.equal(held["slots"], expected["slots"])
    assert torch.equal(held["history"], expected["history"])
