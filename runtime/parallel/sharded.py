"""Fully sharded: PyTorch's FSDP2, which keeps of every parameter a piece on each process and gathers block by block."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..decoder import Decoder


def shard_model(model: "Decoder", mesh: Any, compute_dtype: torch.dtype) -> None:
    """Spreads a model's parameters over a one-dimensional DeviceMesh, a group for each block and one for the rest.

    The pieces, their gradients and the sums of these are float32; what is gathered, and computed in, is
    `compute_dtype`. Gradients are summed over the processes, and not averaged. The parameters are DTensors afterwards:
    make optimizers then.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    # A post-norm block leaves a norm to the next one, which needs its weights when the block itself is long done.
    done_with = model.config.residual == "pre_norm"
    for block in model.stack.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=done_with, mp_policy=policy)
        register_fsdp_forward_method(block, "advance")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def reduces(model: "Decoder", wanted: bool) -> None:
    """Whether the next backward sums gradients over the processes, or adds to what is to be summed later."""
    model.set_requires_gradient_sync(wanted)  # type: ignore[operator]  # FSDP gave it to the model


def reshard(model: "Decoder") -> None:
    """Lets go of what a forward without a backward gathered: the next one would not see new weights."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
