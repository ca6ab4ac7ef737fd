"""The tuner with a clock that the tests wind: what it picks, what it drops, what it writes."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from tritium.benchmarks import rehearsal, tables, tune
from tritium.benchmarks.case import Call, Case
from tritium.benchmarks.worker import find
from tritium.kernels import tuning
from tritium.runtime.errors import TritiumError

CPU = torch.device("cpu")
TABLES = """\
# A comment at the top.

first: # beside a name
  order:
    - use: {B: 1}
  schedule:
    - when: {rows: "<=4"} # few rows
      use: {SIZE: 64, num_warps: 4} # chosen by hand
    - use:
        SIZE: 128   # block style
        FLAG: false

second:
  schedule:
    - use: {SIZE: 64, num_warps: 4}
"""
SWEEP = {"first": {"order": {"B": [1, 2]}, "schedule": {"SIZE": [32, 64, 128, 256], "num_warps": [4, 8]}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Tables of the test's own for every architecture."""
    (tmp_path / "sm_90.yaml").write_text(TABLES)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "sweep", lambda: SWEEP)
    tables.forget()
    yield tmp_path
    monkeypatch.undo()
    tables.forget()


def options(rows: int) -> dict[str, Any]:
    return dict(tuning.config("first", CPU, rows=rows))


def case(rows: int, result: Callable[[Tensor, dict[str, Any]], Tensor] = lambda x, use: x) -> Case:
    """A kernel of one row's worth that gives what `result` says under the configuration of the moment."""

    def ours(x: Tensor) -> Call:
        return lambda: result(x, options(rows))

    return Case(f"rows {rows}", lambda draw: (draw.normal(rows),), ours, lambda x: x, 8 * rows, 8 * rows, 0)


def run(
    clock: Callable[[dict[str, Any]], float], *cases: Case, rows: int = 2, **how: bool
) -> tuple[dict[tables.Row, tune.Outcome], list[str]]:
    said: list[str] = []
    tuner = tune.Tuner(CPU, lambda calls, small: clock(options(rows)))
    outcomes = tune.run(tuner, ["first"], lambda kernel: cases, tell=said.append, **how)
    return {outcome.row: outcome for outcome in outcomes}, said


def test_the_fastest_is_written_and_nothing_else(folder: Path) -> None:
    found, said = run(lambda use: 1 / use["SIZE"] + 0.001 * use.get("num_warps", 0), case(2))
    outcome = found["first", "schedule", 0]
    assert outcome.after == {"SIZE": 256, "num_warps": 4}
    assert (outcome.tried, outcome.dropped, outcome.cases) == (7, {}, 1)
    expected = TABLES.replace("{SIZE: 64, num_warps: 4} # chosen", "{SIZE: 256, num_warps: 4} # chosen")
    assert (folder / "sm_90.yaml").read_text() == expected
    assert options(2)["SIZE"] == 256  # the tables were read anew
    assert "no case takes it" in said[1]
    assert ("first", "order", 0) not in found


def test_a_small_gain_changes_nothing(folder: Path) -> None:
    found, said = run(lambda use: 1.0 if use["SIZE"] == 64 else 0.985, case(2))
    assert not found["first", "schedule", 0].changed
    assert (folder / "sm_90.yaml").read_text() == TABLES
    assert "stays" in said[0]


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    found, _ = run(lambda use: 1 / use["SIZE"], case(2), dry_run=True)
    assert found["first", "schedule", 0].changed
    assert (folder / "sm_90.yaml").read_text() == TABLES


def test_what_raises_or_changes_a_bit_is_dropped(folder: Path) -> None:
    def result(x: Tensor, use: dict[str, Any]) -> Tensor:
        if use["SIZE"] == 256:
            raise RuntimeError("out of resource: shared memory")
        return x if use["SIZE"] != 128 else torch.nextafter(x, x + 1)

    found, _ = run(lambda use: 1 / use["SIZE"], case(2, result))
    outcome = found["first", "schedule", 0]
    assert not outcome.changed
    assert len(outcome.dropped) == 4
    assert "shared memory" in outcome.dropped["{SIZE: 256, num_warps: 8}"]
    assert outcome.dropped["{SIZE: 128, num_warps: 4}"] == "rows 2: other bits"


