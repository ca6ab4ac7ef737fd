"""The loading benchmark times what it says, each in a new process, and writes what it prints."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import loading


def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "MODEL", "tiny")
    monkeypatch.setattr(loading, "ROUNDS", 1)
    monkeypatch.setattr(loading, "TO", ("float32",))
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "loading", "--threads", "1", "--json", str(path)])
    threads = torch.get_num_threads()
    try:
        assert command.main() == 0
    finally:
        torch.set_num_threads(threads)
    shown = loading.summary(json.loads(path.read_text()))
    assert shown in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["results"]
    assert (row["model"], row["to"]) == ("tiny", "float32")
    assert row["file_bytes"] > 2 * 96 * 32  # at least the embedding
    monkeypatch.setattr(sys, "argv", ["benchmarks", "show", "--json", str(path)])
    assert command.main() == 0
    assert capsys.readouterr().out.strip() == shown


def test_a_table() -> None:
    """Rates are the file's bytes over the medians."""
    seconds = {
        name: {"p20": 1.0, "p50": p50, "p80": 9.0} for name, p50 in (("read", 1.0), ("copy", 2.0), ("load", 4.0))
    }
    row = {"model": "m", "file_bytes": 8 * 10**9, "to": "float32", **{f"{k}_seconds": v for k, v in seconds.items()}}
    where = {"device": "d", "threads": 2, "versions": {"torch": "2"}, "date": "today"}
    shown = loading.summary({"environment": where, "results": [row]})
    assert shown.splitlines()[1].split() == ["m", "8.00", "float32", "8.00", "4.00", "2.00", "4.00"]
