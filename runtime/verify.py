"""Verification of the Triton path on a loaded model: every kernel where it runs, and both paths as wholes.

Operation by operation, the kernel and its definition get the same input (what the definitions computed so far), and
each result is compared with the definition in float64, by the rule of accuracy.py. Then both paths run the same prompt
from end to end, beside the same computation in float64, and both continue it greedily.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .accuracy import Errors, broken, errors, widened
from .backend import Backend, triton_kernels
from .batch import Batch
from .decoder import Decoder
from .errors import TritiumError
from .fused import fuse
from .generation import SamplingOptions, generate
from .kernel_set import REFERENCE, KernelSet, Loss
from .kv_cache import KVCache
from .layers import run_layer
from .operations import DEFINITIONS, KERNELS, Operations
from .triton_path import Modes, compose

WHOLE_PATH = 2.0  # how much larger than the PyTorch path's error that of the Triton path may be, end to end
WHOLE_FREE = 2.0**-20  # of the largest logit: what float32 norms and angles leave of the truth
SAMPLING = ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 20, 1.0), (1.0, 0, 0.9))  # temperature, top-k, top-p
UNIFORMS = 8
PARTS = {  # what is compared of an operation that gives several things
    "qk_norm_rope": "qkv",
    "qk_norm_rope_cache": "qkv",
    "rope_decode_attention": ("out", "k", "v"),
    "norm_head": ("logits", "best"),
}
CACHES_AT = (11, 12)  # which arguments the operations with a cache write into


@dataclass
class Row:
    """One operation in one layer (None: outside the layers), the worst of its calls."""

    layer: int | None
    operation: str
    triton: Errors
    torch: Errors
    wrong: str | None


@dataclass
class Report:
    """What verification found. `problems` is empty where the Triton path is right."""

    rows: list[Row] = field(default_factory=list)
    depth: list[tuple[float, float]] = field(default_factory=list)  # stream after each layer: (triton, torch)
    divergence: dict[str, float] = field(default_factory=dict)  # mean KL of the next token's distribution, in nats
    greedy: str = ""
    problems: list[str] = field(default_factory=list)


class _Comparison:
    """Operations that run kernel and definition side by side and go on with the definition's result."""

    def __init__(self, report: Report) -> None:
        self.layer: int | None = None
        self.rows: dict[tuple[int | None, str], Row] = {}
        self.report = report

    def operations(self) -> Operations:
        names = [entry.name for entry in dataclasses.fields(Operations)]
        return Operations(**{name: self._beside(name) for name in names})

    def _beside(self, name: str) -> Callable[..., Any]:
        kernel, definition = getattr(KERNELS, name), getattr(DEFINITIONS, name)

        def run(*args: Any) -> Any:
            results = [
                _results(name, operation, values)
                for operation, values in (
                    (kernel, args),
                    (definition, args),
                    (definition, [widened(value) for value in args]),
                )
            ]
            for part, (mine, plain, truth) in enumerate(zip(*results, strict=True)):
                self._note(name, part, mine, plain, truth)
            return definition(*args)

        return run

    def _note(self, name: str, part: int, mine: Tensor, plain: Tensor, truth: Tensor) -> None:
        found, allowed = errors(mine, truth), errors(plain, truth)
        wrong = broken(found, allowed, truth)
        if mine.dtype != plain.dtype:
            wrong = f"gives {mine.dtype}, not {plain.dtype}"
        parts = PARTS.get(name)
        label = name if parts is None else f"{name} {parts[part]}"
        before = self.rows.get((self.layer, label))
        if before is None:
            self.rows[self.layer, label] = before = Row(self.layer, label, found, allowed, None)
            self.report.rows.append(before)
        before.triton = Errors(*map(max, before.triton, found))
        before.torch = Errors(*map(max, before.torch, allowed))
        if wrong is not None and before.wrong is None:
            before.wrong = wrong
            where = "outside the layers" if self.layer is None else f"layer {self.layer}"
            self.report.problems.append(f"{where}, {label}: {wrong}")


