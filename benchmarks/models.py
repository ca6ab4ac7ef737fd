"""How near are whole models to their floors: a decode step to reading the weights, a prefill to the products?

Random weights. Decode steps alone, by batch and context, are those of cells.py. Here are prefill, and `generate` as a
whole: greedy tokens of one sequence, whose time is divided by their number: the prompt of a few tokens counts as a
step, and so does all that the host does. Truth is the same model on the PyTorch path in wider numbers. A prefill's
logits may err twice as much as the PyTorch path at the model's dtype does; a decoded token's logit may lie below the
likeliest token's by what that allows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.runtime.accuracy import MAXIMUM, errors
from tritium.runtime.batch import Batch
from tritium.runtime.kv_cache import KVCache

from . import cells
from .case import Call, Case, Draw, Prepare, no_definition
from .machine import decode_step
from .shapes import ITEM, MODELS, projections, spec
from .subject import Subject, subject

PROMPT, STEPS, LENGTH = 16, 32, 2048


def prefill(name: str, length: int) -> Case:
    """Tokens of a prompt to the logits after its last, keys and values into the cache."""

    def make(draw: Draw) -> tuple[Any, ...]:
        return subject(name, draw.device), draw.integers(spec(name).vocab_size, 1, length)

    def through(backend: str, **modes: bool) -> Prepare:
        def prepare(of: Subject, tokens: Tensor) -> Call:
            model = of.on(backend, **modes)
            cache, plan = KVCache(model.config, 1, length, model.dtype, model.device), model.bind()

            def run() -> Tensor:
                cache.lengths = [0]
                return model.run(plan, tokens[0], Batch.appended(cache, [0], [length]), last_only=True)[1]

            return run

        return prepare

    def theirs(of: Subject, tokens: Tensor) -> Call:
        return lambda: of.twin(tokens, logits_to_keep=1, use_cache=True).logits[0]

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        plain, exact = (logits[-1:] for logits in args[0].logits(args[1]))
        allowed = errors(plain, exact)
        found = errors(out, exact)
        free = 1e-6 * exact.abs().max().item()
        for kind in ("largest", "rms"):
            if not getattr(found, kind) <= MAXIMUM * getattr(allowed, kind) + free:
                return f"{kind} error of the logits {getattr(found, kind):.3g}, torch's {getattr(allowed, kind):.3g}"
        return None

    shape = spec(name)
    matrices = sum(n * k for part, (n, k) in projections(name).items() if part != "head")
    attention = 2 * shape.query_dim * length * (length + 1)
    head = shape.vocab_size * shape.embedding_dim
    return Case(
        name=f"{name} prefill {length}",
        make=make,
        ours=through("triton"),
        definition=no_definition,
        reads=_weight_bytes(name),
        writes=0,
        flop=shape.num_cache_slots * (2 * matrices * length + attention) + 2 * head,
        peers={"torch": through("torch"), "transformers": theirs},
        variants={"batch_invariant=False": through("triton", batch_invariant=False)},
        check=check,
        tokens=length,
        host=True,
    )


def generation(name: str, prompt: int, steps: int) -> Case:
    """Greedy tokens from a short prompt, a token a step."""

    def make(draw: Draw) -> tuple[Any, ...]:
        return subject(name, draw.device), draw.integers(spec(name).vocab_size, 1, prompt)

    def through(backend: str, **modes: bool) -> Prepare:
        def prepare(of: Subject, tokens: Tensor) -> Call:
            model = of.on(backend, **modes)
            return lambda: model.generate(tokens, steps, temperature=0)

        return prepare

    def theirs(of: Subject, tokens: Tensor) -> Call:
        mask = torch.ones_like(tokens)
        how = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
        return lambda: of.twin.generate(tokens, attention_mask=mask, **how)

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        if out.shape != (1, prompt + steps) or not torch.equal(out[:, :prompt], args[1]):
            return f"generate gave {list(out.shape)}, or another prompt"
        plain, exact = (logits[prompt - 1 : -1] for logits in args[0].logits(out))
        below = exact.max(-1).values - exact.gather(1, out[0, prompt:, None]).squeeze(1)
        # Two logits, each wrong by at most so much, may change places.
        allowed = 2 * MAXIMUM * errors(plain, exact).largest + 1e-6 * exact.abs().max().item()
        step = int(below.argmax())
        return f"token {step} lies {below[step].item():.3g} below the best" if below[step] > allowed else None

    return Case(
        name=f"{name} generate",
        make=make,
        ours=through("triton"),
        definition=no_definition,
        reads=_weight_bytes(name),
        writes=0,
        flop=2 * _weight_bytes(name) // ITEM,
        peers={"torch": through("torch"), "transformers": theirs},
        variants={"batch_invariant=False": through("triton", batch_invariant=False)},
        check=check,
        units=steps,
        tokens=1,
        host=True,
    )


def _weight_bytes(name: str) -> int:
    """The weight matrices, which one forward reads at least; vectors and the rows of an embedding are as nothing."""
    return decode_step(spec(name), 1, 0.0, ITEM).weights


CASES = [
    *cells.cells(1),
    generation("qwen3 0.6B", PROMPT, STEPS),
    *(prefill(name, LENGTH) for name in MODELS),
    *cells.cells(8),
    *cells.cells(32),
]
"""What matters most comes first: a run may be cut short."""

SMOKE = [*cells.SMOKE, generation("tiny", 3, 2), prefill("tiny", 5)]
