"""What does tritium.accelerate make of a model of `transformers`? `generate`, greedily, from a prompt.

All contenders have the same weights: the accelerated model, the untouched one with the cache that it has by default and
with a static one, compiled, the model under Liger-Kernel where that is installed, and our own decoder on the same
tensors, as tritium.from_transformers gives it. The floor is that of the decode steps: weights, keys and values read
once a step. (A training step of the accelerated model stands beside our own in training.py.)

Right are tokens that are, each, the likeliest after those before it by the logits of the PyTorch path, or nearly: half
a standard deviation below the largest, where a token taken at random lies four below.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .case import Call, Case, Draw, Prepare, no_definition
from .cells import NEAR
from .machine import decode_step
from .shapes import ITEM, spec
from .subject import Subject, subject, twin_of

PROMPT, NEW = 128, 64


def generation(name: str, rows: int, prompt: int, new: int) -> Case:
    """`generate` of one model at one batch."""
    model = spec(name)

    def make(draw: Draw) -> tuple[Any, ...]:
        return subject(name, draw.device), draw.integers(model.vocab_size, rows, prompt)

    def theirs(how: str) -> Prepare:
        def prepare(of: Subject, tokens: Tensor) -> Call:
            if how == "compiled" and not tokens.is_cuda:
                raise RuntimeError("compared on a GPU only")
            twin = twin_of(of.model)
            if how == "accelerated":
                import_module("tritium").accelerate(twin)
            if how == "liger":
                import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model=twin)
            options = {"cache_implementation": "static"} if how == "compiled" else {}
            length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(tokens)
            return lambda: twin.generate(tokens, attention_mask=mask, **length, **options)

        return prepare

    def ours(of: Subject, tokens: Tensor) -> Call:
        decoder = of.on("auto")
        return lambda: decoder.generate(tokens, new, temperature=0)

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        of, tokens = args
        if out.shape != (rows, prompt + new) or not torch.equal(out[:, :prompt], tokens):
            return f"generate gave {list(out.shape)}, or another prompt"
        logits = of.on("torch")(out[:, :-1]).logits[:, prompt - 1 :].float()
        below = (logits.max(-1).values - logits.gather(2, out[:, prompt:, None]).squeeze(2)) / logits.std(-1)
        if not float(below.max()) <= NEAR:
            return f"a token lies {float(below.max()):.2g} deviations below the likeliest"
        return None

    step = decode_step(model, rows, prompt + new / 2, ITEM)
    return Case(
        name=f"{name} generate batch {rows} prompt {prompt} new {new}",
        make=make,
        ours=theirs("accelerated"),
        definition=no_definition,
        reads=new * (step.weights + step.cache),
        writes=new * step.logits,
        flop=new * step.flop,
        peers={
            "transformers": theirs("untouched"),
            "transformers compiled": theirs("compiled"),
            "liger": theirs("liger"),
        },
        variants={"decoder": ours},
        check=check,
        units=new,
        tokens=rows,
        host=True,
    )


CASES = [generation("qwen3 0.6B", rows, PROMPT, NEW) for rows in (1, 8)]
SMOKE = [generation("tiny", 2, 5, 4)]
