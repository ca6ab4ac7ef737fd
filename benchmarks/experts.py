"""How near is a whole mixture-of-experts layer to reading the experts that it touches, or to its products?

From the normalised x [T, H] and the residual stream to the new stream: router, choice, both products of every chosen
expert, weighted sum. Against transformers' block on the same weights, with the implementations of its experts that need
no further package: a loop over experts ("eager"), one product a chosen expert ("batched_mm") and torch's grouped
product ("grouped_mm"). Weights are random, so the choice is nearly balanced: the hardest case for reading weights, the
easiest for balance.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tritium.kernels.routing import route_reference
from tritium.runtime.accuracy import MAXIMUM, errors
from tritium.runtime.kernel_set import mixture
from tritium.runtime.operations import DEFINITIONS, KERNELS, Operations
from tritium.runtime.plan import Dense, Experts

from .case import Call, Case, Draw, Prepare
from .shapes import ITEM


class Shape(NamedTuple):
    """What fixes a mixture's cost."""

    hidden: int
    experts: int
    chosen: int
    width: int


SHAPES = {
    "30B-A3B": Shape(2048, 128, 8, 768),  # 1.2 GB of bfloat16 a layer
    "235B-A22B": Shape(4096, 128, 8, 1536),  # 4.8 GB
    "tiny": Shape(32, 8, 2, 24),
}
TOKENS = (1, 16, 2048)
CLEAR = 0.02  # of the largest logit, between the last that is chosen and the next: rounding cannot swap them


class Subject:
    """One layer's weights, and transformers' block that shares them."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.shape = SHAPES[name]
        hidden, experts, _, width = self.shape
        draw = Draw(device, 0)
        self.router = draw.normal(experts, hidden, scale=hidden**-0.5)
        self.up = draw.normal(experts, 2 * width, hidden, scale=hidden**-0.5)
        self.down = draw.normal(experts, hidden, width, scale=width**-0.5)

    @property
    def experts(self) -> Experts:
        return Experts(Dense(self.router, None), self.up, self.down, per_token=self.shape.chosen, renormalise=True)

    @functools.cached_property
    def twin(self) -> Any:
        """Qwen3MoeSparseMoeBlock over the same storages: nothing is copied."""
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        hidden, experts, chosen, width = self.shape
        config = Qwen3MoeConfig(
            hidden_size=hidden,
            num_experts=experts,
            num_experts_per_tok=chosen,
            moe_intermediate_size=width,
            norm_topk_prob=True,
            hidden_act="silu",
        )
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        state = {"gate.weight": self.router, "experts.gate_up_proj": self.up, "experts.down_proj": self.down}
        block.load_state_dict(state, strict=True, assign=True)
        return block.eval()

    def by(self, implementation: str) -> Any:
        """The block with one implementation of its experts, which `forward` reads from the config at every call."""
        block = copy.copy(self.twin)  # shallow: parameters are shared
        block._modules = dict(self.twin._modules)
        experts = copy.copy(self.twin.experts)
        experts.config = copy.copy(self.twin.experts.config)
        experts.config._experts_implementation = implementation
        block._modules["experts"] = experts
        return block


@functools.lru_cache(maxsize=1)
def subject(name: str, device: torch.device) -> Subject:
    return Subject(name, device)


def layer(operations: Operations, of: Subject, x: Tensor, residual: Tensor) -> Tensor:
    """As the Triton path composes it: see runtime/kernel_set.py `mixture`."""
    logits = operations.linear(x, of.router)
    return mixture(operations, x, logits, of.experts, residual)


def experts(name: str, tokens: int) -> Case:
    shape = SHAPES[name]
    hidden, count, chosen, width = shape

    def make(draw: Draw) -> tuple[Any, ...]:
        return subject(name, draw.device), draw.normal(tokens, hidden), draw.normal(tokens, hidden, scale=3.0)

    def ours(of: Subject, x: Tensor, residual: Tensor) -> Call:
        return lambda: layer(KERNELS, of, x, residual)

    def theirs(implementation: str) -> Prepare:
        def prepare(of: Subject, x: Tensor, residual: Tensor) -> Call:
            block = of.by(implementation)
            return lambda: residual + block(x.unsqueeze(0))[0]

        return prepare

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        """Errors against truth, over the tokens whose choice rounding cannot change."""
        of, x, residual = args
        if out.shape != residual.shape or out.dtype != residual.dtype:
            return f"output is {out.dtype} {list(out.shape)}"
        # All weights in float64 would be 5 to 20 GB: a few rows are enough, the ends among them, an expert at a time.
        rows = torch.linspace(0, tokens - 1, min(tokens, 16), device=x.device).long()
        exact, clear = truth(of, x[rows], residual[rows])
        at_dtype = layer(DEFINITIONS, of, x[rows], residual[rows])
        if not clear.any():
            return "no token's choice is clear"
        exact, at_dtype, got = (y[clear].double() for y in (exact, at_dtype, out[rows]))
        found, allowed = errors(got, exact), errors(at_dtype, exact)
        free = 1e-6 * exact.abs().max().item()
        # As for whole models, twice the definition's in both: peers, which round each weighted output, pass here too.
        for kind in ("largest", "rms"):
            if not getattr(found, kind) <= MAXIMUM * getattr(allowed, kind) + free:
                return f"{kind} error {getattr(found, kind):.3g}, the definition's {getattr(allowed, kind):.3g}"
        return None

    peers = {f"transformers {name}": theirs(name) for name in ("grouped_mm", "eager")}
    if tokens * chosen <= 256:  # it copies the weights of every assignment: 300 GB at 2048 tokens
        peers["transformers batched_mm"] = theirs("batched_mm")
    # Expected: each token leaves an expert out with probability 1 - k / E.
    touched = round(count * (1 - (1 - chosen / count) ** tokens))
    per_expert = 3 * width * hidden
    return Case(
        name=f"{name} layer {tokens}",
        make=make,
        ours=ours,
        definition=lambda *args: layer(DEFINITIONS, *args),
        reads=(touched * per_expert + count * hidden + 2 * tokens * hidden) * ITEM,
        writes=tokens * hidden * ITEM,
        flop=2 * tokens * (chosen * per_expert + count * hidden),
        peers=peers,
        check=check,
        tokens=tokens,
        host=True,  # "eager" asks the device which experts were hit: it can be neither captured nor timed there alone
    )


def truth(of: Subject, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The layer in float64 [R, H], and which rows' choice is clear [R]."""
    chosen = of.shape.chosen
    logits = x.double() @ of.router.double().t()
    ordered = logits.sort(-1, descending=True).values
    clear = ordered[:, chosen - 1] - ordered[:, chosen] > CLEAR * ordered.abs().max()
    picked, weights = route_reference(logits, chosen, True)
    out = residual.double()
    for row in range(len(x)):
        for expert, weight in zip(picked[row].tolist(), weights[row], strict=True):
            gate, up = (of.up[expert].double() @ x[row].double()).chunk(2)
            out[row] = out[row] + weight * (of.down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return out, clear


CASES = [experts("30B-A3B", tokens) for tokens in TOKENS] + [experts("235B-A22B", tokens) for tokens in TOKENS]
SMOKE = [experts("tiny", tokens) for tokens in (1, 3)]
