"""The model of a run, from random weights or from a checkpoint, as its configuration asks for it."""

from pathlib import Path

import torch

from ..checkpoint import load_weights, read_spec
from ..decoder import Decoder
from ..errors import TritiumError
from ..loading import load_config, load_model, pick_device, resolve_checkpoint
from ..lora import add_lora
from ..model_utils import freeze, initialise
from ..registry import families, get_family
from ..spec import DTYPES, ModelSpec
from ..tokenizer import Tokenizer
from .config import Initialise, TrainingConfig
from .vocabulary import Vocabulary, of_folder


def build_model(config: TrainingConfig, device: torch.device | None = None) -> tuple[Decoder, Vocabulary | None]:
    """The model, with float32 weights, and the tokenizer of the checkpoint that it comes from; on `device`, or where
    the configuration says. Under adapters, which are float32, the weights are the checkpoint's own.

    Raises TritiumError for a model, override, adapter or device that is not there or does not fit.
    """
    device = pick_device(device or config.device)
    spec, folder = _find(config)
    if config.lora is not None and (folder is None or config.initialise is not None):
        raise TritiumError("lora: is for a checkpoint's weights: give one as the model, and no initialise")
    if config.overrides:
        try:
            spec = spec.replace(**config.overrides)
        except TritiumError as error:
            raise TritiumError(f"overrides: {error}") from None
    if folder is None or config.initialise is not None:
        model = load_model(spec, device=device, dtype=torch.float32)
        _draw(model, config.initialise or Initialise(), config.seed)
    else:
        with torch.device("meta"):
            model = Decoder(spec).to(torch.float32 if config.lora is None else DTYPES[spec.dtype])
        load_weights(model, folder, progress=False, device=device)
    model.use_backend(config.backend, batch_invariant=config.batch_invariant)
    model.compute_in(DTYPES[config.compute_dtype])
    if config.gradient_checkpointing is not None:
        model.enable_gradient_checkpointing(keep=config.gradient_checkpointing)
    if (lora := config.lora) is not None:
        add_lora(model, lora.rank, lora.alpha, lora.targets, lora.dropout, lora.rslora, config.seed)
    if config.freeze:
        freeze(model, *config.freeze)
    return model, None if folder is None else _own_vocabulary(folder, spec)


def _find(config: TrainingConfig) -> tuple[ModelSpec, Path | None]:
    """The spec, and the checkpoint folder where the model is one."""
    if config.model.endswith((".yaml", ".yml")):
        return load_config(config.model), None
    head, _, size = config.model.partition(":")
    if config.initialise is not None and head.lower() in families():  # of a size without weights, or without a download
        family = get_family(head)
        return family.spec(family.size_name(size or None)), None
    folder = resolve_checkpoint(config.model, progress=False)
    return read_spec(folder), folder


def _own_vocabulary(folder: Path, spec: ModelSpec) -> Vocabulary | None:
    settings = get_family(spec.family).tokenizer
    return of_folder(folder, settings) if Tokenizer.found_in(folder, settings) else None


@torch.no_grad()
def _draw(model: Decoder, how: Initialise, seed: int) -> None:
    initialise(model, how.method, how.std, seed)
    if how.scale_residual:
        scale = (2 * model.config.num_cache_slots) ** -0.5
        for name, parameter in model.named_parameters():
            if name.endswith((".attention.out.weight", ".mlp.down.weight", ".mlp.down")):
                parameter.mul_(scale)
