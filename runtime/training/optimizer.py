"""AdamW and what goes round it: groups, the learning rate, clipping, averaged weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from .config import Optimizer, Schedule


def build_optimizer(model: Decoder, settings: Optimizer) -> torch.optim.AdamW:
    """PyTorch's fused AdamW over the parameters that want gradients; only matrices other than embeddings decay."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decaying if parameter.dim() > 1 and "embedding" not in name else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, settings: Optimizer, schedule: Schedule) -> float:
    """Of a step, from 0 on: a linear warm-up, then half a cosine to the minimum (Loshchilov and Hutter 2017)."""
    warmup, top, bottom = schedule.warmup_steps, settings.learning_rate, settings.minimum_rate
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    if schedule.decay == "constant":
        return top
    done = (step - warmup) / (schedule.steps - warmup)
    return bottom + (top - bottom) * (1 + math.cos(math.pi * done)) / 2


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread over several (a DTensor). Changes to it count."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, float32."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, most: float) -> None:
    """Scales the gradients, of norm `norm`, so that their norm is at most `most`."""
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


class Average:
    """A running mean of weights, which forgets over `steps` steps, and faster while there were few."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.steps = steps
        self.values = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self, done: int) -> None:
        """Takes in the weights as they are when `done` steps, this one included, are behind."""
        values, parameters = list(map(local, self.values)), list(map(local, self.parameters))
        torch._foreach_lerp_(values, parameters, max(1 / self.steps, 5 / (4 + done)))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By copying: what spreads parameters over processes knows their memory."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            before = parameter.clone()
            parameter.copy_(value)
            value.copy_(before)
