"""A model of `transformers` as a Decoder, and a Decoder as a model of `transformers`: two models on the same memory.

A parameter that is one tensor on both sides is one Parameter object. Where ours is several of theirs in one (q, k and
v; gate and up) or theirs turned (GPT-2), ours is the memory and their Parameter objects hold views of it. So whatever
changes a weight in place, an optimizer or a checkpoint, changes it for both. What no view can express is copied: q, k
and v of MobileLLM-R1 and Llama 4, whose rotation pairs neighbouring rows where ours pairs halves.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from ..errors import TritiumError
from ..hf_config import config_from_spec, spec_from_config
from ..lora import adapters
from ..quantisation import check_dense
from ..registry import family_of_model_type, get_family
from ..spec import DTYPES
from ..weight_map import Piece, WeightMap
from . import packages


@torch.no_grad()
def from_transformers(model: Any) -> Decoder:
    """Our decoder on the tensors of a live causal language model of `transformers`, on its device and in its dtype.

    `model` goes on working, with the same Parameter objects, names and values; what our kernels need as one tensor
    becomes one, a weight at a time, and theirs are views of it. `decoder.copied` names what had to be copied and goes
    its own way from here. Moving or casting either model (`to`, `half`) afterwards takes only the common objects along:
    do that before. Dropout is not taken over.

    Raises TritiumError for a model without a language modelling head or of an unknown family, with an adapter of
    PEFT, quantised, offloaded, spread over devices, or of several dtypes.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    where = f"from_transformers: this {type(model).__name__}"
    _check(model, where)
    config = model.config.to_dict()
    family = family_of_model_type(config["model_type"], where)
    like = next(iter(model.parameters()))
    name = next(name for name, dtype in DTYPES.items() if dtype == like.dtype)
    spec = spec_from_config(family, config, where).replace(dtype=name)
    if spec.tie_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise TritiumError(f"{where} has a head of its own, and its config ties it: set config.tie_word_embeddings")
    with torch.device("meta"):
        decoder = Decoder(spec).to(like.dtype)

    theirs = dict(model.named_parameters(remove_duplicate=False))
    weights = WeightMap(family, spec, decoder.named_parameters(), theirs)
    theirs = {weights.canonical(name): parameter for name, parameter in theirs.items()}
    weights.check({name: tuple(parameter.shape) for name, parameter in theirs.items()}, where)
    copied: list[str] = []
    for name, pieces in _by_parameter(weights).items():
        shape = decoder.get_parameter(name).shape
        _put(decoder, name, _ours(pieces, theirs, shape))
        copied += [piece.source for piece in pieces if not _are_views(pieces)]
    decoder.copied = tuple(copied)
    return decoder.train(model.training)


@torch.no_grad()
def to_transformers(decoder: Decoder) -> Any:
    """A model of `transformers` (a PreTrainedModel) on the tensors of a decoder; `from_transformers` backwards.

    `decoder.copied` names afterwards what had to be copied. What a spec does not hold, such as the ids that end a text,
    is for the caller to set. Raises TritiumError for a family that `transformers` does not have, a spec that its
    config.json cannot express, a quantised or divided model, one with adapters, and where `transformers` is absent.
    """
    where = "to_transformers"
    check_dense(decoder, where)
    if adapters(decoder):
        raise TritiumError(f"{where}: the model has LoRA adapters: merge them first (tritium.merge_lora)")
    if decoder.exchange is not None:
        raise TritiumError(f"{where}: the model's layers are divided over processes; load it whole")
    hf = packages.theirs("models.auto")
    family = get_family(decoder.config.family)
    name = next((name for name, dtype in DTYPES.items() if dtype == decoder.dtype), None)
    if name is None:
        raise TritiumError(f"{where}: takes {', '.join(DTYPES)}, got {decoder.dtype}")
    config = config_from_spec(family, decoder.config.replace(dtype=name))
    if (kind := config.pop("model_type")) not in hf.CONFIG_MAPPING:
        raise TritiumError(
            f"{where}: transformers has no {kind!r} (family {family.name}); tritium.save_pretrained writes it"
        )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(kind, **config))
    _make_buffers(model, decoder.device)

    objects = dict(model.named_parameters(remove_duplicate=False))
    weights = WeightMap(family, decoder.config, decoder.named_parameters(), objects)
    names: dict[int, list[str]] = {}  # of one object, such as a tied embedding
    for name, parameter in objects.items():
        names.setdefault(id(parameter), []).append(name)
    theirs = {weights.canonical(name): parameter for name, parameter in objects.items()}
    weights.check({name: tuple(parameter.shape) for name, parameter in theirs.items()}, where)
    copied: list[str] = []
    for parameter_name, pieces in _by_parameter(weights).items():
        parameter = decoder.get_parameter(parameter_name)
        for piece in pieces:
            for name in names[id(theirs[piece.source])]:
                _put(model, name, _theirs(piece, pieces, parameter))
            copied += [] if _are_views(pieces) else [piece.source]
    decoder.copied = tuple(copied)
    return model.train(decoder.training)


