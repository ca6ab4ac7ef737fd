"""Checkpoints in the Hugging Face layout: found, checked, streamed into a model, and written back."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .decoder import Decoder
from .errors import TritiumError, nearest, out_of_memory_named
from .files import read_json
from .hf_config import config_from_spec, keys_read, spec_from_config
from .lora import adapters
from .quantisation import Quantiser, check_dense
from .registry import family_of_model_type, get_family
from .spec import DTYPES, ModelSpec
from .weight_map import Piece, WeightMap

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
NATIVE = "tritium"  # the layout, and its model_type, in which every tensor is called as its parameter is
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what can be a weight

T = TypeVar("T")


def read_spec(directory: Path, overrides: Mapping[str, Any] | None = None) -> ModelSpec:
    """The spec that a checkpoint's config.json describes, with `overrides` laid over its keys.

    Raises TritiumError for a folder that holds none.
    """
    if not directory.is_dir():
        raise TritiumError(f"{directory}: no such checkpoint folder")
    path = directory / "config.json"
    config = _config(directory)
    model_type = config.get("model_type", "")
    if model_type == NATIVE:
        if overrides:
            raise TritiumError(f"{path}: overrides are for the keys of transformers, which this layout does not have")
        if not isinstance(config.get("spec"), dict):
            raise TritiumError(f"{path}: a checkpoint of model_type {NATIVE!r} needs a spec")
        return ModelSpec.from_dict(config["spec"], f"{path}: spec")
    family = family_of_model_type(model_type, str(path))
    if overrides is not None:
        config = _overridden(config, overrides, keys_read(family))
    return spec_from_config(family, config, str(path))


def _overridden(config: Mapping[str, Any], overrides: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The config with the overrides laid over it. Raises TritiumError for a key that has no effect."""
    if not isinstance(overrides, Mapping):
        raise TritiumError(f"overrides: must be a mapping of config.json's keys to values, got {overrides!r}")
    for key in overrides:
        if key not in known:
            raise TritiumError(f"overrides: nothing reads the key {key!r}; {nearest(str(key), sorted(known))}")
    merged = {**config, **overrides}
    # Where transformers 5 has written the file, rope_theta and rope_scaling are together in rope_parameters.
    rotation = merged.get("rope_parameters")
    if isinstance(rotation, Mapping) and "rope_parameters" not in overrides:
        kept = {"rope_theta", "partial_rotary_factor"} if "rope_scaling" in overrides else set(rotation)
        kept -= {"rope_theta"} if "rope_theta" in overrides else set()
        merged["rope_parameters"] = {name: value for name, value in rotation.items() if name in kept}
    return merged


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise TritiumError(f"{directory}: not a checkpoint, it has no config.json")
    return read_json(path)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises TritiumError for pickles, missing shards and unsafe names."""
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise TritiumError(f"{index}: has no weight_map")
        files = []
        for name in sorted(set(map(str, weight_map.values()))):
            if name != os.path.basename(name) or not name.endswith(".safetensors") or name.startswith("."):
                raise TritiumError(f"{index}: weight_map names {name!r}; only .safetensors files beside it are read")
            if not os.path.isfile(directory / name):
                raise TritiumError(f"{directory}: the shard {name} is missing")
            files.append(directory / name)
        return files
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise TritiumError(
            f"{directory}: {pickles[0]} is a pickle, which can run code and is refused: convert it to safetensors"
        )
    raise TritiumError(
        f"{directory}: has no {SINGLE} or {INDEX} (of a hub repository pickles are not even downloaded: where it has "
        f"nothing else, convert them first)"
    )


def load_weights(
    model: Decoder,
    directory: Path,
    progress: bool = True,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
) -> None:
    """Streams a checkpoint into a model that was built on the meta device: one tensor at a time, straight to `device`.

    Every parameter is filled exactly once and every tensor used or ignored by name; otherwise one TritiumError says
    all that does not fit, before anything is allocated. With `quantise` (int8, int4) a weight is quantised as soon as
    it is whole: see quantisation.py.
    """
    files = weight_files(directory)
    found_in = [(path, *entry) for path in files for entry in read_tensors(path, entries)]
    family = None if _config(directory).get("model_type") == NATIVE else get_family(model.config.family)
    weights = WeightMap(family, model.config, model.named_parameters(), {name for _, name, _, _ in found_in})
    found: dict[str, tuple[int, ...]] = {}
    for path, stored, dtype, shape in found_in:
        name = weights.canonical(stored)
        if name in found:
            raise TritiumError(f"{path}: the tensor {name} is there twice, or also in another shard")
        if dtype not in FLOATS and not weights.ignores(name):
            raise TritiumError(f"{path}: {stored} is {dtype}; only unquantised weights ({', '.join(FLOATS)}) load")
        found[name] = shape
    weights.check(found, str(directory))

    quantiser = None if quantise is None else Quantiser(model, quantise, weights.pieces.values())
    allocate(model, device)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with tqdm(total=len(weights.pieces), desc="Loading weights", unit=" tensors", delay=1, disable=not progress) as bar:

        def stream(checkpoint: Any) -> None:
            for name in checkpoint.offset_keys():
                if piece := weights.pieces.get(weights.canonical(name)):
                    if quantiser is not None and piece.parameter in quantiser.modules:
                        quantiser.fill(piece, checkpoint.get_tensor(name))
                    else:
                        piece.fill(parameters[piece.parameter].data, checkpoint.get_tensor(name))
                    bar.update()

        for path in files:
            read_tensors(path, stream)
    if quantiser is not None:
        quantiser.finish()


def allocate(model: Decoder, device: torch.device | str) -> None:
    """Gives a meta model real, uninitialised parameters. Raises TritiumError when the device lacks the memory."""
    needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with out_of_memory_named("the weights", needed, device):
        model.to_empty(device=device)


def entries(checkpoint: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of every tensor of an open file, from its header."""
    slices = ((name, checkpoint.get_slice(name)) for name in checkpoint.keys())  # noqa: SIM118 - not a mapping
    return [(name, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices]


def read_tensors(path: Path, use: Callable[[Any], T]) -> T:
    """What `use` gives for the open file. Raises TritiumError for one that is not whole."""
    try:
        with safe_open(path, framework="pt") as checkpoint:
            return use(checkpoint)
    except (SafetensorError, OSError) as error:
        raise TritiumError(f"{path}: not a whole safetensors file ({error})") from None


@torch.no_grad()
def save_pretrained(
    model: Decoder,
    directory: str | Path,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    layout: Literal["family", "tritium"] = "family",
    merge: bool = False,
) -> None:
    """Writes config.json and safetensors, in the layout of the family's published checkpoints or in Tritium's own.

    The latter can express any spec, but nothing else reads it. `dtype` converts the weights (None keeps them). Files
    above `shard_bytes` are split and indexed; weight files of an earlier save in the folder are removed. `merge` adds
    LoRA adapters to what is written, and leaves the model as it is. Raises TritiumError for a dtype, or a trait of the
    model, that the layout cannot express, for adapters that are not to be merged, and for a quantised model.
    """
    check_dense(model, "save_pretrained")
    if layout not in ("family", NATIVE):
        raise TritiumError(f"layout: unknown {layout!r}; {nearest(str(layout), ('family', NATIVE))}")
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise TritiumError(f"{directory}: is a file; give a folder")
    adapted = {f"{name}.weight": adapter for name, adapter in adapters(model).items()}
    if adapted and not merge:
        raise TritiumError("the model has LoRA adapters: merge them (merge_lora, or merge=True here) or save_adapter")
    spec = model.config
    family = None if layout == NATIVE else get_family(spec.family)
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype or model.dtype
    if wanted not in DTYPES.values():
        raise TritiumError(f"dtype: checkpoints are written as {', '.join(DTYPES)}; give dtype= one of them")
    assert wanted is not None
    spec = spec.replace(dtype=next(name for name, value in DTYPES.items() if value == wanted))
    native = {"model_type": NATIVE, "spec": spec.as_dict()}
    config = native if family is None else config_from_spec(family, spec)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    parameters = {name: value for name, value in model.named_parameters() if ".adapter." not in name}
    pieces = WeightMap(family, spec, parameters.items()).pieces.values()
    shards: list[list[Piece]] = [[]]
    size = total = 0
    for piece in pieces:
        nbytes = math.prod(piece.shape) * wanted.itemsize
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += nbytes
        total += nbytes

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for piece in shard:
            value: Tensor = parameters[piece.parameter]
            value = adapted[piece.parameter].merged(value) if piece.parameter in adapted else value
            tensors[piece.source] = piece.read(value).to("cpu", wanted)
        save_file(tensors, directory / name, {"format": "pt"})
        (directory / name).chmod((directory / "config.json").stat().st_mode)  # the library's own is for the owner alone
        weight_map.update(dict.fromkeys(tensors, name))
    for path in (directory / INDEX, directory / SINGLE, *directory.glob("model-*-of-*.safetensors")):
        if path.name not in weight_map.values():
            path.unlink(missing_ok=True)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
