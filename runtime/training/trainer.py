"""The training loop: batches in, steps, evaluations, checkpoints, and an end that loses nothing."""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..decoder import Decoder
from ..errors import TritiumError
from ..parallel.mesh import started
from ..spec import DTYPES
from . import state
from .config import TrainingConfig, read_config
from .data import Batches, Micro, batches, evaluation_batches
from .group import Group
from .log import Log, Meter, measure_peak, progress
from .model import build_model
from .optimizer import Average, build_optimizer, clip_gradients, learning_rate
from .processes import Processes
from .sources import Sources, read_sources
from .vocabulary import Vocabulary

INTERRUPTED = 130


@dataclass(frozen=True)
class Run:
    """All that a step needs."""

    config: TrainingConfig
    model: Decoder
    loss: Callable[..., Tensor]  # of tokens, labels and the sequences' counts: a sum
    parameters: Sequence[nn.Parameter]  # those that are trained
    optimizer: torch.optim.Optimizer
    average: Average | None
    batches: Batches
    sources: Sources
    processes: Processes

    @property
    def output(self) -> Path:
        return Path(self.config.output).expanduser()


@dataclass(frozen=True)
class Step:
    """What one step gave."""

    loss: float  # nats a labelled token, over all micro-batches, with what the configuration adds
    gradient_norm: float
    learning_rate: float
    counts: list[int]  # tokens of every sequence


def train(path: str | Path, changes: Sequence[str] = (), resume: bool = False) -> int:
    """Runs a configuration file to its end, or to an interruption. Gives the exit code: 0, or 130 when interrupted.

    Raises TritiumError: before anything is written where the configuration or its data are wrong, later where the
    numbers or the disk fail.
    """
    config = read_config(path, changes)
    with started(vars(config.parallel), config.device) as mesh:
        return _train(config, resume, Processes() if mesh is None else Group.of(mesh, config))


def _train(config: TrainingConfig, resume: bool, processes: Processes) -> int:
    run, position = processes.together(lambda: _set_out(config, resume, processes))
    output = run.output
    if resume and processes.is_first:
        _say(
            f"going on from step {position.step}"
            if position.step
            else "no checkpoint yet: starting from the first step"
        )

    def make_room() -> None:
        output.mkdir(parents=True, exist_ok=True)
        state.clear_partials(output)

    try:
        processes.first(make_room)
        position, measured = _loop(run, position)
    except OSError as error:  # a full disk, above all
        raise TritiumError(f"{output}: {state.reason(error)}; the checkpoints in it are whole") from None
    folder = state.folder_of(output, position.step)
    interrupted = position.step < config.schedule.steps
    if processes.is_first and interrupted:
        _say(f"interrupted after step {position.step}, saved as {folder}: go on with --resume")
    elif processes.is_first:
        figures = "" if measured is None else f", validation loss {measured:.4f} nats a token"
        print(f"{folder}: step {position.step}{figures}")
    return INTERRUPTED if interrupted else 0


def _set_out(config: TrainingConfig, resume: bool, processes: Processes) -> tuple[Run, state.Position]:
    """All that is checked and read before anything is written: a run, and where it goes on from."""
    output = Path(config.output).expanduser()
    _check_output(output, resume)
    position = state.read_position(output, config)
    run = prepare(config, processes)
    fingerprint = run.sources.train.fingerprint()
    if position.data not in (None, fingerprint):
        raise TritiumError(f"--resume: the training data are not those with which {output} began")
    if position.step:
        state.restore(output, position.step, run.model, run.optimizer, run.average, processes)
    return run, replace(position, data=fingerprint)


def prepare(config: TrainingConfig, processes: Processes | None = None) -> Run:
    """Reads and checks the data, builds the model and the optimizer; writes nothing. Raises TritiumError."""
    processes = processes or Processes()
    model, own = build_model(config, processes.device)
    sources = read_sources(config.data, model.config.vocab_size, own)
    longest = max(*config.data.lengths, config.evaluation.window or 1)
    if longest > model.config.context_length:
        raise TritiumError(
            f"data: sequence_length: {longest} tokens exceed the model's context of {model.config.context_length}"
        )
    steps = config.schedule.steps
    train_batches = batches(config.data, sources.train, sources.vocabulary, steps, config.seed)
    if sources.validation is not None and not any(micro.labelled for micro in _evaluated(config, sources)):
        raise TritiumError("data: validation: is too short: it needs two tokens at least")
    processes.spread(model, DTYPES[config.compute_dtype])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TritiumError("freeze: leaves no parameter to train")
    return Run(
        config=config,
        model=model,
        loss=_packed_loss(model, longest if config.compile else None),
        parameters=parameters,
        optimizer=build_optimizer(model, config.optimizer),
        average=None if config.optimizer.average is None else Average(parameters, config.optimizer.average),
        batches=train_batches,
        sources=sources,
        processes=processes,
    )


