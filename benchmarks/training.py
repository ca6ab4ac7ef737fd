"""How near is a whole training step to its matrix products, and how much memory does it take?

Forward, loss and backward of one packed batch, clipping and AdamW: bfloat16 computing over float32 parameters. All
contenders train the same parameters with one optimizer (at a rate of 0, so that every step is the first): those of
`transformers` and Liger are views of ours, and their gradients are views of our gradients. Only rows that a checkpoint
holds in another order (q and k of MobileLLM) are copies. `transformers` computes in autocast, as one trains with it,
and so does its model after tritium.accelerate, with and without logits.

Right is a step whose gradients, by their root mean square, are no further from those in float32 than twice what the
PyTorch path is at bfloat16, and its loss no further than twice what that path's losses of single tokens are: a mean of
few may be right by luck, and would then allow nothing.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from tritium.runtime.accuracy import MAXIMUM
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.loading import load_model

from .case import Call, Case, Draw, Prepare, no_definition
from .shapes import projections, spec
from .subject import twin_of

LENGTH = 4096
SHAPES = ("qwen3 0.6B", "mobilellm 950m")
COMPUTE = torch.bfloat16


class Subject:
    """The parameters, their gradients and the optimizer that all contenders share."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.model = load_model(spec(name), device=device, dtype=torch.float32).initialise(std=0.05).train()
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        self._known: dict[tuple[int, ...], list[Tensor]] = {}

    def on(self, backend: str, dtype: torch.dtype | None = COMPUTE, keep: str | None = None, **modes: Any) -> Decoder:
        """The same parameters on a backend, as a model of its own."""
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        model = copy.deepcopy(self.model, shared)
        model.enable_gradient_checkpointing(keep is not None, keep or "nothing")
        return model.compute_in(dtype).use_backend(backend, **modes)

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step on a loss; gives the loss. The gradients stay where they are."""
        self.optimizer.zero_grad(set_to_none=False)
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return value.detach()

    def differences(self, tokens: Tensor, got: Sequence[Tensor] | None = None) -> tuple[float, float]:
        """From float32's, of loss and (clipped) gradients: those given, or the PyTorch path's in bfloat16.

        The latter's loss is judged token by token, by their root mean square.
        """
        key = tuple(tokens.tolist())
        if key not in self._known:
            self._known = {key: self.observed(lambda: packed_loss(self.on("torch", None), tokens))}
        exact = self._known[key]
        found = got or self.observed(lambda: packed_loss(self.on("torch"), tokens))
        gradients = sum((a - b).double().square().sum().item() for a, b in zip(found[1:], exact[1:], strict=True))
        if got:
            return abs(got[0].item() - exact[0].item()), gradients**0.5
        with torch.no_grad():
            losses = [token_losses(self.on("torch", dtype), tokens) for dtype in (None, COMPUTE)]
        return (losses[0] - losses[1]).square().mean().sqrt().item(), gradients**0.5

    def observed(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        value = self.step(loss)
        return [value, *(parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None)]


def packed_loss(model: Decoder, tokens: Tensor) -> Tensor:
    """The loss of one sequence: each token's label is the one behind it."""
    batch = Batch.fresh([tokens.shape[0] - 1], tokens.device)
    return model.loss(tokens[:-1], tokens[1:], batch)


def token_losses(model: Decoder, tokens: Tensor) -> Tensor:
    """[T - 1] float32, by whole logits."""
    logits = model(tokens[None, :-1]).logits[0]
    return nn.functional.cross_entropy(logits.float(), tokens[1:], reduction="none")


@functools.lru_cache(maxsize=1)
def subject(name: str, device: torch.device) -> Subject:
    return Subject(name, device)


def step(name: str, length: int) -> Case:
    """One step on `length` tokens of one sequence."""

    def make(draw: Draw) -> tuple[Any, ...]:
        with torch.inference_mode(False):
            return subject(name, draw.device), draw.integers(spec(name).vocab_size, length + 1).clone()

    def training(bind: Callable[[Subject, Tensor], Callable[[], Tensor]]) -> Prepare:
        def prepare(of: Subject, tokens: Tensor) -> Call:
            with torch.inference_mode(False):
                loss = bind(of, tokens)

            def run() -> tuple[Subject, Tensor]:
                with torch.inference_mode(False), torch.enable_grad():
                    return of, of.step(loss)

            return run

        return prepare

    def through(backend: str, keep: str | None = None, **modes: Any) -> Prepare:
        def bind(of: Subject, tokens: Tensor) -> Callable[[], Tensor]:
            model = of.on(backend, keep=keep, **modes)
            return lambda: packed_loss(model, tokens)

        return training(bind)

    def theirs(how: str) -> Prepare:
        def bind(of: Subject, tokens: Tensor) -> Callable[[], Tensor]:
            if how == "compiled" and not tokens.is_cuda:
                raise RuntimeError("compared on a GPU only")
            model, ids = twin_of(of.model, trained=True), tokens[None]
            if how.startswith("accelerated"):
                import_module("tritium").accelerate(model, logits=how == "accelerated")
            if how == "liger":
                import_module("liger_kernel.transformers")._apply_liger_kernel_to_instance(model=model)
            forward = torch.compile(model) if how == "compiled" else model

            def loss() -> Tensor:
                with torch.autocast(ids.device.type, COMPUTE):
                    found: Tensor = forward(
                        ids[:, :-1], shift_labels=ids[:, 1:], labels=ids[:, 1:], use_cache=False
                    ).loss
                return found

            return loss

        return training(bind)

    def check(out: tuple[Subject, Tensor], args: Sequence[Any]) -> str | None:
        of, value = out
        with torch.inference_mode(False), torch.enable_grad():
            found = [value, *(p.grad.clone() for p in of.model.parameters() if p.grad is not None)]
            mine, allowed = of.differences(args[1], found), of.differences(args[1])
        for what, got, limit, size in zip(("loss", "gradients"), mine, allowed, (abs(value.item()), 1.0), strict=True):
            if not got <= MAXIMUM * limit + 1e-5 * size:
                return f"{what} differ by {got:.3g} from float32's, the PyTorch path's by {limit:.3g}"
        return None

    shape = spec(name)
    matrices = sum(n * k for part, (n, k) in projections(name).items() if part != "head") * shape.num_cache_slots
    attention = 2 * shape.query_dim * length * (length + 1) * shape.num_cache_slots
    parameters = sum(n * k for part, (n, k) in projections(name).items() if part != "head") * shape.num_layers
    parameters += shape.vocab_size * shape.embedding_dim * (1 if shape.tie_embeddings else 2)
    return Case(
        name=f"{name} {length} tokens",
        make=make,
        ours=through("triton", batch_invariant=False),
        definition=no_definition,
        reads=16 * parameters,  # the optimizer's: parameter, gradient and both moments, which it also writes back
        writes=12 * parameters,
        flop=3 * (2 * (matrices + shape.vocab_size * shape.embedding_dim) * length + attention),
        peers={
            "torch": through("torch"),
            "transformers": theirs("eager"),
            "transformers compiled": theirs("compiled"),
            "liger": theirs("liger"),
        },
        variants={
            "batch_invariant": through("triton"),
            "transformers accelerated": theirs("accelerated"),
            "transformers accelerated, logits=False": theirs("accelerated without logits"),
            "keep=attention": through("triton", "attention", batch_invariant=False),
            "keep=nothing": through("triton", "nothing", batch_invariant=False),
        },
        check=check,
        tokens=length,
        host=True,
        memory=True,
    )


CASES = [step(name, LENGTH) for name in SHAPES]
SMOKE = [step("tiny", 6)]
