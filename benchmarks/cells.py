"""How near is a decode step of a whole model to its floor, by model, batch and context?

The contexts are filled with random keys and values, the same for all contenders, and each walks the same few steps,
greedily, over and over. Peers: the PyTorch path, `transformers` with the cache that it has by default, which grows by a
copy a step, and with a static one, compiled and captured. They step at every batch and context of the smallest model,
and at batch 1 of the others; what takes long to compile, at fewer, the PyTorch path under max-autotune at one. Where
there are peers both forms of our step are timed, too, whichever the tables choose, and the step of the mode in which
log-probabilities have a trainer's bits.

Right is a step whose tokens are the likeliest by the logits of the PyTorch path, or nearly: half a standard deviation
of a row's logits below the largest, where a token taken at random lies four below.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.runtime.persistent import FORMS
from tritium.runtime.summary import parameter_count

from .case import Call, Case, Draw, Prepare, no_definition
from .machine import Step, decode_step
from .shapes import DECODED, ITEM, spec
from .stepping import Filled, form_of, free_bytes, keys_of, no_room, steps
from .subject import Subject, holds, subject

BATCHES = (1, 8, 32)
CONTEXTS = (128, 4096, 32768)
NEAR = 0.5  # standard deviations of the logits


def transformers_step(
    of: Subject, filled: Filled, tokens: Tensor, forward: Callable[..., Any] | None = None, static: bool = False
) -> Call:
    """The step of the twin, or of its forward in another form, from our keys and values, of which it has copies."""
    from transformers import DynamicCache, StaticCache

    forward, held = forward or of.twin.forward, filled.held

    def theirs(pool: Tensor, turn: bool) -> Tensor:
        """[R, Hk, held, D] of a layer's pages [Hk, pages, tokens, D], in the order in which the twin rotates keys."""
        by_row = pool.unflatten(1, (len(filled.rows), -1)).flatten(2, 3)[:, :, :held].transpose(0, 1)
        return by_row.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if turn else by_row

    pools = list(zip(filled.cache.keys, filled.cache.values, strict=True))
    needed = 3 * sum(keys.numel() * keys.element_size() for keys, _ in pools)  # one layer more of what grows
    if tokens.is_cuda and (free := free_bytes(tokens.device) or 0) < needed:
        raise RuntimeError(f"its cache needs {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
    config = of.twin.config
    past: Any = StaticCache(config=config, max_cache_len=filled.context) if static else DynamicCache(config=config)
    layers = []
    for layer, (keys, values) in zip(past.layers, pools, strict=True):
        k, v = theirs(keys, of.pairs_neighbours), theirs(values, False)
        layer.lazy_initialization(k, v)
        if static:
            layer.keys[:, :, :held], layer.values[:, :, :held] = k, v
        else:
            layers.append((layer, k.contiguous(), v.contiguous()))
    at = tokens

    def begin() -> None:
        nonlocal at
        at = tokens
        for layer in past.layers if static else ():
            layer.cumulative_length.fill_(held)
        for layer, k, v in layers:  # what a step appends to is not changed by it
            layer.keys, layer.values = k, v

    def step() -> Tensor:
        nonlocal at
        if static:
            torch.compiler.cudagraph_mark_step_begin()
        at = forward(input_ids=at[:, None], past_key_values=past, use_cache=True).logits[:, -1].argmax(-1)
        return at

    return filled.walk(begin, step)


def compiled_step(of: Subject, filled: Filled, tokens: Tensor) -> Call:
    """The same, compiled and captured, through a static cache."""
    if not tokens.is_cuda:
        raise RuntimeError("compared on a GPU only")
    call = transformers_step(of, filled, tokens, of.compiled_twin, static=True)
    for _ in range(filled.span):  # a whole walk: compiled by its first step, captured by those behind it
        call()
    return call


def fixed_step(of: Subject, filled: Filled, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """The first step of the PyTorch path as a function of its tokens alone, which torch.compile can trace."""
    model, cache = of.on("torch"), copy.copy(filled.cache)
    plan, batch, kernels = model.bind(), filled.first(cache), model.kernels

    def step(tokens: Tensor) -> Tensor:
        return model.compute(plan, tokens, batch, kernels)[1].argmax(-1)

    step(tokens)  # the batch then has all that it hands to the device
    return step


def autotuned_step(of: Subject, filled: Filled, tokens: Tensor) -> Call:
    """The same compiled and captured, each product by what is fastest here: one step, over and over."""
    if not tokens.is_cuda:
        raise RuntimeError("compared on a GPU only")
    step, cache = fixed_step(of, filled, tokens), filled.cache
    for tensor in (*of.model.parameters(), cache._pool, *cache.slot_keys, *cache.slot_values):
        torch._dynamo.mark_static_address(tensor, guard=False)  # a captured graph copies other inputs
    fast = torch.compile(step, mode="max-autotune", fullgraph=True, dynamic=False)
    for _ in range(3):
        fast(tokens)
    return lambda: fast(tokens)


def cell(name: str, rows: int, context: int, with_peers: bool, compiled: bool = False, autotuned: bool = False) -> Case:
    """One model's step at one batch and context."""
    model = spec(name)

    def make(draw: Draw) -> tuple[Any, ...]:
        of = subject(name, draw.device)
        seed = int(draw.integers(2**31 - 1, 1))
        return of, Filled(of.model, rows, context, seed), draw.integers(model.vocab_size, rows)

    def through(backend: str, form: str | None = None, **modes: bool) -> Prepare:
        return lambda of, filled, tokens: steps(of.on(backend, **modes), filled, tokens, form)

    def work(of: Subject, filled: Filled, tokens: Tensor) -> Step:
        return decode_step(model, rows, keys_of(context), ITEM, form=form_of(of.on("triton")))

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        if out.shape != (rows,) or int(out.min()) < 0 or int(out.max()) >= model.vocab_size:
            return f"a step gave {list(out.shape)} tokens, or ids beyond the vocabulary"
        of, filled, tokens = args
        logits = filled.logits(of.on("torch"), tokens).float()
        below = (logits.max(-1).values - logits.gather(1, out[:, None]).squeeze(1)) / logits.std(-1)
        row = int(below.argmax())
        if not float(below[row]) <= NEAR:
            return f"row {row}: its token lies {float(below[row]):.2g} deviations below the likeliest"
        return None

    def obstacle(device: torch.device) -> str | None:
        """Why this does not fit the device, in words."""
        item = 4 if device.type == "cpu" else ITEM
        parameters = 0 if holds(name, device) else parameter_count(model)
        return no_room(model, parameters, rows, context, item, device)

    peers: dict[str, Prepare] = {}
    if with_peers:
        peers["torch"] = through("torch")
        peers["transformers"] = transformers_step
    if compiled:
        peers["transformers compiled"] = compiled_step
    if autotuned:
        peers["torch max-autotune"] = autotuned_step
    variants = {"batch_invariant=False": through("triton", batch_invariant=False)} if rows > 1 else {}
    if with_peers and context in CONTEXTS:  # the price of a promise
        variants["sampler_equals_trainer"] = through("triton", sampler_equals_trainer=True)
    if with_peers and not any(model.expert_layers):  # one of them is what ours is
        variants |= {form: through("triton", form) for form in FORMS}
    step = decode_step(model, rows, keys_of(context), ITEM)
    return Case(
        name=f"{name} decode batch {rows} context {context}",
        make=make,
        ours=through("triton"),
        definition=no_definition,
        reads=step.weights + step.cache,
        writes=step.logits,
        flop=step.flop,
        peers=peers,
        variants=variants,
        check=check,
        tokens=rows,
        obstacle=obstacle,
        step=work,
    )


def cells(rows: int) -> list[Case]:
    """All models and contexts at one batch, the smallest model first."""
    smallest = next(iter(DECODED))
    return [
        cell(
            name,
            rows,
            context,
            with_peers=rows == 1 or name == smallest,
            compiled=(rows == 1 and name == smallest) or (context == 4096 and (rows == 1 or name == smallest)),
            autotuned=name == smallest and (rows, context) == (8, 128),  # a case may take so long, and no longer
        )
        for name in DECODED
        for context in CONTEXTS
        if context <= spec(name).context_length
    ]


CASES = [
    cell(name, 1, context, with_peers=False)
    for name in DECODED
    if not any(spec(name).expert_layers)
    for context in CONTEXTS[:2]
]
"""What the form of a decode step is chosen by: see `decode_form` of the tuning tables."""

SMOKE = [cell(name, 2, 20, with_peers=True, compiled=True, autotuned=True) for name in ("tiny", "tiny mixture")]