def train_step(run: Run, step: int) -> Step:
    """Step `step`, the first being 0, of which this process does its share of the micro-batches.

    The loss is the sum over the labels of all micro-batches of all processes, over their number: however the step is
    cut into micro-batches, its gradient is the same. Raises TritiumError for a loss or gradient that is no number,
    before the optimizer has touched anything.
    """
    config, optimizer = run.config, run.optimizer
    micros = run.batches.at(step)
    labelled = max(sum(micro.labelled for micro in micros), 1)
    run.model.train()
    total = torch.zeros((), device=run.model.device)
    shared = list(run.processes.share(micros))
    for number, micro in shared:
        run.processes.expect(run.model, number == shared[-1][0])
        _seed(config.seed, step, number)
        loss = _micro_loss(run, micro) / labelled
        loss.backward()
        total += loss.detach()
    run.processes.sum_gradients(run.parameters)
    loss_value = float(run.processes.total(total))
    _check_finite(loss_value, "loss", step)
    norm = run.processes.gradient_norm(run.parameters)
    norm_value = float(norm)
    _check_finite(norm_value, "norm of the gradient", step)
    if config.optimizer.clip is not None:
        clip_gradients(run.parameters, norm, config.optimizer.clip)
    rate = learning_rate(step, config.optimizer, config.schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    if run.average is not None:
        run.average.update(step + 1)
    return Step(loss_value, norm_value, rate, [count for micro in micros for count in micro.counts])


def _micro_loss(run: Run, micro: Micro, **options: Any) -> Tensor:
    """The sum over a micro-batch's labels."""
    device = run.model.device
    tokens, labels = (part.to(device, non_blocking=True) for part in (micro.tokens, micro.labels))
    settings = {"label_smoothing": run.config.loss.label_smoothing, "z_loss": run.config.loss.z_loss, **options}
    return run.loss(tokens, labels, micro.counts, **settings)


def _packed_loss(model: Decoder, longest: int | None) -> Callable[..., Tensor]:
    """The sum of the losses of packed sequences; compiled, for sequences of at most `longest` tokens, where that is
    given: one graph for all ways to cut the tokens into sequences.
    """

    def eager(tokens: Tensor, labels: Tensor, counts: Sequence[int], **options: float) -> Tensor:
        return model.loss(tokens, labels, Batch.fresh(counts, tokens.device), reduction="sum", **options)

    if longest is None:
        return eager

    def traced(tokens: Tensor, labels: Tensor, starts: Tensor, positions: Tensor, options: dict[str, float]) -> Tensor:
        return model.loss(tokens, labels, Batch.traced(starts, positions, longest), reduction="sum", **options)

    fast = torch.compile(traced, fullgraph=True)

    def compiled(tokens: Tensor, labels: Tensor, counts: Sequence[int], **options: float) -> Tensor:
        batch = Batch.fresh(counts, tokens.device)
        found: Tensor = fast(tokens, labels, batch.device_starts, batch.positions, options)
        return found

    return compiled


def _seed(*numbers: int) -> None:
    """Dropout is drawn from the step and the micro-batch alone, whichever process runs it and whenever."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1)


def _check_finite(value: float, what: str, step: int) -> None:
    if not math.isfinite(value):
        raise TritiumError(
            f"step {step + 1}: the {what} is {value}; nothing of this step was kept, and earlier checkpoints are whole "
            f"(a lower learning_rate, more warmup or compute_dtype: float32 may help)"
        )


def _evaluated(config: TrainingConfig, sources: Sources) -> Iterator[Micro]:
    assert sources.validation is not None
    return evaluation_batches(sources.validation, config.data, config.evaluation, config.data.tokens_at(1.0))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """The loss on the validation data, of the averaged weights where there are such: nats a token and bits a byte."""
    run.model.eval()
    total = torch.zeros((), dtype=torch.float64, device=run.model.device)
    labelled, processes = 0, run.processes
    with nullcontext() if run.average is None else run.average.in_place():
        for number, micro in enumerate(_evaluated(run.config, run.sources)):
            labelled += micro.labelled
            if number % processes.world == processes.rank:
                total += _micro_loss(run, micro, label_smoothing=0.0, z_loss=0.0)
        if number % processes.world < processes.rank:  # weights may be gathered: all go forward equally often
            _micro_loss(run, micro)
        processes.release(run.model)
    nats = float(processes.total(total))
    found = {"validation_loss": nats / labelled}
    source = run.sources.validation
    if source is not None and source.nbytes is not None and run.config.evaluation.tokens == "whole":
        found["bits_per_byte"] = nats / math.log(2) / source.nbytes
    return found


def _loop(run: Run, position: state.Position) -> tuple[state.Position, float | None]:
    """Steps until the end or an interruption. Gives where that is, and the last validation loss."""
    config, processes = run.config, run.processes
    steps, evaluation, checkpoint = config.schedule.steps, config.evaluation, config.checkpoint
    meter = Meter(run.model.config, measure_peak(run.model.device, DTYPES[config.compute_dtype]) * processes.count)
    shown = processes.is_first and sys.stderr.isatty()
    with (
        _interruption() as interrupted,
        closing(Log(run.output if processes.is_first else None, position.step)) as log,
        progress(steps, position.step, shown) as bar,
    ):
        meter.go_on()
        while position.step < steps:
            result = train_step(run, position.step)
            meter.add(result.counts)
            position = replace(position, step=position.step + 1, tokens=position.tokens + sum(result.counts))
            last = position.step == steps
            stopping = processes.any(bool(interrupted)) and not last
            if last or position.step % config.log.every == 0:
                record = {name: value for name, value in vars(result).items() if name != "counts"}
                log.write({"step": position.step, **record, "tokens": position.tokens, **meter.read()})
                bar.set_postfix_str(_postfix(log.records[-1]))
            bar.update()
            meter.pause()
            measured = None
            if run.sources.validation is not None and _due(position.step, evaluation.every, last):
                measured = evaluate(run)
                log.write({"step": position.step, **measured})
            if stopping or _due(position.step, checkpoint.every, last):
                position = _save(run, position, measured)
                log.plot()
            meter.go_on()
            if stopping:
                break
    losses = [record["validation_loss"] for record in log.records if "validation_loss" in record]
    return position, losses[-1] if losses else None


def _due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step % every == 0)


def _postfix(record: dict[str, Any]) -> str:
    return f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, MFU {record['mfu']:.1%}"


def _save(run: Run, position: state.Position, measured: dict[str, float] | None) -> state.Position:
    """Writes the checkpoint of this step and removes those that are not to be kept."""
    if measured is not None and (position.best_loss is None or measured["validation_loss"] < position.best_loss):
        position = replace(position, best_step=position.step, best_loss=measured["validation_loss"])
    vocabulary: Vocabulary | None = run.sources.vocabulary
    trained = (run.model, run.optimizer, run.average)
    folder = state.save(run.output, position, run.config, *trained, vocabulary, run.processes)
    if run.processes.is_first:
        state.point(run.output, "last", folder)
        if position.best_step is not None:
            state.point(run.output, "best", state.folder_of(run.output, position.best_step))
        state.prune(run.output, run.config.checkpoint.keep, position.best_step)
    return position


def _check_output(output: Path, resume: bool) -> None:
    """Raises TritiumError where another run would be written over."""
    if output.exists() and not output.is_dir():
        raise TritiumError(f"output: {output} is a file; give a folder")
    if resume or not output.exists():
        return
    if (steps := state.saved_steps(output)) or (output / "log.jsonl").exists():
        reached = f", up to step {steps[-1]}" if steps else ""
        raise TritiumError(
            f"output: {output} holds a run already{reached}: go on with --resume, or give another folder"
        )


def _say(message: str) -> None:
    print(f"tritium: {message}", file=sys.stderr)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put into; the second one ends the process as ever."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever started it takes the signals
        pass
    try:
        yield caught
    finally:
        restore()
