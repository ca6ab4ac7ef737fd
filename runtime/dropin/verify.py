"""`tritium verify --transformers`: a checkpoint three ways, `transformers` eager, accelerated, and as our decoder.

All read the same prompt. Eager in float64 is the truth, eager in the checkpoint's dtype is what the others are measured
by: the root mean square error of their logits may be twice that of eager, as `tritium verify` has it for whole paths.
Then all continue two rows of different lengths greedily, so that padding and caches are met.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..accuracy import Errors, errors
from ..errors import TritiumError
from ..spec import DTYPES
from ..verify import WHOLE_FREE, WHOLE_PATH, first_difference, resolution
from .accelerate import accelerate
from .conversion import from_transformers
from .packages import theirs


@dataclass
class Way:
    """What one of the three gave."""

    name: str
    logits: Errors
    loss: float
    tokens: list[list[int]]  # the new ones, by row


@dataclass
class Report:
    """What was found. `problems` is empty where all three agree."""

    accelerated: str
    ways: list[Way] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    source: str, prompt: str | list[int], new_tokens: int = 16, device: str | None = None, dtype: str = "auto"
) -> Report:
    """Compares the three on a folder or hub id that `transformers` loads (safetensors only, none of its code is run).

    `dtype` auto: the checkpoint's on a GPU, float32 on a CPU. Memory: the weights once in float64, for the truth.
    Raises TritiumError where `transformers` is absent or cannot load it, and where nothing can be accelerated or no
    decoder of ours be made.
    """
    if dtype not in (*DTYPES, "auto", "checkpoint"):
        raise TritiumError(f"dtype: must be {', '.join(DTYPES)}, checkpoint or auto, got {dtype!r}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ids = _tokens(source, prompt).to(place)
    chosen = DTYPES.get(dtype, "auto" if dtype == "checkpoint" or place.type != "cpu" else torch.float32)
    model = _load(source, place, torch.float64)
    with torch.no_grad():
        truth = model(ids).logits.double()
        loss = model(ids, labels=ids).loss.item()
    del model
    gc.collect()

    model = _load(source, place, chosen)
    report = Report("")
    rows = _rows(ids)
    steps = _measure(report, "eager", model, ids, truth, lambda: _continued(model, rows, new_tokens))
    accelerated = accelerate(model)
    report.accelerated = str(accelerated)
    _measure(report, "accelerated", model, ids, truth, lambda: _continued(model, rows, new_tokens))
    accelerated.undo()
    decoder = from_transformers(model)

    def continued() -> tuple[Tensor, Any]:
        return decoder.generate(rows[0], new_tokens, temperature=0, attention_mask=rows[1]), None

    _measure(report, "our decoder", decoder, ids, truth, continued)
    _judge(report, truth, loss, steps)
    return report


def _load(source: str, place: torch.device, dtype: Any) -> Any:
    how = {"dtype": dtype, "use_safetensors": True}
    try:
        model = theirs("models.auto").AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager", **how)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise TritiumError(f"--transformers: {source}: transformers cannot load it: {error}") from None
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    # Nothing but the length ends a row, for all three alike.
    model.generation_config = theirs("generation").GenerationConfig(pad_token_id=0, do_sample=False)
    return model.to(place).eval()


def _tokens(source: str, prompt: str | list[int]) -> Tensor:
    """[1, S]; where the checkpoint has no tokenizer, ids that lie in any vocabulary of a few hundred."""
    if isinstance(prompt, str):
        try:
            tokenizer = theirs("models.auto").AutoTokenizer.from_pretrained(source)
            prompt = list(tokenizer(prompt)["input_ids"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):
            prompt = []
        prompt = prompt or [(7 * index * index + 3) % 101 for index in range(48)]
    if len(prompt) < 3:
        raise TritiumError(f"--prompt: must have 3 tokens or more, got {len(prompt)}")
    return torch.tensor([prompt])


def _rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows and their mask: the prompt, and what follows its first third, padded on the left."""
    cut = ids.shape[1] // 3
    mask = torch.ones(2, ids.shape[1], dtype=torch.int64, device=ids.device)
    mask[1, :cut] = 0
    return ids.repeat(2, 1).masked_fill(mask == 0, 0), mask


def _continued(model: Any, rows: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Any]:
    """Both rows with what follows, and each step's logits [2, V]."""
    how = {"max_new_tokens": count, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(rows[0], attention_mask=rows[1], **how)
    return found.sequences, found.logits


def _measure(
    report: Report, name: str, model: Any, ids: Tensor, truth: Tensor, continued: Callable[[], tuple[Tensor, Any]]
) -> Any:
    """Notes one of the three; gives the logits of its steps."""
    with torch.no_grad():
        found = errors(model(ids).logits, truth)
        loss = model(ids, labels=ids).loss.item()
        sequences, steps = continued()
    report.ways.append(Way(name, found, loss, sequences[:, ids.shape[1] :].tolist()))
    return steps


def _judge(report: Report, truth: Tensor, loss: float, steps: Any) -> None:
    eager, *others = report.ways
    free = WHOLE_FREE * truth.abs().max().item()
    allowed = WHOLE_PATH * eager.logits.rms + free
    for way in others:
        if not way.logits.rms <= allowed:
            report.problems.append(f"{way.name}: logits: rms error {way.logits.rms:.3g}, allowed are {allowed:.3g}")
        # A loss moves by no more than its logits do.
        room = max(WHOLE_PATH * abs(eager.loss - loss), allowed) + WHOLE_FREE * abs(loss)
        if not abs(way.loss - loss) <= room:
            report.problems.append(
                f"{way.name}: loss {way.loss:.6f} is {abs(way.loss - loss):.3g} off, allowed {room:.3g}"
            )
        for row, (mine, plain) in enumerate(zip(way.tokens, eager.tokens, strict=True)):
            at = first_difference(mine, plain)
            if at is None:
                continue
            logits = steps[at][row].double()
            margin = (logits[plain[at]] - logits[mine[at]]).item()
            what = f"greedy token {at} of row {row} is {mine[at]}, not {plain[at]}, {margin:.3g} ahead in eager"
            text = f"{way.name}: {what}"
            (report.problems if margin > resolution(logits, steps[at].dtype) else report.notes).append(text)


def table(report: Report) -> str:
    """The report as text."""
    lines = [report.accelerated, "", f"{'':<12}  {'logits max':>10}  {'logits rms':>10}  {'loss':>10}  greedy tokens"]
    for way in report.ways:
        same = "" if way is report.ways[0] else " (the same)" if way.tokens == report.ways[0].tokens else " (others)"
        numbers = f"{way.logits.largest:>10.3g}  {way.logits.rms:>10.3g}  {way.loss:>10.6f}"
        lines.append(f"{way.name:<12}  {numbers}  {sum(map(len, way.tokens))}{same}")
    verdict = f"wrong: {len(report.problems)} problems" if report.problems else "right"
    return "\n".join([*lines, *report.notes, *report.problems, f"Accelerated, and as our decoder, it is {verdict}."])
