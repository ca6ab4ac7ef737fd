"""LoRA adapters as folders that `peft` reads and writes: adapter_config.json and adapter_model.safetensors.

`peft` knows the checkpoint's layers and not the runtime's packed ones: tensors are called by the family's weight map,
and rows that this permutes at loading (permute_rope) are permuted in B as well.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import FLOATS, entries, read_tensors
from .errors import TritiumError
from .files import read_json
from .lora import (
    ALL_LINEAR,
    Adapter,
    LoRA,
    adapters,
    attach,
    check_free,
    find_parts,
    last_name,
    module_of,
    trainable,
    weight_map,
)
from .weight_map import Piece, WeightMap, check_shapes

if TYPE_CHECKING:
    from .decoder import Decoder

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
WRAPPED = "base_model.model."  # what `peft` puts before the names of a model's layers
# Keys of the configuration that change no number here; of all others but those that are read, only a value that says
# "not used" (null, false, nothing in it) is understood.
SILENT = (
    *("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "task_type", "inference_mode"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "layers_pattern"),
)
READ = ("peft_type", "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "bias", "init_lora_weights")
UNCHANGED = (True, False, None, "gaussian", "orthogonal")  # of init_lora_weights: the others change the base weights


def read_config(path: Path) -> LoRA:
    """What an adapter_config.json says. Raises TritiumError for what is wrong in it or not supported."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise TritiumError(f"{path}: peft_type: only 'LORA' is read, got {config.get('peft_type')!r}")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if config.get(name) is None]:
        raise TritiumError(f"{path}: missing {', '.join(missing)}")
    if config.get("bias", "none") != "none":
        raise TritiumError(f"{path}: bias: trained biases are not supported, only 'none', got {config['bias']!r}")
    initialised = config.get("init_lora_weights", True)
    if initialised not in UNCHANGED:
        raise TritiumError(f"{path}: init_lora_weights: {initialised!r} changes the base weights and is not supported")
    for name, value in config.items():
        if value and name not in (*READ, *SILENT):
            raise TritiumError(f"{path}: {name}: is not supported: only plain LoRA adapters are read, got {value!r}")
    targets = config["target_modules"]
    if not isinstance(targets, list):
        raise TritiumError(f"{path}: target_modules: must be a list of names, got {targets!r}")
    how = (config["r"], config["lora_alpha"], tuple(targets))
    try:
        return LoRA(*how, config.get("lora_dropout", 0.0), config.get("use_rslora", False))
    except TritiumError as error:
        raise TritiumError(f"{path}: {error}") from None


def load_adapter(model: "Decoder", directory: str | Path) -> list[str]:
    """Gives a model the adapters of a folder that `peft` or `save_adapter` wrote, and freezes everything else: it
    computes with them, and can be trained on. Gives the names of the parameters that are trained.

    Raises TritiumError, with the model as it was, for adapters that do not fit it or are not supported.
    """
    directory = Path(directory).expanduser()
    check_free(model)
    if not directory.is_dir():
        raise TritiumError(f"{directory}: no such adapter folder")
    if not (directory / CONFIG).is_file():
        raise TritiumError(f"{directory}: not an adapter, it has no {CONFIG}")
    how, path = read_config(directory / CONFIG), directory / TENSORS
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is refused)"
        raise TritiumError(
            f"{directory}: has no {TENSORS}{pickled if (directory / 'adapter_model.bin').exists() else ''}"
        )
    weights = weight_map(model)
    try:
        parts = find_parts(model, weights, how.targets)
    except TritiumError as error:
        raise TritiumError(f"{directory / CONFIG}: target_modules: {error}") from None
    expected: dict[str, tuple[int, ...]] = {}
    for name, of_layer in parts.items():
        for part in of_layer:
            width = model.get_parameter(f"{name}.weight").shape[1]
            expected |= {_name(weights, part.piece, "A"): (how.rank, width)}
            expected |= {_name(weights, part.piece, "B"): (part.rows, how.rank)}
    found = {}
    for name, dtype, shape in read_tensors(path, entries):
        if dtype not in FLOATS:
            raise TritiumError(f"{path}: {name} is {dtype}; only {', '.join(FLOATS)} load")
        found[name] = shape
    check_shapes(expected, found, str(path))

    tensors: Mapping[str, Tensor] = read_tensors(path, lambda file: {name: file.get_tensor(name) for name in expected})
    _fill(weights, attach(model, parts, how), tensors)
    return trainable(model)


@torch.no_grad()
def _fill(weights: WeightMap, attached: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
    for adapter in attached.values():
        for part, a, b in adapter.by_part():
            a.copy_(tensors[_name(weights, part.piece, "A")])
            part.piece.fill_rows(b, tensors[_name(weights, part.piece, "B")])


def _name(weights: WeightMap, piece: Piece, matrix: str) -> str:
    """What `peft` calls A or B of a checkpoint's layer."""
    return f"{WRAPPED}{weights.prefix}{module_of(piece)}.lora_{matrix}.weight"


@torch.no_grad()
def save_adapter(model: "Decoder", directory: str | Path) -> None:
    """Writes a model's adapters as `peft` reads them, without the model: float32. Raises TritiumError for a model
    without any, and for a folder that is a file.
    """
    directory = Path(directory).expanduser()
    found = adapters(model)
    if not found:
        raise TritiumError("the model has no LoRA adapters to save")
    if directory.exists() and not directory.is_dir():
        raise TritiumError(f"{directory}: is a file; give a folder")
    weights = weight_map(model)
    tensors: dict[str, Tensor] = {}
    turned, modules = False, set()
    for adapter in found.values():
        how = adapter.how
        for part, a, b in adapter.by_part():
            tensors[_name(weights, part.piece, "A")] = a.cpu().contiguous()
            tensors[_name(weights, part.piece, "B")] = part.piece.read_rows(b).cpu()
            turned |= part.piece.is_turned
            modules.add(last_name(part.piece))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": how.rank,
        "lora_alpha": how.alpha,
        "lora_dropout": how.dropout,
        "use_rslora": how.rslora,
        "target_modules": sorted(modules) if ALL_LINEAR in how.targets else list(how.targets),
        "fan_in_fan_out": turned,  # of layers whose weight is stored [in, out]; A and B are not
        "bias": "none",
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, directory / TENSORS, {"format": "pt"})
    (directory / TENSORS).chmod((directory / CONFIG).stat().st_mode)  # the library's own is for the owner alone
