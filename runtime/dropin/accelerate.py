"""One line for a live model of `transformers`: `report = tritium.accelerate(model)`.

Per instance and in place: a module that is known gets another `forward` (patches.py), on the same Parameter objects;
the attention's and the experts' functions are set as `transformers` sets them, in a config of the model's own; classes
and other models stay as they are. Operations are chosen by device when they run, so the model may go on to another.
"""

import copy
import functools
from collections import Counter
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

from ...kernels import launch
from ..errors import TritiumError
from .losses import causal_lm_loss, head_and_loss
from .patches import KNOWN, Forward, body, check_silu, kind_of, part_of
from .registration import NAME, register_transformers

MARK = "_tritium"  # on the model: what was done to it
BEFORE = "_tritium_attention"  # on its body: the attention that it had
HEADS = {"ForCausalLM", "LMHeadModel"}
BODIES = {"Model", "TextModel"}
PLAIN = {
    "Linear": "a matrix product, left to torch, adapters and quantisation",
    "Conv1D": "a matrix product, left to torch, adapters and quantisation",
    "Embedding": "a look-up, left to torch",
    "ModuleList": "holds other modules",
}
PARTS = {
    "SparseMoeBlock": "its parts are looked at one by one",
    "TopKRouter": "a small matrix product and its largest, left to torch",
    "Router": "a small matrix product and its largest, left to torch",
    "Moe": "its parts are looked at one by one",
    "Experts": "Llama 4's experts multiply before the activation, which our experts do not",
    "L2Norm": "its attention does its work",
    "Block": "its parts are looked at one by one",
    "MLP": "its activation is not a gated silu",
}


@dataclass
class Mark:
    """What was done to one model. It is copied with the model, and then speaks of the copy."""

    patched: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    logits: bool = True
    own_loss: bool = False
    configs: list[tuple[Any, Any, Any]] = field(default_factory=list)  # with the attention and experts they had


class Report:
    """What `accelerate` did: `patched` and `left` are by module name; printed, a summary.

    patched: what each patched module became. left: of every other, why. already: an earlier call did it.
    notes: what else is to be known.
    """

    def __init__(self, model: Any, mark: Mark, already: bool) -> None:
        self._model = model
        self.patched, self.left, self.already = mark.patched, mark.left, already
        where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        why = launch.obstacle(where)
        slow = f"no kernel runs on {where} ({why}): its definition does, and nothing gets faster"
        self.notes = [] if why is None else [slow]

    def undo(self) -> None:
        """Makes the model what it was, to the bit; harmless where it is already."""
        mark = self._model.__dict__.pop(MARK, None)
        if mark is not None:
            _undo(self._model, mark)

    def __str__(self) -> str:
        modules = dict(self._model.named_modules())

        def lines(found: dict[str, str]) -> list[str]:
            kinds = Counter((type(modules.get(name)).__name__, what) for name, what in found.items())
            return [f"  {count} x {kind}: {what}" for (kind, what), count in kinds.items()]

        done = "already accelerated" if self.already else "accelerated"
        return "\n".join(
            [
                f"{type(self._model).__name__} {done}: {len(self.patched)} of "
                f"{len(self.patched) + len(self.left)} modules patched",
                *lines(self.patched),
                f"{len(self.left)} left as they are",
                *lines(self.left),
                *(f"note: {note}" for note in self.notes),
            ]
        )

    __repr__ = __str__


def accelerate(model: Any, *, logits: bool = True) -> Report:
    """Runs a live model of `transformers` (or a PEFT model around one, with any head) on our operations, in place.

    The parameters stay the same objects and the state dict keeps its names; `report.undo()` gives the model back as it
    was. A second call changes nothing and says so (`report.already`). With `logits=False` the head and the loss are one
    operation wherever labels are given: `out.logits` is None there, and no logits are held.

    Raises TritiumError for what is no model of `transformers`, a model of which nothing can be patched, and one that is
    accelerated already with another `logits`.
    """
    root = _root(model)
    mark: Mark | None = root.__dict__.get(MARK)
    if mark is not None and any(_patched_slots(module) for module in root.modules()):
        if mark.logits != logits:
            raise TritiumError(f"accelerate: the model is accelerated with logits={mark.logits}: undo that first")
        return Report(root, mark, already=True)
    if any(type(parameter.data).__name__ == "DTensor" for parameter in root.parameters()):
        raise TritiumError("accelerate: the model's parameters are divided over processes; accelerate it before that")
    register_transformers()
    mark = Mark(logits=logits)
    _patch_modules(root, mark)
    _set_functions(model, root, mark)
    _patch_loss(root, mark)
    if not mark.patched:
        kind = type(root).__name__
        raise TritiumError(f"accelerate: nothing of this {kind} can be patched; known are {KNOWN}")
    setattr(root, MARK, mark)
    return Report(root, mark, already=False)