def _check(model: Any, where: str) -> None:
    """Raises TritiumError for a model that is not one whole set of weights."""
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "to_dict"):
        raise TritiumError(f"{where} is no model of transformers; tritium.load takes a folder or a hub id")
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise TritiumError(f"{where} has an adapter of PEFT: merge it first (model.merge_and_unload())")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise TritiumError(f"{where} is quantised: load it in its own dtype (tritium.load quantises by quantise=)")
    head: Any = model.get_output_embeddings
    if head() is None:
        raise TritiumError(f"{where} has no language modelling head: load it by AutoModelForCausalLM")
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        raise TritiumError(f"{where} has weights that are offloaded or not loaded: put it on one device (model.to)")
    if len(devices) > 1:
        raise TritiumError(f"{where} lies on {', '.join(sorted(map(str, devices)))}: put it on one device (model.to)")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        raise TritiumError(
            f"{where} has {', '.join(sorted(map(str, dtypes)))}: give all parameters one of {', '.join(DTYPES)}"
        )


def _by_parameter(weights: WeightMap) -> dict[str, list[Piece]]:
    """The pieces of each of our parameters."""
    found: dict[str, list[Piece]] = {}
    for piece in weights.pieces.values():
        found.setdefault(piece.parameter, []).append(piece)
    return found


def _are_views(pieces: list[Piece]) -> bool:
    """Whether theirs can be views of ours. All or none: half a weight in common would change by halves."""
    return all(piece.is_view for piece in pieces)


def _ours(pieces: list[Piece], theirs: Mapping[str, nn.Parameter], shape: torch.Size) -> nn.Parameter:
    """Our parameter of these of theirs, of which they become views where they can."""
    first = theirs[pieces[0].source]
    if pieces[0].is_same:
        return first
    whole = _whole(pieces, theirs, shape)
    if whole is None:
        whole = first.new_empty(shape)
        for piece in pieces:
            tensor = theirs[piece.source]
            piece.fill(whole, tensor)
            if _are_views(pieces):
                tensor.data = piece.view(whole)
    return nn.Parameter(whole, requires_grad=any(theirs[piece.source].requires_grad for piece in pieces))


def _whole(pieces: list[Piece], theirs: Mapping[str, nn.Parameter], shape: torch.Size) -> Tensor | None:
    """The contiguous tensor of which theirs are views already, as after an earlier conversion; None if they are not."""
    if not _are_views(pieces):
        return None
    outline = torch.empty(shape, device="meta")
    storages, starts = set(), set()
    for piece in pieces:
        tensor, place = theirs[piece.source].data, piece.view(outline)
        if tensor.stride() != place.stride():
            return None
        storages.add(tensor.untyped_storage().data_ptr())
        starts.add(tensor.storage_offset() - place.storage_offset())
    if len(storages) > 1 or len(starts) > 1:
        return None
    return theirs[pieces[0].source].data.as_strided(shape, outline.stride(), starts.pop())


def _theirs(piece: Piece, pieces: list[Piece], ours: nn.Parameter) -> nn.Parameter:
    """Their parameter of ours: itself, a view or a copy."""
    if piece.is_same:
        return ours
    tensor = piece.view(ours.data) if _are_views(pieces) else piece.read(ours.data).clone()
    return nn.Parameter(tensor, requires_grad=ours.requires_grad)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def _make_buffers(model: Any, device: torch.device) -> None:
    """Fills the buffers, which no checkpoint holds, of a model that was built on the meta device."""
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        for name, buffer in own.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if own:
            model._init_weights(module)
