"""From a name to a model: hub ids, local folders and family:size, with their tokenizer and spec."""

import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import allocate, load_weights, read_spec
from .decoder import Decoder
from .errors import TritiumError, nearest
from .quantisation import Quantiser, check_scheme
from .registry import MODELS, families, get_family, read_size
from .spec import DTYPES, ModelSpec
from .tokenizer import Tokenizer

Loaded = tuple[Decoder, Tokenizer | None, ModelSpec]

# What a checkpoint is read from; anything else in a repository is left there.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.tiktoken"]
BUNDLED = "mobilellm:shakespeare"


def load(
    name: str | Path,
    *,
    variant: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    quantise: str | None = None,
    progress: bool = True,
) -> Loaded:
    """(model, tokenizer, spec) of a hub id, a local checkpoint folder, or `family[:size]`.

    `device=None` is the GPU where there is one. `dtype="checkpoint"` is the checkpoint's own; `"auto"` is that on a GPU
    and float32 on a CPU, where half precision saves memory but no time. `overrides` are laid over the keys of the
    checkpoint's config.json, such as its rope_scaling (see docs/architecture/positional-encoding.md). `quantise="int8"`
    or `"int4"` stores the weights in as many bits (see docs/architecture/quantisation.md). The tokenizer is None where
    the checkpoint has none. Raises TritiumError with one line that says what is wrong.
    """
    check_scheme(quantise)
    directory = resolve_checkpoint(str(name), variant, progress)
    device = pick_device(device)
    spec = read_spec(directory, overrides)
    dtype = pick_dtype(dtype, spec, device)
    with torch.device("meta"):
        model = Decoder(spec, backend).to(dtype)
    load_weights(model, directory, progress, device, quantise)
    settings = get_family(spec.family).tokenizer
    tokenizer = Tokenizer.from_pretrained(directory, settings) if Tokenizer.found_in(directory, settings) else None
    return model.eval(), tokenizer, spec


def load_pretrained_model(
    model_type: str, size: str | None = None, variant: str | None = None, **options: Any
) -> Loaded:
    """(model, tokenizer, spec) of a family's published size: `load("family:size")` with its parts apart.

    The family's own defaults stand in for what is None. `options` are those of `load`.
    """
    family = get_family(model_type)
    return load(f"{family.name}:{family.size_name(size)}", variant=variant, **options)


def family_loader(name: str) -> Callable[..., Loaded]:
    """`load_<family>(size=..., variant=..., **options)`. Raises AttributeError for an unknown family."""
    if name not in families():
        raise AttributeError(f"module 'tritium' has no attribute 'load_{name}'; {nearest(name, families())}")
    return functools.partial(load_pretrained_model, name)


def load_config(path: str | Path) -> ModelSpec:
    """The spec of a size's YAML file; its family is the family.yaml beside it, or the file's own `family` key.

    A relative path is looked for here, then in the installed package.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file() and not path.is_absolute() and (MODELS.parent / path).is_file():
        path = MODELS.parent / path
    return read_size(path)[0]


def load_model(
    config: ModelSpec,
    model_type: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    quantise: str | None = None,
    seed: int = 0,
) -> Decoder:
    """A model of this spec with random weights. `model_type`, where given, must be the spec's family, or the one under
    which its size is listed. `quantise` as in `load`: the same weights, in fewer bits.
    """
    check_scheme(quantise)
    if not isinstance(config, ModelSpec):
        raise TritiumError(f"config: must be a ModelSpec, as load_config gives it, got {type(config).__name__}")
    if model_type is not None and config.family not in get_family(model_type).members:
        raise TritiumError(f"model_type {model_type!r} does not fit a spec of the family {config.family!r}")
    device = pick_device(device)
    with torch.device("meta"):
        model = Decoder(config, backend).to(pick_dtype(dtype, config, device))
    if quantise is None:
        allocate(model, device)
        return model.initialise(seed=seed).eval()
    quantiser = Quantiser(model, quantise)
    allocate(model, device)
    quantiser.initialise(seed=seed)
    return model.eval()


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU where there is one. Raises TritiumError for one that is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise TritiumError(f"device: unknown {device!r}; for example cpu, cuda, cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise TritiumError(f"device: {chosen} is not there; torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type == "meta":
        raise TritiumError("device: meta holds no values; give one that computes, such as cpu or cuda")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):  # what a torch built without it raises
        raise TritiumError(f"device: {chosen} is not there, or this torch was built without it") from None
    return chosen


def pick_dtype(dtype: str | torch.dtype, spec: ModelSpec, device: torch.device) -> torch.dtype:
    """What `load` and `load_model` make of a dtype. Raises TritiumError for an unknown one."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if dtype == "checkpoint":
        return spec.torch_dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else spec.torch_dtype
    if dtype not in DTYPES:
        raise TritiumError(f"dtype: unknown {str(dtype)!r}; {nearest(str(dtype), ['auto', 'checkpoint', *DTYPES])}")
    return DTYPES[dtype]


def resolve_checkpoint(name: str, variant: str | None = None, progress: bool = True) -> Path:
    """The local folder of a checkpoint, downloaded first where `name` is a hub id or a published family:size."""
    folder = os.path.expanduser(name)  # unlike pathlib's, it does not raise for what cannot be
    if os.path.isdir(folder):
        return Path(folder)
    head, _, size = name.partition(":")
    if head.lower() in families():
        family = get_family(head)
        where = family.checkpoint(family.size_name(size or None), variant)
        return Path(where) if os.path.isdir(where) else download(where, progress)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return download(name, progress)
    if ":" in name:
        raise TritiumError(f"unknown model family {head!r}; {nearest(head, families())}")
    raise TritiumError(f"{name}: no such checkpoint folder, and neither a hub id (owner/name) nor a family:size")


def download(repository: str, progress: bool = True) -> Path:
    """A hub repository's local snapshot, downloaded where not cached. HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold."""
    import huggingface_hub
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quieted = not progress and not are_progress_bars_disabled()
    if quieted:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client, its HTTP library and the network raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TritiumError(f"{repository}: no such folder here, and the hub did not give it ({reason})") from None
    finally:
        if quieted:
            enable_progress_bars()