def _root(model: Any) -> Any:
    """The model of transformers in what was given."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    ours = (module for module in modules if hasattr(module, "_can_record_outputs") and hasattr(module, "config"))
    if (root := next(ours, None)) is None:
        raise TritiumError(f"accelerate: takes a model of transformers, got {type(model).__name__}")
    return root


def _patch_modules(root: Any, mark: Mark) -> None:
    """Everything but the rotations first, as these ask what became of the attentions."""
    modules = dict(root.named_modules())
    kinds = {name: kind_of(module, modules.get(name.rpartition(".")[0])) for name, module in modules.items()}
    rotary = {name for name, module in modules.items() if part_of(module)[1] == "RotaryEmbedding"}
    for name in [*(name for name in modules if name not in rotary), *rotary]:
        module, kind = modules[name], kinds[name]
        if kind is None:
            mark.left[name] = _reason(module)
            continue
        why = _replaced(module) or kind.check(module)
        if why is None and name in rotary and (other := _other_user(name, modules, mark)):
            why = f"{other}, which uses it, is left as it is"
        if why is None:
            _put(module, kind.make)
            mark.patched[name] = kind.what
        else:
            mark.left[name] = why


def _other_user(name: str, modules: dict[str, Any], mark: Mark) -> str | None:
    """An attention with positions beside this rotation that does not take its table."""
    beside = name.rpartition(".")[0]
    for other, module in modules.items():
        attends = other.startswith(beside) and part_of(module)[1] == "Attention"
        if attends and other not in mark.patched and getattr(module, "use_rope", True):
            return other
    return None


def _reason(module: nn.Module) -> str:
    part = part_of(module)[1]
    if part in PARTS:
        return PARTS[part]
    if hasattr(module, "_can_record_outputs"):
        return "a whole model: its parts are looked at one by one"
    if "activation" in type(module).__name__.lower():
        return "its feed-forward does its work, where that is patched"
    return PLAIN.get(type(module).__name__, "no operation of ours does what it does")


def _replaced(module: nn.Module) -> str | None:
    slot = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    bound = module.__dict__.get(slot)
    same = bound is None or getattr(bound, "__func__", None) is type(module).forward
    return None if same else "its forward has been replaced by something else"


@functools.cache
def patch(make: Any, cls: Any) -> Forward:
    """The forward for one class, with the signature of its own, as `generate` and others look at that."""
    forward = functools.wraps(cls.forward)(make(cls))
    setattr(forward, MARK, True)
    return forward


def _put(module: Any, make: Any) -> None:
    """Under a hook of accelerate's, which moves tensors between devices, if there is one."""
    forward = patch(make, module.__class__)
    slot = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    setattr(module, slot, MethodType(forward, module))


def _patched_slots(module: nn.Module) -> list[str]:
    slots = (slot for slot in ("forward", "_old_forward") if slot in module.__dict__)
    return [slot for slot in slots if MARK in getattr(getattr(module.__dict__[slot], "__func__", None), "__dict__", {})]


def _set_functions(model: Any, root: Any, mark: Mark) -> None:
    """Attention and experts, which transformers looks up by a name in the config of the module."""
    attending: dict[int, Any] = {}
    mixing: dict[int, Any] = {}
    for name, module in root.named_modules():
        family, part = part_of(module)
        if part == "Attention":
            why, found, what = _attention_obstacle(module), attending, "our attention"
        elif (family, part) == ("qwen3_moe", "Experts"):
            why, found, what = check_silu(module), mixing, "our experts"
        else:
            continue
        if why is None:
            found[id(module.config)] = module.config
            mark.patched[name] = f"{mark.patched[name]}; {what}" if name in mark.patched else what
            mark.left.pop(name, None)
        elif name not in mark.patched:
            mark.left[name] = why
    for key, config in {**attending, **mixing}.items():
        own = copy.deepcopy(config)  # another model may have been made from the same one
        for module in model.modules():
            if module.__dict__.get("config") is config:
                module.config = own
        mark.configs.append((own, own._attn_implementation, own._experts_implementation))
        if key in attending:
            own._attn_implementation = NAME
        if key in mixing:
            own._experts_implementation = NAME
    for name, module in root.named_modules():
        config_of: Any = getattr(module, "config", None)
        before = next((before for own, before, _ in mark.configs if own is config_of), None)
        attends = before is not None and config_of._attn_implementation == NAME
        if attends and part_of(module)[1] in BODIES and _replaced(module) is None:
            _put(module, body)
            setattr(module, BEFORE, before)
            mark.patched[name] = "gives attention weights, where asked for, by the function it had"
            mark.left.pop(name, None)


def _attention_obstacle(module: Any) -> str | None:
    config = module.config
    if getattr(module, "is_cross_attention", False) or getattr(config, "add_cross_attention", False):
        return "it attends to an encoder"
    if getattr(module, "reorder_and_upcast_attn", False):
        return "it computes its scores in float32, reordered"
    if config.output_attentions:
        return "its config asks for the attention's weights"
    return None


def _patch_loss(root: Any, mark: Mark) -> None:
    name = part_of(root)[1]
    if name not in HEADS or getattr(root.loss_function, "__name__", "") != "ForCausalLMLoss":
        return
    mark.own_loss = "_loss_function" not in root.__dict__
    if mark.own_loss:
        root.loss_function = causal_lm_loss
        what = "the loss in one kernel"
        if not mark.logits and _replaced(root) is None:
            _put(root, head_and_loss)
            what = "head and loss in one operation"
        mark.patched[""] = what
        mark.left.pop("", None)


def _undo(root: Any, mark: Mark) -> None:
    for module in root.modules():
        for slot in _patched_slots(module):
            if slot == "forward":
                del module.forward
            else:
                module._old_forward = MethodType(type(module).forward, module)
        module.__dict__.pop(BEFORE, None)
    for config, before, experts in mark.configs:
        if config._attn_implementation == NAME:
            config._attn_implementation = before
        if config._experts_implementation == NAME:
            config._experts_implementation = experts
    if mark.own_loss and root.__dict__.get("_loss_function") is causal_lm_loss:
        del root._loss_function
