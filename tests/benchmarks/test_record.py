"""What was measured, as a file, a table and a picture."""

import json
import sys
from pathlib import Path

import pytest
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import decode, plots, record

ROOT = Path(__file__).resolve().parents[2]

ROW = {
    "status": "measured", "times": {"tritium": {"p50": 20.0}, "A": {"p50": 30.0}, "B": {"p50": 25.0}},
    "ratios": {"A": 1.5, "B": 1.25}, "best_peer": "B", "share_of_ceiling": 0.8, "ceiling": "copy",
    "achieved_per_second": 2.5e12, "absent": {"C": "ImportError: no C"}, "commit": "abc", "date": "2026-01-01",
    "fingerprint": "old",
}  # fmt: skip
WHERE = {"device": "GPU 1", "versions": {"torch": "2"}, "commit": "abc", "date": "2026-01-02"}


def test_the_table_and_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {"swiglu: one": ROW, "swiglu: two": {"status": "wrong", "reason": "rms error"}}
    found = {"environment": WHERE, "rows": rows, "tests": {"summary": "7 passed"}}
    lines = record.summary(found).splitlines()
    assert lines[1].split() == ["one", "20.0", "2500.0", "GB/s", "80%", "copy", "B", "1.25", "A", "1.50"]
    assert "swiglu: two: wrong, rms error" in lines
    assert "absent: swiglu: C, 1 cases (ImportError: no C)" in lines
    assert "tests on this device: 7 passed" in lines
    assert lines[-1] == "GPU 1; torch 2; commit abc; 2026-01-02"
    assert plots._panels(found) == {"swiglu": [("one", 0.8, pytest.approx(0.64))]}
    assert plots.draw(found, tmp_path / "new" / "p.png") == f"plot: {tmp_path}/new/p.png"
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")
    assert plots.draw({**found, "rows": {}}, tmp_path / "p.png") == "no plot: nothing was measured"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "needs matplotlib" in plots.draw(found, tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_a_file_is_shown_as_it_was_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = {"environment": WHERE, "rows": {"swiglu: one": ROW}}
    (tmp_path / "one.json").write_text(json.dumps(found))
    committed = ROOT / "benchmarks" / "results" / "cpu-decode.json"
    expected = (record.summary(found), decode.summary(json.loads(committed.read_text())))
    for path, text in zip((tmp_path / "one.json", committed), expected, strict=True):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "show", "--json", str(path)])
        assert command.main() == 0
        assert capsys.readouterr().out == text + "\n"


def test_an_old_figure_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    rows = record.Record(tmp_path / "a.json", WHERE, "new")
    rows.rows["swiglu: one"] = ROW
    rows.put("swiglu: one", {"status": "right"})
    assert rows.rows["swiglu: one"] == ROW
    assert "swiglu: one: of abc, 2026-01-01, older code" in record.summary(rows.values)
    rows.put("swiglu: one", {"status": "wrong", "reason": "rms error"})
    assert record.read(tmp_path / "a.json")["rows"]["swiglu: one"]["status"] == "wrong"
    rows.put("swiglu: one", {"status": "right"})
    assert (rows.rows["swiglu: one"]["status"], rows.done("swiglu: one")) == ("right", False)
    rows.put("swiglu: one", ROW)
    assert rows.done("swiglu: one")
    assert "older code" not in record.summary(rows.values)


def test_steps_are_shown_with_the_parts_of_their_floors() -> None:
    """Parts that are nothing are left out; what is left of the time has a name, too."""
    parts = {"weights": 12.0, "cache": 0.5, "logits": 0.01, "products": 0.0, "launches": 3.0, "barriers": 0.0}
    gap = {
        "parts_us": parts, "floor_us": 15.51, "reading_us": 12.51, "unexplained_us": 4.49, "share_of_floor": 0.7755,
        "largest": "weights",
    }  # fmt: skip
    found = {"environment": WHERE, "rows": {"models: one": {**ROW, "gap": gap}, "swiglu: one": ROW}}
    found["ceilings"] = {
        "read_bytes_per_second": 4e12, "copy_bytes_per_second": 3e12, "matmul_flop_per_second": 8e14,
        "launch_seconds": 1.5e-6,
    }  # fmt: skip
    lines = record.summary(found).splitlines()
    at = next(index for index, line in enumerate(lines) if "unexplained" in line)
    assert lines[at].split()[-8:] == ["us", "floor", "share", "weights", "cache", "launches", "unexplained", "largest"]
    assert lines[at + 1].split() == ["one", "20.0", "15.5", "78%", "12.0", "0.5", "3.0", "4.5", "weights"]
    assert lines[at + 2] == ""  # rows without a gap are not there
    assert "ceilings: read 4000 GB/s, copy 3000 GB/s, matmul 800.00 TFLOP/s, launch 1.50 us" in lines


def test_what_is_skipped_keeps_its_figure(tmp_path: Path) -> None:
    rows = record.Record(tmp_path / "a.json", WHERE, "new")
    rows.put("models: one", {"status": "skipped", "reason": "needs 90 GiB"})
    assert "models: one: skipped, needs 90 GiB" in record.summary(rows.values)
    rows.put("models: one", ROW)
    rows.put("models: one", {"status": "skipped", "reason": "needs 90 GiB"})
    assert rows.rows["models: one"]["status"] == "measured"


def test_file_names() -> None:
    assert record.file_of("NVIDIA H200").name == "nvidia-h200.json"
    assert record.read(Path("nowhere.json")) == {"rows": {}}
