"""A run from its configuration to a checkpoint that generates; interrupted, cut up or resumed, it is the same run."""

import copy
import math
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager
from tritium.runtime import cli
from tritium.runtime.errors import TritiumError
from tritium.runtime.training import state, trainer
from tritium.runtime.training.config import parse
from tritium.runtime.training.data import Micro
from tritium.runtime.training.processes import Processes

import tritium

from .conftest import TEXT, records

Write = Callable[[dict[str, Any]], Path]
Values = dict[str, Any]


def prepared(values: Values, **sections: dict[str, Any]) -> trainer.Run:
    values = copy.deepcopy(values)
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return trainer.prepare(parse(values, "test"))


def parameters(run: trainer.Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def state_of(output: str | Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(Path(output), step) / "training/state.safetensors")


def test_a_run_trains_and_its_checkpoint_generates(
    values: Values, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    values["schedule"]["steps"] = 60
    values["log"]["every"] = 20
    assert cli.main(["train", str(write(values))]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    folder = Path(values["output"]) / "step-00000060"
    lines = records(values["output"])
    assert [line["step"] for line in lines] == [20, 40, 60, 60]
    assert lines[0]["loss"] - 0.3 > lines[2]["loss"]
    assert lines[2]["tokens"] == 60 * 4 * 16
    assert out == f"{folder}: step 60, validation loss {lines[-1]['validation_loss']:.4f} nats a token\n"
    assert lines[-1]["validation_loss"] < lines[0]["loss"]
    for checkpoint in (folder, Path(values["output"]) / "last", Path(values["output"]) / "best"):
        arguments = ["--checkpoint", str(checkpoint), "--device", "cpu", "--max-new-tokens", "6", "--temperature", "0"]
        assert cli.main(["generate", "--prompt", "12 green", *arguments]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("12 green")
        assert len(out) == len("12 green") + 7
        assert set(out) <= set(TEXT)
    assert (Path(values["output"]) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_step_is_plain_adamw(values: Values) -> None:
    """Would break: another loss, a missing clip, a wrong rate, decay on an embedding or a bias."""
    settings = {"learning_rate": 0.01, "minimum_rate": 0.001, "betas": [0.8, 0.9], "weight_decay": 0.5, "clip": 0.3}
    run = prepared(values, optimizer=settings, schedule={"warmup": 3})
    (micro,) = run.batches.at(0)
    theirs = tritium.load_model(run.model.config, device="cpu", dtype=torch.float32)
    theirs.load_state_dict(run.model.state_dict())
    theirs.use_backend("torch")
    logits = theirs.train()(micro.tokens.view(4, 16)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), micro.labels)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs.parameters() if p.grad is not None))
    expected = {}
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad * 0.3 / norm
        decay = 0.5 if parameter.dim() > 1 and "embedding" not in name else 0.0
        rate = 0.01 / 4
        expected[name] = parameter.detach() * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
    step = trainer.train_step(run, 0)
    assert norm > 0.3
    assert step.loss == pytest.approx(loss.item(), rel=1e-6)
    assert step.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert step.learning_rate == 0.01 / 4
    for name, value in parameters(run).items():
        assert (value - expected[name]).abs().max() < 1e-5, name


def with_micros(run: trainer.Run, micros: list[Micro]) -> trainer.Run:
    class Fixed:
        def at(self, step: int) -> list[Micro]:
            return micros

    return trainer.replace(run, batches=Fixed())


def test_a_step_does_not_depend_on_how_it_is_cut(values: Values) -> None:
    """Four micro-batches of unlike numbers of labels are one large one. Would break: a mean of means."""
    whole = prepared(values, data={"batch_size": 8})
    (micro,) = whole.batches.at(0)
    labels = micro.labels.clone()
    labels[:50] = -100
    cut = [Micro(*parts, [16, 16]) for parts in zip(micro.tokens.split(32), labels.split(32), strict=True)]
    parts = with_micros(prepared(values, data={"batch_size": 8}), cut)
    whole = with_micros(whole, [Micro(micro.tokens, labels, micro.counts)])
    for step in range(3):
        one, four = trainer.train_step(whole, step), trainer.train_step(parts, step)
        assert four.loss == pytest.approx(one.loss, rel=1e-6)
        assert four.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
        assert four.counts == one.counts
    for name, value in parameters(parts).items():
        torch.testing.assert_close(value, parameters(whole)[name], atol=2e-5, rtol=1e-4)


@dataclass(frozen=True)
class Exchanging(Processes):
    """A process that puts its gradients and loss down for another, or adds what that one has put down."""

    desk: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        if self.rank:
            self.desk["loss"] = [value.clone()]
            return value
        return value + self.desk["loss"][0]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.rank:
            self.desk["gradients"] = [gradient.clone() for gradient in gradients]
            return
        for gradient, other in zip(gradients, self.desk["gradients"], strict=True):
            gradient += other


def test_two_processes_are_one(values: Values) -> None:
    """Three micro-batches over two processes, with dropout: the step that one process does alone."""
    values["overrides"]["dropout"] = 0.3
    values["data"]["accumulation"] = 3
    desk: dict[str, list[torch.Tensor]] = {}
    alone = prepared(values)
    first, second = (trainer.prepare(alone.config, Exchanging(rank, 2, desk)) for rank in (0, 1))
    expected = trainer.train_step(alone, 0)
    trainer.train_step(second, 0)
    found = trainer.train_step(first, 0)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    assert found.counts == expected.counts == [16] * 12
    for name, value in parameters(first).items():
        torch.testing.assert_close(value, parameters(alone)[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("average", [None, 3])
def test_interrupted_and_resumed_is_the_same_run(
    values: Values, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], average: int | None
) -> None:
    """With dropout, bit for bit: weights, optimizer, averaged weights and the curve. The signal comes in step 3."""
    values["overrides"]["dropout"] = 0.3
    values["optimizer"]["average"] = average
    values["evaluation"] = {"every": 2}
    assert cli.main(["train", str(write(values))]) == 0
    expected, curve = state_of(values["output"], 6), records(values["output"])

    values["output"] = str(tmp_path / "again")
    path = str(write(values))
    step = trainer.train_step

    def interrupting(run: trainer.Run, number: int) -> trainer.Step:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupting)
        capsys.readouterr()
        assert cli.main(["train", path]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (f"tritium: interrupted after step 3, saved as {tmp_path}/again/step-00000003: go on with --resume\n")
    assert state.saved_steps(tmp_path / "again") == [3]
    assert cli.main(["train", path, "--resume"]) == 0
    found = state_of(values["output"], 6)
    assert set(found) == set(expected)
    assert any(name.startswith("average.") for name in found) == (average is not None)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert records(values["output"]) == curve
    assert len({line["loss"] for line in curve if "loss" in line}) == 6


def test_the_loss_of_no_number_stops_before_the_optimizer(
    values: Values, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would break: the step is taken with NaN gradients, or the checkpoint of such weights replaces a good one."""
    values["checkpoint"] = {"every": 2}
    values["schedule"]["steps"] = 9
    micro_loss = trainer._micro_loss
    calls = []

    def failing(run: trainer.Run, micro: Micro, **options: Any) -> torch.Tensor:
        calls.append(parameters(run) if len(calls) == 4 else None)
        return micro_loss(run, micro, **options) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(trainer, "_micro_loss", failing)
    assert cli.main(["train", str(write(values))]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tritium: error: step 5: the loss is nan;")
    assert err.count("\n") == 1
    assert state.saved_steps(Path(values["output"])) == [2, 4]
    saved = state_of(values["output"], 4)
    assert calls[4] is not None
    for name, value in calls[4].items():
        assert torch.equal(saved[f"parameter.{name}"], value)


def test_a_gradient_of_no_number_leaves_the_weights(values: Values) -> None:
    run = prepared(values)
    weights = parameters(run)
    run.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TritiumError, match=r"step 1: the norm of the gradient is (inf|nan)"):
        trainer.train_step(run, 0)
    for name, value in parameters(run).items():
        assert torch.equal(value, weights[name])
    assert not run.optimizer.state


def test_evaluation_is_the_mean_over_the_whole_split(values: Values) -> None:
    """Against a loop of its own over non-overlapping windows, and with windows that overlap by half."""
    run = prepared(values, evaluation={"window": 16})
    assert run.sources.validation is not None
    (ids,) = (torch.from_numpy(array).long() for array in run.sources.validation.arrays)
    assert len(ids) == len(TEXT) - int(len(TEXT) * 0.9)

    def nats(stride: int) -> float:
        total, scored = 0.0, 0
        for begin in range(0, len(ids) - 1, stride):
            end = min(begin + 16, len(ids) - 1)
            logits = run.model(ids[None, begin:end]).logits[0, scored - begin :]
            total += float(F.cross_entropy(logits, ids[scored + 1 : end + 1], reduction="sum"))
            scored = end
            if end == len(ids) - 1:
                break
        assert scored == len(ids) - 1
        return total / scored

    trainer.train_step(run, 0)
    run.model.eval()
    with torch.no_grad():
        expected = nats(16), nats(8)
    found = trainer.evaluate(run)
    assert found["validation_loss"] == pytest.approx(expected[0], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(expected[0] / math.log(2) * (len(ids) - 1) / len(ids), rel=1e-6)
    overlapping = trainer.replace(run, config=prepared(values, evaluation={"window": 16, "stride": 8}).config)
    assert trainer.evaluate(overlapping)["validation_loss"] == pytest.approx(expected[1], rel=1e-6)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert trainer.evaluate(run) == found


def test_dropout_is_for_training_alone(values: Values) -> None:
    plain = prepared(values)
    values["overrides"]["dropout"] = 0.4
    dropping = prepared(values)
    assert trainer.evaluate(dropping) == trainer.evaluate(plain)
    (micro,) = plain.batches.at(0)
    losses = [trainer.train_step(with_micros(run, [micro]), 0).loss for run in (plain, dropping)]
    assert losses[0] != losses[1]
    again = [trainer.train_step(prepared(values), step) for step in (0, 0)]
    assert again[0] == again[1]
    assert losses[1] == again[0].loss
    drawn = [trainer.train_step(with_micros(prepared(values), [micro]), step).loss for step in (0, 1)]
    assert drawn[0] != drawn[1]
    twice = trainer.train_step(with_micros(prepared(values), [micro, micro]), 0).loss
    assert twice != pytest.approx(drawn[0], rel=1e-4)  # each micro-batch draws its own
    assert trainer.evaluate(dropping) == trainer.evaluate(dropping)


def test_evaluation_changes_nothing(values: Values, write: Write, tmp_path: Path) -> None:
    """A run that is measured at every step is the run that is measured once; dropout is off while it is measured."""
    values["overrides"]["dropout"] = 0.4
    assert cli.main(["train", str(write(values))]) == 0
    once = state_of(values["output"], 6), records(values["output"])
    values["output"] = str(tmp_path / "often")
    values["evaluation"] = {"every": 1}
    assert cli.main(["train", str(write(values))]) == 0
    often = state_of(values["output"], 6), records(values["output"])
    for name, value in once[0].items():
        assert torch.equal(often[0][name], value)
    assert often[1][-1] == once[1][-1]
    assert [line for line in often[1] if "loss" in line] == once[1][:-1]


def test_the_average_is_what_is_saved_and_measured(values: Values, write: Write) -> None:
    values["optimizer"]["average"] = 4
    assert cli.main(["train", str(write(values))]) == 0
    run = prepared(values)
    mean = None
    for step in range(6):
        trainer.train_step(run, step)
        weight = max(1 / 4, 5 / (5 + step))
        now = parameters(run)
        mean = now if mean is None else {name: value + weight * (now[name] - value) for name, value in mean.items()}
    saved, _, _ = tritium.load(state.folder_of(Path(values["output"]), 6), device="cpu")
    assert mean is not None
    for name, value in saved.named_parameters():
        torch.testing.assert_close(value, mean[name], atol=1e-6, rtol=1e-5)
        assert not torch.equal(value, parameters(run)[name])
    last = records(values["output"])[-1]["validation_loss"]
    assert trainer.evaluate(trainer.replace(run, model=saved, loss=trainer._packed_loss(saved, None), average=None))[
        "validation_loss"
    ] == pytest.approx(last, rel=1e-5)


def test_bfloat16_computes_on_float32_weights(values: Values) -> None:
    values["compute_dtype"] = "bfloat16"
    half, full = prepared(values), prepared({**values, "compute_dtype": "float32"})
    first = [trainer.train_step(run, 0) for run in (half, full)]
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    assert {value.dtype for entry in half.optimizer.state.values() for value in entry.values()} == {torch.float32}
    assert first[0].loss != first[1].loss
    assert first[0].loss == pytest.approx(first[1].loss, rel=1e-2)


def test_only_what_is_not_frozen_is_trained(values: Values) -> None:
    run = prepared({**values, "freeze": ["embedding.*", "*.mlp.*"]})
    before = parameters(run)
    trainer.train_step(run, 0)
    changed = {name for name, value in parameters(run).items() if not torch.equal(value, before[name])}
    still = {name for name in before if name.startswith("embedding.") or ".mlp." in name}
    assert len(still) == 5
    assert changed == set(before) - still


def test_gradient_checkpointing_changes_no_bit(values: Values) -> None:
    values["overrides"]["dropout"] = 0.3
    runs = [prepared({**values, "gradient_checkpointing": keep}) for keep in (None, "nothing")]
    for step in range(2):
        plain, recomputed = (trainer.train_step(run, step) for run in runs)
        assert plain == recomputed
    for one, two in pairwise(map(parameters, runs)):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_compiled_is_the_same_training(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of every length go through one graph; the backend that makes code would only take longer here."""
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")  # definitions: no interpreter
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiler(function, **how, backend=counting))
    values["data"] = {**values["data"], "sampling": "documents"}
    values["data"] |= {"document_separator": "\n", "batch_tokens": 48, "batch_size": None}
    plain, compiled = (prepared({**values, "compile": whether}) for whether in (False, True))
    for step in range(7):
        expected, found = trainer.train_step(plain, step), trainer.train_step(compiled, step)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-4)
    assert len({tuple(compiled.batches.at(step)[0].counts) for step in range(7)}) > 3
    assert 1 <= len(graphs) <= 2  # for the first number of sequences, and for any


def test_a_checkpoint_is_trained_on(values: Values, write: Write, tmp_path: Path) -> None:
    """The first run's model and tokenizer are where the second begins; its loss begins where the first's ended."""
    values["schedule"]["steps"] = 40
    assert cli.main(["train", str(write(values))]) == 0
    before = records(values["output"])
    values["data"].pop("tokenizer")
    second = {**values, "model": f"{values['output']}/last", "output": str(tmp_path / "second"), "overrides": {}}
    run = prepared(second, schedule={"steps": 4})
    first, _, _ = tritium.load(state.folder_of(Path(values["output"]), 40), device="cpu")
    for name, value in first.named_parameters():
        assert torch.equal(value, parameters(run)[name])
    assert trainer.evaluate(run)["validation_loss"] == pytest.approx(before[-1]["validation_loss"], rel=1e-6)
    assert cli.main(["train", str(write({**second, "schedule": {"steps": 4}}))]) == 0
    first_file, second_file = (
        (Path(folder) / "last" / "tokenizer.json").read_text() for folder in (values["output"], second["output"])
    )
    assert first_file == second_file
