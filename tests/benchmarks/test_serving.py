"""The serving benchmark draws the common workload, compares before it reports, and writes what it prints."""

import json
import random
import sys
from pathlib import Path

import pytest
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import serving
from tritium.runtime.errors import TritiumError
from tritium.runtime.loading import load_model


def test_the_workload_is_the_common_one() -> None:
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    lengths = [random.randint(100, 1024) for _ in range(256)]
    found = serving.workload(serving.SEQUENCES, serving.SHORTEST, serving.LONGEST, serving.IDS)
    assert [one.prompt for one in found] == prompts
    assert [one.options.max_new_tokens for one in found] == lengths
    assert [one.options.seed for one in found] == list(range(256))
    assert {one.options.choice for one in found} == {(0.6, 0, 1.0)}


def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("MODEL", "tiny"), ("SEQUENCES", 5), ("SHORTEST", 3), ("LONGEST", 9), ("BATCH", 2)):
        monkeypatch.setattr(serving, name, value)
    monkeypatch.setattr(serving, "load_model", lambda spec, device: load_model(spec, device=device, backend="torch"))
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "serving", "--device", "cpu", "--json", str(path)])
    assert command.main() == 0
    record = json.loads(path.read_text())
    shown = serving.summary(record)
    assert shown in capsys.readouterr().out
    rows = record["results"]
    assert [row["contender"] for row in rows] == ["engine", "generate, 2 at a time", "generate, one by one"]
    work = serving.workload(5, 3, 9, 95)
    new = [one.options.max_new_tokens for one in work]
    assert [row["new_tokens"] for row in rows] == [sum(new), sum(new), sum(new[:4])]
    assert rows[0]["prompt_tokens"] == sum(len(one.prompt) for one in work)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "show", "--json", str(path)])
    assert command.main() == 0
    assert capsys.readouterr().out.strip() == shown


def test_other_tokens_are_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(serving.spec("tiny"), device="cpu", backend="torch").initialise(0.05)
    monkeypatch.setattr(serving, "in_batches", lambda model, work, size: [[0] for _ in work])
    with pytest.raises(TritiumError, match="at a time gives other tokens than the engine"):
        serving.measure(model, serving.workload(2, 2, 3, 90))


def test_a_table() -> None:
    row = {"model": "m", "contender": "c", "sequences": 3, "prompt_tokens": 7, "new_tokens": 30, "seconds": 2.0}
    where = {"device": "d", "versions": {"torch": "2", "triton": "3"}, "date": "today"}
    shown = serving.summary({"environment": where, "results": [row]}).splitlines()
    assert shown[1].split() == ["m", "c", "3", "7", "30", "2.0", "15.0"]
    assert shown[-1] == "d, torch 2 triton 3; today"
