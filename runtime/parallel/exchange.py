"""What the processes that share the layers of one model tell each other in a forward and in its backward."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Exchange:
    """One process's end. `enter` and `leave` are f and g of Shoeybi et al. 2019 (arXiv:1909.08053), section 3.

    What lies between the two is a part of a layer: it takes an input that all processes have, and gives a summand of
    the output. Outside, all processes have and compute the same, gradients included.
    """

    group: Any  # a torch.distributed.ProcessGroup

    def enter(self, x: Tensor) -> Tensor:
        """x as it is; its gradient is the sum over the processes."""
        entered: Tensor = _Enter.apply(x, self.group)
        return entered

    def leave(self, summand: Tensor) -> Tensor:
        """The sum over the processes; its gradient goes to each as it is."""
        total: Tensor = _Leave.apply(summand, self.group)
        return total

    def common(self, number: int, device: torch.device) -> int:
        """The first process's number, on all; it travels through the memory of `device`."""
        holder = torch.tensor(number, dtype=torch.int64, device=device)
        dist.broadcast(holder, group=self.group, group_src=0)
        return int(holder)


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over a group's processes, in a tensor of its own: checkpointing may have kept x."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: Any) -> Tensor:
        return summed(summand, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
