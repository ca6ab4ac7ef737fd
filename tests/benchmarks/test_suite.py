"""The whole flow on the CPU: gate, record, resumption, time limit, broken processes, picture, exit codes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import plots, record, suite, worker
from tritium.benchmarks.case import Case
from tritium.benchmarks.worker import Bench, find, spent

ROOT = Path(__file__).resolve().parents[2]
ASKED: list[Mapping[str, Any]] = []


class InProcess(suite.Worker):
    """A worker without a process of its own."""

    def __init__(self, operation: str, device: str, smoke: bool) -> None:
        super().__init__(operation, device, smoke)
        self.bench = Bench(operation, torch.device(device), smoke)

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        ASKED.append(request)
        return json.loads(json.dumps(self.bench.answer(request)))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes, without pictures, which take longer than all else, and of the cases only the forward ones."""

    def forward(operation: str, smoke: bool) -> dict[str, Case]:
        return {name: case for name, case in find(operation, smoke).items() if not name.startswith("backward")}

    monkeypatch.setattr(suite, "Worker", InProcess)
    monkeypatch.setattr(suite, "find", forward)
    monkeypatch.setattr(worker, "find", forward)
    monkeypatch.setattr(plots, "draw", lambda values, path: f"plot: {path}")
    ASKED.clear()


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    smoke = ["--device", "cpu", "--smoke", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, *smoke])
    code = command.main()
    return code, json.loads(path.read_text())


def timed() -> list[str]:
    return [request["case"] for request in ASKED if request["do"] == "time"]


@pytest.mark.usefixtures("here")
def test_a_run_and_its_resumption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "cpu.json"
    code, found = run(monkeypatch, path, "rms_norm", "swiglu")
    assert code == 0
    assert list(found["rows"]) == [
        "rms_norm: 3 x 64",
        "rms_norm: residual 2 x 48",
        "swiglu: 3 x 48",
        "swiglu: apart 3 x 48",
    ]
    for row in found["rows"].values():
        assert row["status"] == "measured"
        assert row["fingerprint"] == found["environment"]["fingerprint"]
        ours, ratios = row["times"]["tritium"]["p50"], row["ratios"]
        for peer, ratio in ratios.items():
            assert ratio == pytest.approx(row["times"][peer]["p50"] / ours)
        assert row["best_peer"] == min(ratios, key=ratios.get)
        assert row["share_of_ceiling"] == pytest.approx(row["floor_us"] / ours)
        assert row["achieved_per_second"] == pytest.approx(row["bytes"] / ours * 1e6)
        assert "compared on a GPU only" in row["absent"]["torch.compile"]
    assert found["rows"]["rms_norm: 3 x 64"]["bytes"] == 4 * (2 * 3 * 64 + 64)
    assert found["ceilings"]["read_bytes_per_second"] > 0
    assert capsys.readouterr().out == f"{record.summary(found)}\nplot: {path.with_suffix('.png')}\n"
    # Every case is proven right before the first is timed.
    kinds = [request["do"] for request in ASKED]
    assert kinds == ["check"] * 4 + ["ceilings"] + ["time"] * 4

    ASKED.clear()  # the same code: nothing is left to do
    code, again = run(monkeypatch, path, "rms_norm", "swiglu")
    assert (code, ASKED, again["rows"]) == (0, [], found["rows"])

    changed = json.loads(path.read_text())
    old = changed["rows"]["rms_norm: 3 x 64"]
    old["fingerprint"] = "of older code"
    del changed["rows"]["swiglu: 3 x 48"]
    path.write_text(json.dumps(changed))
    code, again = run(monkeypatch, path, "rms_norm", "swiglu")
    assert timed() == ["3 x 48", "3 x 64"]  # what has no figure comes before what has an old one
    assert again["rows"]["rms_norm: residual 2 x 48"] == found["rows"]["rms_norm: residual 2 x 48"]
    assert again["rows"]["rms_norm: 3 x 64"] not in (old, found["rows"]["rms_norm: 3 x 64"])

    ASKED.clear()
    run(monkeypatch, path, "rms_norm", "--again", "--case", "rms_norm: 3 x 64")
    assert timed() == ["3 x 64"]


