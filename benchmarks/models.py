"""How near are whole models to their floors: a decode step to reading the weights, a prefill to the products?

Random weights, one sequence. A decode step is `generate` of greedy tokens divided by their number: the prompt of a few
tokens counts as a step, and so does all that the host does. Truth is the same model on the PyTorch path in wider
numbers. A prefill's logits may err twice as much as the PyTorch path at the model's dtype does; a decoded token's logit
may lie below the likeliest token's by what that allows.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.runtime.accuracy import MAXIMUM, errors
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.loading import load_model

from .case import Call, Case, Draw, Prepare
from .decode import transformers_twin
from .shapes import ITEM, MODELS, projections, spec

PROMPT, STEPS, LENGTH = 16, 32, 2048


class Subject:
    """A model, its counterpart in `transformers`, and the truth about it."""

    def __init__(self, name: str, device: torch.device) -> None:
        # Norms of one and small matrices would hide much: 0.05 gives logits that are far from flat.
        self.model = load_model(spec(name), device=device).initialise(std=0.05).requires_grad_(False)
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def twin(self) -> Any:
        return transformers_twin(self.model)

    def on(self, backend: str, **modes: bool) -> Decoder:
        """The same weights on a backend, as a model of its own."""
        return copy.copy(self.model).use_backend(backend, **modes)

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[S, V] after each token: the PyTorch path's at the model's dtype, and the truth."""
        key = tuple(tokens[0].tolist())
        if key not in self._known:
            wide = torch.float64 if self.model.dtype == torch.float32 else torch.float32
            exact = copy.deepcopy(self.model).to(wide).use_backend("torch")
            at_dtype = self.on("torch")(tokens).logits[0]
            self._known = {key: (at_dtype, exact(tokens).logits[0])}
        return self._known[key]


@functools.lru_cache(maxsize=1)
def subject(name: str, device: torch.device) -> Subject:
    return Subject(name, device)


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
        definition=_no_definition,
        reads=_weight_bytes(name),
        writes=0,
        flop=shape.num_cache_slots * (2 * matrices * length + attention) + 2 * head,
        peers={"torch": through("torch"), "transformers": theirs},
        variants={"batch_invariant=False": through("triton", batch_invariant=False)},
        check=check,
        tokens=length,
        host=True,
    )


def decode(name: str, prompt: int, steps: int) -> Case:
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
        name=f"{name} decode",
        make=make,
        ours=through("triton"),
        definition=_no_definition,
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


def _no_definition(*args: Any) -> Any:
    raise NotImplementedError("a model is checked by its logits")


def _weight_bytes(name: str) -> int:
    """The weight matrices, which one forward reads at least; vectors and the rows of an embedding are as nothing."""
    parts = {part: n * k for part, (n, k) in projections(name).items()}
    head = parts.pop("head")
    return (spec(name).num_layers * sum(parts.values()) + head) * ITEM


CASES = [case for name in MODELS for case in (decode(name, PROMPT, STEPS), prefill(name, LENGTH))]
SMOKE = [decode("tiny", 3, 2), prefill("tiny", 5)]
