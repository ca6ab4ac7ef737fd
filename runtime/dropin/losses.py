"""The loss of a causal language model of `transformers`, by our operations."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import cross_entropy, linear_cross_entropy  # noqa: F401 - registers the operations
from ...kernels.cross_entropy import IGNORE_INDEX
from .patches import OPERATIONS, Forward, fits, has_hooks


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """`ForCausalLMLoss` in one pass over the logits: labels move by one place, the mean is over those that count.

    Where no label counts it is 0, of which `transformers` makes NaN.
    """
    targets = _targets(labels, shift_labels, ignore_index).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = OPERATIONS.cross_entropy(logits.reshape(-1, vocab_size), targets, ignore_index, 0.0, 0.0, reduction)
    return _divided(loss, num_items_in_batch)


def _targets(labels: Tensor | None, shift_labels: Tensor | None, ignore_index: int) -> Tensor:
    """Each place's next token, [T]."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def _divided(loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def head_and_loss(cls: type[nn.Module]) -> Forward:
    """The forward of a causal language model which, given labels, makes no logits: `out.logits` is None.

    What asks for more than a loss (some logits, the router's, a tuple) runs as before, and so does a head that is
    more than a matrix.
    """
    names = sys.modules[cls.__module__]
    outputs = ("MoeCausalLMOutputWithPast", "CausalLMOutputWithCrossAttentions", "CausalLMOutputWithPast")
    output = next(getattr(names, name) for name in outputs if hasattr(names, name))

    def forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("labels") is None or not _asks_for_the_loss_alone(self, kwargs):
            return cls.forward(self, input_ids, *args, **kwargs)
        kwargs.pop("logits_to_keep", None)
        labels = kwargs.pop("labels")
        body = self.transformer if hasattr(self, "transformer") else self.model
        found = body(input_ids, **kwargs)
        hidden, weight = found[0], self.lm_head.weight
        if torch.is_autocast_enabled(hidden.device.type):  # as it would cast a matrix product
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        ignore_index, count = kwargs.get("ignore_index", IGNORE_INDEX), kwargs.get("num_items_in_batch")
        targets = _targets(labels, kwargs.get("shift_labels"), ignore_index).to(hidden.device)
        options = (ignore_index, 0.0, 0.0, "mean" if count is None else "sum")
        loss = OPERATIONS.linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, targets, *options)
        extra = {name: found.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        return output(loss=_divided(loss, count), logits=None, **extra)

    return forward


def _asks_for_the_loss_alone(model: Any, kwargs: dict[str, Any]) -> bool:
    def asked(name: str, default: bool) -> bool:
        value = kwargs.get(name)
        return bool(getattr(model.config, name, default) if value is None else value)

    head, keep = model.lm_head, kwargs.get("logits_to_keep", 0)
    plain = type(head) is nn.Linear and head.bias is None and not has_hooks(head) and fits(head.weight)
    whole = isinstance(keep, int) and keep == 0
    return plain and whole and asked("return_dict", True) and not asked("output_router_logits", False)