@pytest.mark.usefixtures("here")
def test_a_disturbed_kernel_gets_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rms_norm = import_module("tritium.kernels.rms_norm")
    original = rms_norm.rms_norm
    monkeypatch.setattr(rms_norm, "rms_norm", lambda *args: original(*args) * 1.01)
    monkeypatch.setattr(rms_norm, "add_rms_norm", lambda *args: 1 // 0)
    code, found = run(monkeypatch, tmp_path / "cpu.json", "rms_norm", "swiglu")
    assert code == 1
    rows = found["rows"]
    assert rows["rms_norm: 3 x 64"]["status"] == "wrong"
    assert "largest error" in rows["rms_norm: 3 x 64"]["reason"]
    assert rows["rms_norm: residual 2 x 48"]["status"] == "failed"
    assert "ZeroDivisionError" in rows["rms_norm: residual 2 x 48"]["reason"]
    assert rows["swiglu: 3 x 48"]["status"] == "measured"
    assert "times" not in rows["rms_norm: 3 x 64"]
    assert timed() == ["3 x 48", "apart 3 x 48"]
    assert "rms_norm: 3 x 64: wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("here")
def test_the_time_limit_ends_a_run_cleanly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, found = run(monkeypatch, tmp_path / "cpu.json", "rms_norm", "--minutes", "0.0001")
    assert (code, ASKED, found["rows"]) == (0, [], {})


@pytest.mark.usefixtures("here")
def test_checks_leave_time_for_what_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Would break: a first run compiles until its time is up, and measures nothing."""
    now, ask = [0.0], InProcess.ask

    def slow(worker: InProcess, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        now[0] += 200.0 if request["do"] == "check" else 0.0
        return ask(worker, request, seconds)

    monkeypatch.setattr(InProcess, "ask", slow)
    monkeypatch.setattr(suite.time, "monotonic", lambda: now[0])
    code, found = run(monkeypatch, tmp_path / "cpu.json", "rms_norm", "swiglu")
    assert (code, list(found["rows"])) == (0, ["rms_norm: 3 x 64", "rms_norm: residual 2 x 48"])  # of ten minutes, six
    assert timed() == ["3 x 64", "residual 2 x 48"]


@pytest.mark.usefixtures("here")
def test_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prefill of a tiny model, all backends and transformers on the same weights."""
    code, found = run(monkeypatch, tmp_path / "cpu.json", "models", "--case", "prefill")
    row = found["rows"]["models: tiny prefill 5"]
    assert (code, row["absent"]) == (0, {})
    assert set(row["times"]) == {"tritium", "batch_invariant=False", "torch", "transformers"}
    assert row["best_peer"] in ("torch", "transformers")
    assert row["tokens_per_second"] == pytest.approx(5e6 / row["times"]["tritium"]["p50"])


def test_the_gate_of_models() -> None:
    """Logits a little off and tokens that are not the likeliest are seen."""
    bench = Bench("models", torch.device("cpu"), smoke=True)
    for name, case in bench.cases.items():
        with torch.inference_mode():
            args = case.make(suite_draw())
            out = case.peers["torch"](*args)()
            assert case.check is not None
            assert case.check(out, args) is None
            last = torch.arange(out.shape[-1]) == out.shape[-1] - 1
            off = out + 1e-3 if "prefill" in name else (out + last) % 96
            assert case.check(off, args) is not None


def test_the_gate_of_training() -> None:
    """Every contender on this machine computes the same step; a loss, and gradients, a little off are seen."""
    bench = Bench("training", torch.device("cpu"), smoke=True)
    ((name, case),) = bench.cases.items()
    found = bench.check(case)
    assert found["status"] == "right"
    assert set(found["absent"]) == {"transformers compiled", "liger"}, name
    with torch.inference_mode():
        args = case.make(suite_draw())
        assert case.check is not None
        for spoiled in ("nothing", "loss", "gradient"):
            subject, loss = case.ours(*args)()
            with torch.inference_mode(False), torch.no_grad():
                if spoiled == "gradient":
                    next(iter(subject.model.parameters())).grad.mul_(1.5)
                loss = loss * 1.01 if spoiled == "loss" else loss
                assert (case.check((subject, loss), args) is None) == (spoiled == "nothing"), spoiled


def suite_draw() -> Any:
    from tritium.benchmarks.case import Draw

    return Draw(torch.device("cpu"), 5)


def test_a_peer_that_breaks_the_device_is_absent_and_so_are_those_behind_it() -> None:
    bench = Bench("rms_norm", torch.device("cpu"), smoke=True)
    case = bench.cases["3 x 64"]

    def breaks(*args: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    peers = {"first": case.peers["torch"], "second": breaks, "third": case.peers["torch"]}
    found = bench.check(dataclasses.replace(case, peers=peers))
    assert found["status"] == "right"
    assert found["absent"] == {
        "second": "RuntimeError: CUDA error: unspecified launch failure",
        "third": "second broke the device before it",
    }
    assert spent(found)
    limits = {"read_bytes_per_second": 1.0, "copy_bytes_per_second": 1.0, "matmul_flop_per_second": 1.0}
    timed = bench.time(dataclasses.replace(case, peers=peers), limits, found["absent"])
    assert set(timed["times"]) == {"tritium", "first"}
    assert not spent({"status": "failed", "reason": "ValueError: x"})


def test_a_process_that_dies_or_hangs_is_a_row() -> None:
    worker = suite.Worker("rms_norm", "cpu", smoke=True)
    says = "import sys; input(); print('the last words', file=sys.stderr); sys.exit(9)"
    worker.command = [sys.executable, "-c", says]
    row = worker.ask({"do": "check", "case": "any"}, 30)
    assert row == {"status": "failed", "reason": "its process ended with code 9: the last words"}
    worker.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert worker.ask({"do": "check", "case": "any"}, 0.3)["status"] == "timed out"
    worker.command = [sys.executable, "-c", 'input(); print(\'{"status": "right"}\', flush=True); input()']
    assert worker.ask({"do": "check", "case": "any"}, 30) == {"status": "right"}  # the next has a fresh process
    assert worker.process is not None
    worker.close()
    broken = {"status": "right", "absent": {"peer": "RuntimeError: CUDA error: an illegal memory access"}}
    worker.command = [sys.executable, "-c", f"import json; input(); print(json.dumps({broken!r}), flush=True); input()"]
    assert worker.ask({"do": "check", "case": "any"}, 30) == broken
    assert worker.process is None  # nothing works in a process whose device is broken
    worker.close()


def test_the_command_in_processes_of_its_own(tmp_path: Path) -> None:
    """A copy of the tree with a slip in a kernel: the command says so, and leaves with 1."""
    for folder in ("tritium", "kernels", "runtime", "models", "benchmarks"):
        ignored = shutil.ignore_patterns("shakespeare", "results", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "setup.py", tmp_path)
    kernel = tmp_path / "kernels" / "rms_norm.py"
    text = kernel.read_text()
    kernel.write_text(text.replace("/ N\n", "/ (N + 1)\n", 1))  # the forward's mean
    assert kernel.read_text() != text
    arguments = ["rms_norm", "--device", "cpu", "--smoke", "--json", "out.json", "--case", "rms_norm: 3 x 64"]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tritium.benchmarks", *arguments],
        cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    row = json.loads((tmp_path / "out.json").read_text())["rows"]["rms_norm: 3 x 64"]
    assert row["status"] == "wrong"
    assert "error" in row["reason"]
    assert "1 of 1 cases are wrong or failed" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("arguments", [[], ["rms_norm"], ["--device", "cpu"]])
def test_without_a_gpu_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert "need a GPU" in said
    assert "decode --device cpu" in said
    assert len(said.splitlines()) == 1


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    smoke = ["--device", "cpu", "--smoke"]
    for arguments, message in (
        (["decode", "rms_norm"], "go alone"),
        (["show"], "name a results file"),
        (["show", "--json", "nowhere.json"], "nowhere.json: no such file"),
        ([*smoke, "rms_norm", "--json", str(ROOT / "benchmarks/results/cpu-decode.json")], "not a record"),
        ([*smoke, "rms_norm", "--json", "/proc/no/x.json"], "cannot be written"),
        ([*smoke, "rms_norm"], "give --json"),
        ([*smoke, "rms_norm", "--json", "x.json", "--case", "nonsense"], "no case's name contains 'nonsense'"),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
        assert command.main() == 2
        assert message in capsys.readouterr().err


def test_tests_on_the_device_are_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    assert suite.device_tests("cuda", 1) == {"summary": "not here"}
    (tmp_path / "tests" / "kernels").mkdir(parents=True)
    (tmp_path / "tests" / "test_slow.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_slow(): time.sleep(60)\n"
    )
    found = suite.device_tests("cuda", 0.5)
    assert found["exit_code"] is None
    assert found["summary"].startswith("cut off after 0 s")
