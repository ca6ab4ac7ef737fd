"""experts_implementation="tritium": the experts of `transformers`' models by our kernels.

Assignments are sorted by expert, and each expert's rows meet its weights in one launch for all experts, which reads the
weights of those that are asked for only. No assignment is dropped and nothing is added by atomics: a token's bits are
the same in any batch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.functional import combine, group, grouped_linear, grouped_swiglu
from ...kernels.launch import DTYPES
from .packages import theirs

_moe = theirs("integrations.moe")


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What ExpertsInterface calls: hidden_states [T, K], top_k_index and top_k_weights [T, k] -> [T, K].

    `self` has gate_up_proj [E, 2F, K], each expert's gate first, and down_proj [E, K, F], with SiLU between. For
    experts with biases, transposed or interleaved weights, a norm, another activation, spread over processes, or of
    several dtypes, this is transformers' own "grouped_mm", in float64 its "batched_mm".
    """
    if not has_kernels(self) or not _of_one_dtype(hidden_states, self.gate_up_proj, self.down_proj, top_k_weights):
        # torch's grouped product knows no float64.
        name = "grouped_mm" if hidden_states.dtype in DTYPES else "batched_mm"
        other: Tensor = _moe.ALL_EXPERTS_FUNCTIONS[name](self, hidden_states, top_k_index, top_k_weights)
        return other
    k = top_k_index.shape[1]
    order, starts = group(top_k_index.to(torch.int32), self.num_experts)
    activated = grouped_swiglu(hidden_states, self.gate_up_proj, order, starts, k)
    outputs = grouped_linear(activated, self.down_proj, order, starts, 1)
    return combine(outputs, top_k_weights, torch.zeros_like(hidden_states))


def has_kernels(experts: Any) -> bool:
    """Whether experts are of the kind that we have kernels for."""
    has_gate, is_concatenated = getattr(experts, "has_gate", True), getattr(experts, "is_concatenated", True)
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    # Spread over processes, those that another has are told by an index beyond the last.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        has_gate
        and is_concatenated
        and not any(getattr(experts, name, False) for name in others)
        and not getattr(experts, "_is_expert_parallel", distributed)
        and getattr(type(experts), "_apply_gate", None) is _moe._default_apply_gate
        and (isinstance(experts.act_fn, nn.SiLU) or type(experts.act_fn).__name__ == "SiLUActivation")
    )


def _of_one_dtype(x: Tensor, *others: Tensor) -> bool:
    autocast = torch.is_autocast_enabled(x.device.type)
    return not autocast and x.dtype in DTYPES and all(other.dtype == x.dtype for other in others)
