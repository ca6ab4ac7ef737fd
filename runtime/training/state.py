"""Checkpoints: folders that `tritium generate` opens, and beside the model all that a run needs to go on.

A checkpoint is written into a folder of another name, brought to the disk, and only then renamed: whatever ends the
process, a folder that is called step-... is whole. Nothing is pickled.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..decoder import Decoder
from ..errors import TritiumError
from ..files import read_json
from ..lora_files import save_adapter
from ..model_utils import save_checkpoint
from .config import TrainingConfig
from .optimizer import Average
from .processes import Processes
from .vocabulary import Vocabulary

FORMAT = 1
STATE = Path("training")  # within a checkpoint
ADAPTER = "adapter"  # not beside the merged model: transformers would take that for the base and add the adapter again
# Where a run is, how fast it goes and what is written of it may change from one start to the next.
FREE = (
    *("output", "device", "parallel", "backend", "batch_invariant", "compile", "gradient_checkpointing"),
    *("checkpoint", "log"),
)


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0  # steps that are behind
    tokens: int = 0  # trained on
    data: int | None = None  # checksum of what is trained on
    best_step: int | None = None  # the checkpoint with the least validation loss
    best_loss: float | None = None


def folder_of(output: Path, step: int) -> Path:
    return output / f"step-{step:08d}"


def saved_steps(output: Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in output.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def tensors_of(
    model: Decoder, optimizer: torch.optim.Optimizer, average: Average | None, processes: Processes
) -> dict[str, Tensor]:
    """All that training changes, by name, for the first process to save: parameters, the optimizer's state, the
    averaged weights.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {f"parameter.{name}": processes.whole(name, parameter.detach()) for name, parameter in trained.items()}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = processes.whole(name, value)
    if average is not None:
        for name, value in zip(trained, average.values, strict=True):
            tensors[f"average.{name}"] = processes.whole(name, value)
    return tensors


def save(
    output: Path,
    position: Position,
    config: TrainingConfig,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    vocabulary: Vocabulary | None,
    processes: Processes,
) -> Path:
    """The first process writes the checkpoint of a step. Raises TritiumError on all of them, with the folder as it was,
    where the disk refuses.
    """
    folder = folder_of(output, position.step)
    partial = output / f".{folder.name}.partial"

    def write_model() -> None:
        with _writing(folder, partial):
            _remove(partial)
            (partial / STATE).mkdir(parents=True)
            if config.lora is not None:
                save_adapter(whole, partial / ADAPTER)
            if config.lora is None or config.lora.merge:
                save_checkpoint(whole, partial, config.checkpoint.dtype or model.config.dtype, True)
            if vocabulary is not None:
                vocabulary.save(partial)

    def write_state() -> None:
        with _writing(folder, partial):
            _write_state(partial / STATE, position, config, tensors)
            for path in [*partial.rglob("*"), partial]:
                _to_disk(path)
            _remove(folder)
            partial.rename(folder)
            _to_disk(output)

    with contextlib.nullcontext() if average is None else average.in_place():
        whole = processes.whole_model(model)
        processes.first(write_model)
    tensors = tensors_of(model, optimizer, average, processes)
    processes.first(write_state)
    return folder


def _write_state(folder: Path, position: Position, config: TrainingConfig, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "state.safetensors")
    record = {"format": FORMAT, **vars(position), "config": config.as_dict(), "torch": torch.__version__}
    (folder / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _writing(folder: Path, partial: Path) -> Iterator[None]:
    """What the disk refuses within is one TritiumError, and what was written so far is removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            _remove(partial)
        kept = saved_steps(folder.parent)
        whole = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier one"
        raise TritiumError(f"{folder}: not saved ({reason(error)}); {whole}") from None


def reason(error: Exception) -> str:
    """What an operating system's error says, in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def prune(output: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the `keep` newest and the best."""
    for step in saved_steps(output)[:-keep]:
        if step != best:
            folder = folder_of(output, step)
            gone = folder.with_name(f".{folder.name}.partial")  # so that none is ever half there
            folder.rename(gone)
            _remove(gone)


def point(output: Path, name: str, folder: Path) -> None:
    """Makes output/name a link to a checkpoint, where links can be made."""
    partial = output / f".{name}.partial"
    with contextlib.suppress(OSError, NotImplementedError):
        partial.unlink(missing_ok=True)
        partial.symlink_to(folder.name, target_is_directory=True)
        partial.replace(output / name)


def clear_partials(output: Path) -> None:
    """Removes what an earlier process left half written."""
    for path in output.glob(".*.partial"):
        _remove(path)


def read_position(output: Path, config: TrainingConfig) -> Position:
    """How far the newest checkpoint of a run is. Raises TritiumError where it is of another configuration."""
    steps = saved_steps(output)
    if not steps:
        return Position()
    path = folder_of(output, steps[-1]) / STATE / "state.json"
    record = read_json(path)
    if record.get("format") != FORMAT or not isinstance(record.get("config"), dict):
        raise TritiumError(f"{path}: not the state of a run that this version writes")
    if (key := _difference(record["config"], config.as_dict())) is not None:
        name, before, now = key
        raise TritiumError(f"--resume: {name} was {before!r} when {output} began and is {now!r} now")
    return Position(**{name: record[name] for name in Position.__dataclass_fields__})


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """(key, then, now) of the first value that may not change and did."""
    for name in (*before, *(name for name in now if name not in before)):
        if not prefix and name in FREE:
            continue
        then, here = before.get(name), now.get(name)
        if isinstance(then, Mapping) and isinstance(here, Mapping):
            if (found := _difference(then, here, f"{prefix}{name}.")) is not None:
                return found
        elif then != here:
            return f"{prefix}{name}", then, here
    return None


@torch.no_grad()
def restore(
    output: Path,
    step: int,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    processes: Processes,
) -> None:
    """Makes model, optimizer and averaged weights those of a checkpoint. Raises TritiumError for what does not fit."""
    path = folder_of(output, step) / STATE / "state.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise TritiumError(f"{path}: not a whole safetensors file ({error})") from None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        found = saved.get(f"parameter.{name}")
        shape = processes.whole_shape(name, parameter)
        if found is None or tuple(found.shape) != shape:
            held = "nothing" if found is None else list(found.shape)
            raise TritiumError(f"{path}: {name} should be {list(shape)}, and the file has {held}")
        parameter.copy_(processes.part(name, found, parameter))
    names = {id(parameter): name for name, parameter in trained.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        name = names[id(parameter)]
        state[index] = {
            key.split(".")[1]: processes.part(name, value, parameter)
            for key, value in saved.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if average is not None:
        for (name, parameter), value in zip(trained.items(), average.values, strict=True):
            value.copy_(processes.part(name, saved[f"average.{name}"], parameter))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