def _results(name: str, operation: Callable[..., Any], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """What a call computes, as tensors to compare; what it would write in place is written into copies."""
    if name in ("qk_norm_rope_cache", "rope_decode_attention"):
        caches = [args[i].clone() for i in CACHES_AT]
        return operation(*args[: CACHES_AT[0]], *caches, *args[CACHES_AT[-1] + 1 :]), *caches
    if name == "norm_head":
        logits, best = operation(*args)
        chosen = logits.float().gather(1, 0x7FFFFFFF - (best.unsqueeze(1) & 0x7FFFFFFF))
        return logits, logits.float().amax(1, keepdim=True) - chosen
    if name == "sample":
        logits, temperature, top_k, top_p, uniform = args
        tokens = operation(*args)
        if temperature == 0:
            return (tokens,)
        return (_distance(logits.double(), temperature, top_k, top_p, uniform, tokens),)
    result = operation(*args)
    return result if isinstance(result, tuple) else (result,)


def _distance(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor, tokens: Tensor) -> Tensor:
    """[R] float64: how far, in probability, each row's number lies outside the interval of the token it drew.

    0 where the token is right, infinite where it may not be drawn at all. Rounding moves the borders by about 1e-7.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p + 1e-6, 0.0)
    upper = probabilities.cumsum(-1)
    match = ids == tokens.unsqueeze(-1)
    at = match.int().argmax(-1, keepdim=True)
    high, width = upper.gather(-1, at), probabilities.gather(-1, at)
    point = uniform.double().unsqueeze(-1) * upper[:, -1:]
    distance = torch.maximum(high - width - point, point - high).clamp(min=0)
    distance = distance.masked_fill((distance < 1e-5) & (width > 0), 0.0)
    impossible = (width <= 0) | ~match.any(-1, keepdim=True)
    return distance.masked_fill(impossible, float("inf")).squeeze(-1)


def verify(model: Decoder, tokens: Sequence[int], new_tokens: int = 16) -> Report:
    """Holds the Triton path of `model` against its PyTorch path on a prompt. The model's backend stays as it is.

    Raises TritiumError where the Triton path cannot run, and for a prompt that does not fit.
    """
    if len(tokens) < 3:
        raise TritiumError(f"verification needs a prompt of 3 tokens or more, got {len(tokens)}")
    model.check_length(len(tokens) + new_tokens)
    model.check_tokens(torch.tensor(tokens), "the prompt")
    report = Report()
    with torch.inference_mode():
        Backend("triton").kernels(model.embedding.weight)
        _each_operation(model, list(tokens), report)
        _whole_paths(model, list(tokens), report)
    _greedy(model, list(tokens), new_tokens, report)
    return report


def _each_operation(model: Decoder, tokens: list[int], report: Report) -> None:
    """Without a cache and with the vendor's matmuls; then in two pieces into a cache, and two tokens one by one."""
    comparison = _Comparison(report)
    operations = comparison.operations()
    ids = torch.tensor(tokens, device=model.device)
    with_cache = compose("comparison", operations, Modes())
    steps = fuse(with_cache, operations)
    packed = compose("comparison", operations, Modes(batch_invariant=False))
    _through(model, ids, Batch.fresh([len(tokens)], model.device), packed, comparison)
    cache = KVCache(model.config, 1, len(tokens), dtype=model.dtype, device=model.device)
    border = [0, (len(tokens) - 2) // 2, len(tokens) - 2, len(tokens) - 1, len(tokens)]
    logits = None
    for start, end in pairwise(border):
        if end > start:
            batch = Batch.appended(cache, [0], [end - start], [len(tokens) - 2])
            # Of the two single tokens, the last goes through the kernels of a decode step.
            kernels = steps if end == len(tokens) else with_cache
            logits = _through(model, ids[start:end], batch, kernels, comparison)
            cache.advance([0], [end - start])
    assert logits is not None
    uniforms = (torch.arange(UNIFORMS, device=model.device) + 0.5) / UNIFORMS
    for temperature, top_k, top_p in SAMPLING:
        uniform = None if temperature == 0 else uniforms
        operations.sample(logits[-1:].repeat(UNIFORMS, 1), temperature, top_k, top_p, uniform)


def _through(model: Decoder, ids: Tensor, batch: Batch, kernels: KernelSet, comparison: _Comparison) -> Tensor:
    """Logits of every token, telling the comparison in which layer it is."""
    plan = model.bind()
    x = _embedded(plan, ids, batch)
    for index, layer in enumerate(plan.layers):
        comparison.layer = index
        x = run_layer(x, layer, batch, kernels)
    comparison.layer = None
    logits = kernels.norm_head(x, plan.norm, plan.head)[1]
    if batch.cache is None:  # as in training
        kernels.cross_entropy(logits, ids)
        kernels.norm_head_loss(x, plan.norm, plan.head, ids, Loss())
    return logits


def _embedded(plan: Any, ids: Tensor, batch: Batch) -> Tensor:
    x = torch.nn.functional.embedding(ids, plan.embedding)
    return x if plan.positions is None else x + torch.nn.functional.embedding(batch.positions, plan.positions)


def _whole_paths(model: Decoder, tokens: list[int], report: Report) -> None:
    """Both paths and the truth from end to end: the stream after every layer, the logits."""
    exact = {entry.name: _exact(getattr(DEFINITIONS, entry.name)) for entry in dataclasses.fields(Operations)}
    paths = [compose("truth", Operations(**exact), Modes()), triton_kernels(model.backend.modes), REFERENCE]
    ids = torch.tensor(tokens, device=model.device)
    plan = model.bind()
    batches = [Batch.fresh([len(tokens)], model.device) for _ in paths]
    streams = [_embedded(plan, ids, batches[0])] * 3
    streams[0] = streams[0].double()
    for layer in plan.layers:
        streams = [run_layer(x, layer, batch, path) for x, batch, path in zip(streams, batches, paths, strict=True)]
        scale = streams[0].square().mean().sqrt().item() or 1.0
        triton, plain = (errors(stream, streams[0]).rms / scale for stream in streams[1:])
        report.depth.append((triton, plain))
    logits = [path.norm_head(x, plan.norm, plan.head)[1] for x, path in zip(streams, paths, strict=True)]
    truth = logits[0]
    report.divergence = {
        "triton from truth": _divergence(truth, logits[1]),
        "torch from truth": _divergence(truth, logits[2]),
        "triton from torch": _divergence(logits[2], logits[1]),
    }
    found, allowed = errors(logits[1], truth), errors(logits[2], truth)
    free = WHOLE_FREE * truth.abs().max().item()
    if not found.rms <= WHOLE_PATH * allowed.rms + free:
        report.problems.append(f"logits: rms error {found.rms:.3g}, that of the PyTorch path is {allowed.rms:.3g}")


def _exact(definition: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: definition(*map(widened, args))


def _divergence(p: Tensor, q: Tensor) -> float:
    """Mean over the positions of KL(p || q)."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def _greedy(model: Decoder, tokens: list[int], new_tokens: int, report: Report) -> None:
    """Whether both paths go on with the same tokens, and if not, whether their logits can tell the two apart."""
    backend = model.backend
    continued = []
    try:
        for name in ("triton", "torch"):
            model.backend = Backend(name, backend.modes if name == "triton" else Modes())
            try:
                steps = list(generate(model, [tokens], SamplingOptions(new_tokens, temperature=0)))
            except TritiumError as error:
                if name == "torch":
                    raise
                report.greedy = f"the Triton path cannot continue the prompt: {error}"
                report.problems.append(report.greedy)
                return
            continued.append([row[0] for row in steps])
        same = first_difference(*continued)
        if same is None:
            report.greedy = f"the same {new_tokens} greedy tokens"
            return
        prefix = torch.tensor([tokens + [token for token in continued[1][:same] if token is not None]])
        with torch.inference_mode():
            last = []
            for name in ("triton", "torch"):
                model.backend = Backend(name, backend.modes if name == "triton" else Modes())
                last.append(model(prefix.to(model.device)).logits[0, -1].double())
    finally:
        model.backend = backend
    mine, plain = continued[0][same], continued[1][same]
    margin = (last[1][plain] - last[1][mine]).item()
    apart = (last[0] - last[1]).abs().max().item()
    report.greedy = (
        f"greedy token {same} differs: {mine}, the PyTorch path has {plain}, {margin:.3g} ahead in its logits; the "
        f"paths' logits are {apart:.3g} apart there"
    )
    if margin > min(2 * apart, resolution(last[1], model.dtype)):
        report.problems.append(report.greedy)


def first_difference(mine: Sequence[Any], theirs: Sequence[Any]) -> int | None:
    """Where two equally long continuations part; None where they do not."""
    return next((i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]), None)


def resolution(logits: Tensor, dtype: torch.dtype) -> float:
    """How far ahead of another a token must be for logits that were computed in `dtype` to tell the two apart."""
    return 16 * torch.finfo(dtype).eps * logits.abs().max().item()


def table(report: Report) -> str:
    """The report as text: every operation of every layer, then the whole."""
    heads = "  ".join(f"{head:>10}" for head in ("triton max", "torch max", "triton rms", "torch rms"))
    lines = [f"{'layer':>5}  {'operation':<20}  {heads}"]
    for row in sorted(report.rows, key=lambda row: (row.layer is None, row.layer)):
        numbers = (row.triton.largest, row.torch.largest, row.triton.rms, row.torch.rms)
        cells = "  ".join(f"{number:>10.3g}" for number in numbers)
        place = "-" if row.layer is None else row.layer
        lines.append(f"{place:>5}  {row.operation:<20}  {cells}{'  WRONG' if row.wrong else ''}")
    lines += ["", *(f"KL, {name}: {value:.3g} nats" for name, value in report.divergence.items()), report.greedy]
    verdict = f"wrong: {len(report.problems)} problems" if report.problems else "right"
    return "\n".join([*lines, *report.problems, f"The Triton path is {verdict}."])


def plot(report: Report, path: str | Path) -> None:
    """Draws the stream's error by depth, both paths, to a PNG file. Raises TritiumError without matplotlib."""
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 4), layout="constrained")
    except ImportError:
        raise TritiumError("--plot needs matplotlib: pip install matplotlib") from None
    axes = figure.add_subplot()
    for name, values in zip(("triton", "torch"), zip(*report.depth, strict=True), strict=True):
        axes.plot(range(len(values)), values, marker=".", label=name)
    axes.set(xlabel="layer", ylabel="rms error of the stream / its rms", yscale="log", title="Error by depth")
    axes.legend()
    figure.savefig(path, format="png")
