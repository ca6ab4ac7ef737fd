"""What one does to a model before and after training it: initialise, freeze by name, save and load."""

import fnmatch
from pathlib import Path

import torch

from .checkpoint import save_pretrained
from .decoder import Decoder
from .errors import TritiumError, nearest
from .loading import load

INITIALISATIONS = ("normal", "xavier")


@torch.no_grad()
def initialise(model: Decoder, method: str = "normal", std: float = 0.02, seed: int = 0) -> Decoder:
    """Redraws every matrix, sets norms to one and biases to zero; the same seed gives the same weights.

    `normal`: a normal distribution of standard deviation `std`. `xavier`: uniform in +-sqrt(6 / (in + out)), which
    keeps the variance through a layer (Glorot and Bengio 2010); embeddings stay normal. Raises TritiumError for another
    method.
    """
    if method not in INITIALISATIONS:
        raise TritiumError(f"method: unknown {method!r}; {nearest(str(method), INITIALISATIONS)}")
    model.initialise(std, seed)
    if method == "normal" or model.device.type == "meta":
        return model
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embedding" not in name:
            bound = (6 / (parameter.shape[-1] + parameter.shape[-2])) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
    return model


def freeze(model: Decoder, *patterns: str) -> list[str]:
    """Stops gradients of the parameters whose names match one of the patterns, such as "embedding.*" or
    "stack.layers.0.*" (`*` is any text); none given means all. Gives their names.

    Raises TritiumError for a pattern that matches nothing.
    """
    return _require_gradients(model, patterns, False)


def unfreeze(model: Decoder, *patterns: str) -> list[str]:
    """The reverse of `freeze`."""
    return _require_gradients(model, patterns, True)


def _require_gradients(model: Decoder, patterns: tuple[str, ...], wanted: bool) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise TritiumError(f"no parameter matches {pattern!r}; {nearest(pattern, names)}")
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns or ("*",))]
    for name in chosen:
        model.get_parameter(name).requires_grad_(wanted)
    return chosen


def save_checkpoint(
    model: Decoder, directory: str | Path, dtype: str | torch.dtype | None = None, merge: bool = False
) -> None:
    """The model as config.json and safetensors that `load_checkpoint` reads: in the layout of its family's published
    checkpoints where that can express it, else in Tritium's own. `dtype` converts the weights (None keeps them);
    `merge` adds LoRA adapters to what is written.
    """
    try:
        save_pretrained(model, directory, dtype, merge=merge)
    except TritiumError as error:
        if "cannot express" not in str(error):
            raise
        save_pretrained(model, directory, dtype, layout="tritium", merge=merge)


def load_checkpoint(directory: str | Path, device: str | torch.device | None = None) -> Decoder:
    """The model of a folder that `save_checkpoint` wrote, in the dtype that it was saved in."""
    return load(directory, device=device, dtype="checkpoint", progress=False)[0]