def test_orders_only_where_asked_for_and_by_the_rule(folder: Path) -> None:
    """Another order may change bits, as far as the rule lets it."""
    found, _ = run(lambda use: 1 / use["B"], case(2, lambda x, use: x * (1 + 1e-8 * use["B"])), order=True)
    assert found["first", "order", 0].after == {"B": 2}
    assert yaml.safe_load((folder / "sm_90.yaml").read_text())["first"]["order"] == [{"use": {"B": 2}}]
    (folder / "sm_90.yaml").write_text(TABLES)
    tables.forget()
    found, _ = run(lambda use: 1 / use["B"], case(2, lambda x, use: x + 0.1 * (use["B"] - 1)), order=True)
    assert not found["first", "order", 0].changed
    assert "largest error" in found["first", "order", 0].dropped["{B: 2}"]


def test_a_row_is_judged_by_all_its_cases(folder: Path) -> None:
    found, _ = run(lambda use: 1 / use["SIZE"], case(2), case(3), case(9))
    assert found["first", "schedule", 0].cases == 2
    assert found["first", "schedule", 1].cases == 1


def test_many_combinations_are_searched_by_argument(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [2**power for power in range(5, 12)]
    monkeypatch.setattr(tune, "sweep", lambda: {"first": {"schedule": {"SIZE": sizes, "num_warps": [1, 2, 4, 8, 16]}}})
    # The best number of warps depends on the size: found in the second pass.
    found, _ = run(lambda use: abs(use["SIZE"] - 512) + abs(use.get("num_warps", 0) - use["SIZE"] / 64) + 1, case(2))
    outcome = found["first", "schedule", 0]
    assert outcome.after == {"SIZE": 512, "num_warps": 8}
    assert outcome.tried < len(sizes) * 5


def test_candidates_are_rehearsed_once(folder: Path) -> None:
    """All that are not known yet, before the first of them is timed; what fails there is never timed."""
    seen: list[str] = []

    def rehearse(row: tables.Row, candidates: Sequence[tables.Use], cases: Sequence[Case]) -> dict[str, str]:
        assert (row, [one.name for one in cases]) == (("first", "schedule", 0), ["rows 2"])
        seen.extend(map(tables.flow, candidates))
        return {"{SIZE: 256, num_warps: 4}": "its process ended"}

    def clock(use: dict[str, Any]) -> float:
        assert use != {"B": 1, "SIZE": 256, "num_warps": 4}
        return 1 / use["SIZE"] + 0.0001 * use.get("num_warps", 0)

    tuner = tune.Tuner(CPU, lambda calls, small: clock(options(2)), rehearse=rehearse)
    (outcome, _) = tune.run(tuner, ["first"], lambda kernel: [case(2)], tell=lambda text: None)
    assert len(seen) == len(set(seen)) == 7
    assert outcome.after == {"SIZE": 256, "num_warps": 8}
    assert outcome.dropped == {"{SIZE: 256, num_warps: 4}": "its process ended"}


def test_a_rehearsal_survives_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def start() -> ThreadPoolExecutor:
        started.append(1)
        return ThreadPoolExecutor(1)

    def play(row: tables.Row, use: tables.Use, names: Sequence[str], device: str) -> str | None:
        if use["B"] == 2:
            raise BrokenProcessPool
        return "does not fit" if use["B"] == 3 else None

    monkeypatch.setattr(rehearsal.Rehearsal, "_start", staticmethod(start))
    monkeypatch.setattr(rehearsal, "_play", play)
    rehearse = rehearsal.Rehearsal(CPU)
    row = "first", "order", 0
    assert rehearse(row, [{"B": 1}, {"B": 3}], []) == {"{B: 3}": "does not fit"}
    assert rehearse(row, [{"B": 2}, {"B": 1}], []) == {"{B: 2}": "its process ended"}
    assert rehearse(row, [{"B": 1}], []) == {}
    assert len(started) == 2
    rehearse.close()


def test_a_part_is_played_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real launcher under a configuration: what raises is told, and a broken device ends all of this process."""
    monkeypatch.setattr(rehearsal, "find", lambda operation, smoke: find(operation, smoke=True))
    row = "swiglu", "schedule", 0
    assert rehearsal._play(row, {"BLOCK_F": 32, "num_warps": 4}, ["3 x 48"], "cpu") is None
    assert "power of 2" in str(rehearsal._play(row, {"BLOCK_F": 24, "num_warps": 4}, ["3 x 48"], "cpu"))
    monkeypatch.setattr(rehearsal, "_lost", ["CUDA error"])
    assert rehearsal._play(row, {"BLOCK_F": 24, "num_warps": 4}, ["3 x 48"], "cpu") is None


def test_a_wrong_or_broken_start_stops_it(folder: Path) -> None:
    with pytest.raises(TritiumError, match="wrong before anything is varied"):
        run(lambda use: 1.0, case(2, lambda x, use: x + 1))

    def dead(x: Tensor, use: dict[str, Any]) -> Tensor:
        if use["SIZE"] == 32:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return x

    with pytest.raises(TritiumError, match="SIZE: 32, num_warps: 4} broke the device"):
        run(lambda use: 1.0, case(2, dead))


def test_no_time_left(folder: Path) -> None:
    tuner = tune.Tuner(CPU, lambda calls, small: 1.0, deadline=0.0)
    said: list[str] = []
    assert tune.run(tuner, ["first"], lambda kernel: [case(2)], tell=said.append) == []
    assert said == ["the time is up: the rest stays as it is"]


def test_block_style_and_flags_are_rewritten_in_place() -> None:
    text = tables.rewritten(TABLES, ("first", "schedule", 1), {"SIZE": 32, "FLAG": True})
    assert text == TABLES.replace("128   # block", "32   # block").replace("FLAG: false", "FLAG: true")


def test_real_kernels_are_tuned_in_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the shipped tables: launchers see what is tried, rows are found, what cannot compile is dropped."""
    for path in tuning.FOLDER.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    values = {"BLOCK_F": [32, 24]}  # a block of 24 is no power of two
    monkeypatch.setattr(tune, "sweep", lambda: {"swiglu": {"schedule": values}})
    tables.forget()
    path = tmp_path / f"{tuning.architecture(CPU)}.yaml"
    before = path.read_text()
    key = {"rows": 3, "itemsize": 4}

    def timer(calls: list[Call], small: bool) -> float:
        calls[0]()
        return float(tuning.config("swiglu", CPU, **key)["BLOCK_F"])

    smoke = list(find("swiglu", smoke=True).values())
    try:
        with torch.inference_mode():
            tuner = tune.Tuner(CPU, timer)
            outcome, *others = tune.run(tuner, ["swiglu"], lambda kernel: smoke, tell=lambda text: None)
        assert outcome.after["BLOCK_F"] == 32
        assert len(outcome.dropped) == 1
        assert all(other.cases == 0 for other in others)
        changed = [(a, b) for a, b in zip(before.splitlines(), path.read_text().splitlines(), strict=True) if a != b]
        assert len(changed) == 1
        assert "BLOCK_F: 32" in changed[0][1]
    finally:
        monkeypatch.undo()
        tables.forget()


def test_the_sweep_names_what_the_tables_have() -> None:
    """Would break: a launch argument was renamed, and is never varied again."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in tuning.FOLDER.glob("*.yaml"):
        for kernel, kinds in tuning.load(path.stem).items():
            for kind, rows in kinds.items():
                found.setdefault((kernel, kind), set()).update(*(row["use"] for row in rows))
    swept = {(kernel, kind): set(values) for kernel, kinds in tune.sweep().items() for kind, values in kinds.items()}
    assert set(found) == set(swept)
    for place, names in found.items():
        assert names - swept[place] <= {"maxnreg", "matrix_instr_nonkdim"}, place
        assert swept[place] - names == set(), place


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "it needs a GPU" in capsys.readouterr().err
    assert tune.main(["--kernel", "linaer"]) == 2
    assert "did you mean linear" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        tune.main(["--help"])
    assert "--dry-run" in capsys.readouterr().out
