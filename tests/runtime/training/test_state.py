"""Checkpoints outlive whatever ends a run: a kill at any moment, a full disk, a configuration that has changed."""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tritium.runtime import cli
from tritium.runtime.training import log, state, trainer

import tritium

from .conftest import records
from .test_config import changed

Write = Callable[[dict[str, Any]], Path]
Values = dict[str, Any]
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def every_two(values: Values) -> Values:
    return {**values, "checkpoint": {"every": 2}, "evaluation": {"every": 2}}


def train(path: Path, *options: str) -> int:
    return cli.main(["train", str(path), *options])


def opens(output: Path, step: int) -> bool:
    """Whether a checkpoint is whole, for generation and for training."""
    model, tokenizer, _ = tritium.load(state.folder_of(output, step), device="cpu")
    state_file = state.folder_of(output, step) / "training" / "state.safetensors"
    return model.num_parameters() > 0 and tokenizer is not None and state_file.is_file()


def test_nothing_is_pickled(values: Values, write: Write) -> None:
    assert train(write(values)) == 0
    output = Path(values["output"])
    files = {str(path.relative_to(output / "step-00000006")) for path in output.glob("step-*/**/*") if path.is_file()}
    made = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert files == {*made, "training/state.json", "training/state.safetensors"}


def test_a_run_is_not_written_over(every_two: Values, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    output, path = Path(every_two["output"]), write(every_two)
    assert train(path) == 0
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert train(path) == 2
    assert capsys.readouterr().err == (
        f"tritium: error: output: {output} holds a run already, up to step 6: go on with --resume, or give another "
        f"folder\n"
    )
    assert train(path, "--resume") == 0  # at its end already
    assert capsys.readouterr().err == "tritium: going on from step 6\n"
    after = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert {file: content for file, content in after.items() if file in before} == before
    (output.parent / "file").write_text("")
    assert train(write({**every_two, "output": str(output.parent / "file")})) == 2
    assert capsys.readouterr().err.endswith("file is a file; give a folder\n")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.learning_rate", 0.5, "optimizer.learning_rate was 0.01 when {} began and is 0.5 now"),
        ("data.accumulation", 2, "data.accumulation was 1 when {} began and is 2 now"),
        ("seed", 2, "seed was 1 when {} began and is 2 now"),
        ("overrides.dropout", 0.1, "overrides.dropout was None when {} began and is 0.1 now"),
        ("initialise", {}, "initialise was None when {} began and is"),
    ],
)
def test_a_changed_configuration_is_named(
    values: Values, write: Write, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    assert train(write(values)) == 0
    capsys.readouterr()
    assert train(write(changed(values, key, value)), "--resume") == 2
    assert capsys.readouterr().err.startswith(f"tritium: error: --resume: {message.format(values['output'])}")


def test_changed_data_are_seen(values: Values, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write(values)) == 0
    text = Path(values["data"]["train"])
    text.write_text(text.read_text().replace("7 green", "8 green"))
    capsys.readouterr()
    assert train(write(values), "--resume") == 2
    assert capsys.readouterr().err == (
        f"tritium: error: --resume: the training data are not those with which {values['output']} began\n"
    )


def test_what_may_change(values: Values, write: Write) -> None:
    assert train(write(values)) == 0
    for key, value in (("checkpoint.keep", 1), ("log.every", 3), ("gradient_checkpointing", "nothing")):
        assert train(write(changed(values, key, value)), "--resume") == 0


def test_the_newest_and_the_best_are_kept(every_two: Values, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses are made to be best at step 4; a newer checkpoint does not push it out."""
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.0, 4.0])
    monkeypatch.setattr(trainer, "evaluate", lambda run: {"validation_loss": next(losses)})
    every_two["schedule"]["steps"] = 12
    every_two["checkpoint"]["keep"] = 2
    assert train(write(every_two)) == 0
    output = Path(every_two["output"])
    assert state.saved_steps(output) == [4, 10, 12]
    assert (output / "best").resolve().name == "step-00000004"
    assert (output / "last").resolve().name == "step-00000012"
    assert json.loads((output / "last/training/state.json").read_text())["best_step"] == 4
    assert not list(output.glob(".*"))


KILLED = """
import os, signal, sys
from tritium.runtime import cli
from tritium.runtime.training import log, state
log.MEASURED = 1e-9
moment, calls = int(sys.argv[2]), 0
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
for name in ("save_checkpoint", "save_file", "_to_disk", "_remove"):
    setattr(state, name, dying(getattr(state, name)))
state.Path.rename = dying(state.Path.rename)
state.Path.replace = dying(state.Path.replace)
sys.exit(cli.main(["train", sys.argv[1]]))
"""


@pytest.mark.parametrize("moment", [3, 5, 19, 26])
def test_a_kill_at_any_moment_leaves_whole_checkpoints(
    every_two: Values, write: Write, tmp_path: Path, moment: int
) -> None:
    """Killed between any two of the things that a save does: what is there is whole, and the run goes on from it."""
    path = write(every_two)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([sys.executable, "-c", KILLED, str(path), str(moment)], env=environment, check=False)
    assert code.returncode == -signal.SIGKILL
    output = Path(every_two["output"])
    for step in state.saved_steps(output):
        assert opens(output, step)
    assert train(path, "--resume") == 0
    reference = {**every_two, "output": str(tmp_path / "reference")}
    assert train(write(reference)) == 0
    resumed, whole = (
        state.safe_open(state.folder_of(Path(folder), 6) / "training/state.safetensors", "pt")
        for folder in (output, reference["output"])
    )
    with resumed as one, whole as two:
        for name in two.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(one.get_tensor(name), two.get_tensor(name))
    assert records(output) == records(reference["output"])
    assert not list(output.glob(".*"))


@pytest.mark.parametrize("where", ["save_checkpoint", "save_file", "_to_disk"])
def test_a_full_disk_keeps_what_was_saved(
    every_two: Values, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    function, output = getattr(state, where), Path(every_two["output"])

    def full(*arguments: Any) -> Any:
        if (output / ".step-00000004.partial").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)

    monkeypatch.setattr(state, where, full)
    assert train(write(every_two)) == 2
    assert capsys.readouterr().err == (
        f"tritium: error: {output}/step-00000004: not saved (No space left on device); the checkpoint of step 2 is "
        f"whole\n"
    )
    assert state.saved_steps(output) == [2]
    assert not list(output.glob(".*"))
    assert opens(output, 2)
    monkeypatch.undo()
    assert train(write(every_two), "--resume") == 0


def test_a_disk_that_is_really_full(
    every_two: Values, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of so few kilobytes that one checkpoint and no second finds room."""
    assert train(write(every_two)) == 0
    # Two checkpoints are left of the three: this disk holds one, and not a second beside it.
    size = sum(path.stat().st_size for path in Path(every_two["output"]).rglob("*") if path.is_file()) * 5 // 8
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 1024}k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        values = {**every_two, "output": str(disk / "run")}
        capsys.readouterr()
        assert train(write(values)) == 2
        err = capsys.readouterr().err
        assert "No space left on device" in err
        assert err.count("\n") == 1
        steps = state.saved_steps(disk / "run")
        assert steps
        assert all(opens(disk / "run", step) for step in steps)
        assert not list((disk / "run").glob(".step*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_state_is_one_line(values: Values, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write(values)) == 0
    folder = Path(values["output"]) / "step-00000006" / "training"
    (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-8])
    capsys.readouterr()
    assert train(write(values), "--resume") == 2
    assert capsys.readouterr().err.startswith(f"tritium: error: {folder}/state.safetensors: not a whole safetensors")
    (folder / "state.json").write_text("{}")
    assert train(write(values), "--resume") == 2
    assert capsys.readouterr().err == (
        f"tritium: error: {folder}/state.json: not the state of a run that this version writes\n"
    )


def test_resuming_what_has_not_begun(values: Values, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(write(values), "--resume") == 0
    assert capsys.readouterr().err.startswith("tritium: no checkpoint yet: starting from the first step\n")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    """A line that was cut short goes, too."""
    lines = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    again = log.Log(tmp_path, 2)
    again.write({"step": 3, "loss": 9.0})
    again.close()
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]


def test_without_matplotlib_it_goes_on_and_says_so_once(
    every_two: Values, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    assert train(write(every_two)) == 0
    assert capsys.readouterr().err == "tritium: no loss.png: matplotlib is not installed\n"
    assert not (Path(every_two["output"]) / "loss.png").exists()


def test_a_prompt_that_the_characters_do_not_spell(
    values: Values, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write(values)) == 0
    capsys.readouterr()
    checkpoint = f"{values['output']}/last"
    assert cli.main(["generate", "--checkpoint", checkpoint, "--device", "cpu", "--prompt", "é"]) == 2
    assert capsys.readouterr().err.startswith("tritium: error: the tokenizer has no token for something in the text")
