"""A whole model with random weights, and its counterpart in `transformers` over the same storages."""

import copy
import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.hf_config import config_from_spec
from tritium.runtime.loading import load_model
from tritium.runtime.registry import get_family
from tritium.runtime.weight_map import WeightMap

from .shapes import spec


class Subject:
    """A model, its counterpart in `transformers`, and the truth about it."""

    def __init__(self, name: str, device: torch.device) -> None:
        # Norms of one and small matrices would hide much: 0.05 gives logits that are far from flat.
        self.model = load_model(spec(name), device=device).initialise(std=0.05).requires_grad_(False)
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def twin(self) -> Any:
        return twin_of(self.model)

    @functools.cached_property
    def compiled_twin(self) -> Any:
        """The twin's forward, compiled and captured for each shape that it meets."""
        torch._dynamo.config.recompile_limit = 256
        return torch.compile(self.twin.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @functools.cached_property
    def pairs_neighbours(self) -> bool:
        """Whether the twin rotates neighbouring numbers of a head, not its halves: its keys lie in that order."""
        family, parameters = get_family(self.model.config.family), self.model.named_parameters()
        pieces = WeightMap(family, self.model.config, parameters).pieces.values()
        return any(piece.save for piece in pieces if piece.source.endswith("k_proj.weight"))

    def on(self, backend: str, **modes: bool) -> Decoder:
        """The same weights on a backend, as a model of its own."""
        return copy.copy(self.model).use_backend(backend, **modes)

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[S, V] after each token: the PyTorch path's at the model's dtype, and the truth."""
        key = tuple(tokens[0].tolist())
        if key not in self._known:
            wide = torch.float64 if self.model.dtype == torch.float32 else torch.float32
            exact = copy.deepcopy(self.model).to(wide).use_backend("torch")
            at_dtype = self.on("torch")(tokens).logits[0]
            self._known = {key: (at_dtype, exact(tokens).logits[0])}
        return self._known[key]


_held: dict[tuple[str, torch.device], Subject] = {}  # one at most: each fills much of a device


def holds(name: str, device: torch.device) -> bool:
    """Whether the model is there already; another that was there is let go."""
    if _held and (name, device) not in _held:
        _held.clear()
        torch.compiler.reset()
        gc.collect()
    return bool(_held)


def subject(name: str, device: torch.device) -> Subject:
    if not holds(name, device):
        _held[name, device] = Subject(name, device)
    return _held[name, device]


def twin_of(model: Decoder, trained: bool = False) -> Any:
    """`transformers`' model over views of the same parameters; `trained`: and over views of their gradients, which must
    be there. Only rows that a checkpoint holds in another order are copies, so that the twin of a large model has room
    beside it. Raises TritiumError where `transformers` is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise TritiumError("this benchmark compares with transformers: pip install 'tritium[dev]'") from None
    family = get_family(model.config.family)
    values = config_from_spec(family, model.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=None)  # a pad would have no gradient
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype)

    def share(name: str, owner: Tensor, read: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        holder, _, leaf = name.rpartition(".")
        shared = nn.Parameter(read(owner.detach()), requires_grad=trained)
        if trained:
            assert owner.grad is not None
            shared.grad = read(owner.grad)
        setattr(twin.get_submodule(holder), leaf, shared)

    parameters = dict(model.named_parameters())
    for piece in WeightMap(family, model.config, model.named_parameters()).pieces.values():
        if ".experts." not in piece.source:
            share(piece.source, parameters[piece.parameter], piece.read)
    for index, has_experts in enumerate(model.config.expert_layers):  # which it keeps stacked, as we do
        if has_experts:
            for ours, theirs in (("up", "gate_up_proj"), ("down", "down_proj")):
                name = f"model.layers.{index}.mlp.experts.{theirs}"
                share(name, parameters[f"stack.layers.{index}.mlp.{ours}"])
    twin.tie_weights()
    for module in twin.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # angles, computed when it is made
            with torch.device(model.device):
                module._buffers.update(type(module)(config)._buffers)
    assert not any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers()))
    return twin.train(trained)
