"""What the tests of `accelerate` share: models of every architecture in a dozen shapes, and what is compared."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tests import oracle

launch = import_module("tritium.kernels.launch")

ARCHITECTURES = ["qwen2", "qwen3", "qwen3_moe", "llama", "mobilellm", "gpt"]
SHAPES = [  # heads, heads of k and v, their width, tied
    (4, 4, 16, True), (6, 2, 64, False), (4, 1, 56, True), (8, 1, 128, False), (3, 3, 10, True), (2, 1, 256, False),
    (8, 8, 6, True),
]  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0, "original_max_position_embeddings": 6,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
SCALED = [{"rope_parameters": scaling} for scaling in (YARN, LLAMA3, LONG, DYNAMIC)]
BIASED = {"attention_bias": True, "rms_norm_eps": 0.05}
WINDOW = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
NO_ROPE = {"no_rope_layers": [1, 0], "attn_temperature_tuning": True, "floor_scale": 3, "attn_scale": 0.3}
NO_ROPE |= {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 4}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "qwen2": [WINDOW, {"rms_norm_eps": 0.05}, *SCALED],
    "qwen3": [WINDOW, BIASED, *SCALED],
    "qwen3_moe": [BIASED, *SCALED],
    "llama": [{**BIASED, "mlp_bias": True}, *SCALED],
    "mobilellm": [
        BIASED, {"use_qk_norm": False}, NO_ROPE, {"moe_layers": [1], "num_local_experts": 2}, SCALED[1],
    ],
    "gpt": [
        {"n_inner": 40}, {"activation_function": "silu"}, {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False}, {"activation_function": "relu", "layer_norm_epsilon": 1e-3},
    ],
}  # fmt: skip


def _cases(family: str) -> list[tuple[oracle.Case, dict[str, Any]]]:
    shapes = [
        oracle.Case(family, heads, heads if family == "gpt" else kv_heads, width, tied=tied, layers=2)
        for heads, kv_heads, width, tied in SHAPES
    ]
    if family == "gpt":
        shapes = [replace(case, hidden=case.heads * case.head_dim) for case in shapes if case.head_dim < 128]
    small = oracle.Case(family, 6, 6 if family == "gpt" else 2, 8, tied=False, layers=2)
    return [*((case, {}) for case in shapes), *((small, changes) for changes in OTHERS[family])]


GRID = [(case, changes) for family in ARCHITECTURES for case, changes in _cases(family)]
SMALL = [oracle.Case(family, 4, 4 if family == "gpt" else 2, 12, tied=True, layers=2) for family in ARCHITECTURES]


def name(value: Any) -> str:
    """Of a case and its changes in a test's name."""
    return str(value) if isinstance(value, oracle.Case) else "-".join(map(str, value)) or "plain"


def build(case: oracle.Case, **changes: Any) -> Any:
    """A redrawn model whose padding is no token of its own."""
    return oracle.build(case, **changes)


def results(model: Any, x: Tensor, **inputs: Any) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients."""
    model.zero_grad()
    out = model(x, **{"labels": x, **inputs})
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return None if out.logits is None else out.logits.detach(), out.loss.detach(), gradients


def assert_near(
    found: tuple[Tensor | None, Tensor, dict[str, Tensor]], expected: tuple[Tensor | None, Tensor, dict[str, Tensor]]
) -> None:
    """The rule for float32, gradients by the largest of their tensor."""
    if found[0] is not None:
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    assert set(found[2]) == set(expected[2])
    for parameter, gradient in expected[2].items():
        limit = 1e-5 * max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[2][parameter], gradient, atol=2 * limit, rtol=0.0, msg=parameter)
