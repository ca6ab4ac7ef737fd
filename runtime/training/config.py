"""A training run as one frozen, checked value: what a configuration file says, and the defaults of what it leaves out.

docs/development/training.md explains every key.
"""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..errors import TritiumError, nearest
from ..files import read_yaml
from ..lora import ALL_LINEAR, LoRA
from ..registry import MODELS
from ..spec import checked_value

LARGEST_SEED = 2**63 - 1


def _positive(section: Any, *names: str) -> None:
    """Raises TritiumError for a field that is given and not above 0."""
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise TritiumError(f"{name}: must be above 0, got {value}")


def _fraction(section: Any, name: str, low_is_allowed: bool) -> None:
    value = getattr(section, name)
    if not (0 <= value < 1 if low_is_allowed else 0 < value < 1):
        raise TritiumError(f"{name}: must be {'0 or more' if low_is_allowed else 'above 0'} and below 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Initialise:
    """How random weights are drawn."""

    method: Literal["normal", "xavier"] = "normal"
    std: float = 0.02
    scale_residual: bool = False  # GPT-2's: what is added to the stream starts smaller by sqrt(2 layers)

    def __post_init__(self) -> None:
        _positive(self, "std")


@dataclass(frozen=True, kw_only=True)
class Fraction:
    """A part of the training text, from its end."""

    fraction: float

    def __post_init__(self) -> None:
        _fraction(self, "fraction", low_is_allowed=False)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer:
    """A byte-level BPE tokenizer, trained on the text."""

    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 257:
            raise TritiumError(f"vocab_size: must be 257 or more (bytes and the end of text), got {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where tokens come from, and how they are put together into batches."""

    train: tuple[str, ...]
    validation: tuple[str, ...] | Fraction | None = None
    held_out: float = 0.0  # part of the text's end that is not looked at at all
    tokenizer: str | TrainTokenizer | None = None  # "characters", a folder, or one to train; None: the model's own
    document_separator: str | None = None
    dtype: Literal["uint16", "uint32"] | None = None  # of .bin files
    eos_id: int | None = None  # what stands between documents; None: the tokenizer's end of text
    sampling: Literal["windows", "documents"] = "windows"
    group: int | None = None  # pieces of the text that are put together into one document, on average
    merge_dropout: float = 0.0  # chance that a merged token is replaced by its two parts
    sequence_length: int | tuple[tuple[float, int], ...]
    batch_size: int | None = None  # sequences of a micro-batch
    batch_tokens: int | None = None  # tokens of a micro-batch
    accumulation: int = 1  # micro-batches of a step

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "batch_tokens", "accumulation", "group")
        _fraction(self, "held_out", low_is_allowed=True)
        _fraction(self, "merge_dropout", low_is_allowed=True)
        if self.eos_id is not None and self.eos_id < 0:
            raise TritiumError(f"eos_id: must be 0 or more, got {self.eos_id}")
        if not self.train:
            raise TritiumError("train: must name at least one file")
        if self.document_separator == "":
            raise TritiumError("document_separator: must not be empty")
        if (self.batch_size is None) == (self.batch_tokens is None):
            raise TritiumError("give either batch_size or batch_tokens")
        if self.sampling == "documents" and self.batch_tokens is None:
            raise TritiumError("batch_size: documents are packed into batches of so many tokens: give batch_tokens")
        if self.sampling == "windows" and (self.group is not None or self.merge_dropout):
            raise TritiumError("group and merge_dropout: are for sampling: documents")
        if self.group is not None and self.document_separator is None:
            raise TritiumError("group: needs a document_separator, between the pieces")
        if isinstance(self.sequence_length, tuple):
            starts = [start for start, _ in self.sequence_length]
            if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= 1:
                raise TritiumError(
                    "sequence_length: a schedule is a list of [part of the training, length], the parts rising from "
                    f"0.0 and below 1, got {[list(entry) for entry in self.sequence_length]}"
                )
        for length in self.lengths:
            if length < 1:
                raise TritiumError(f"sequence_length: must be above 0, got {length}")
            if self.sampling == "windows" and self.batch_tokens is not None and self.batch_tokens % length:
                raise TritiumError(
                    f"batch_tokens: must be a multiple of the sequence_length {length}, got {self.batch_tokens}"
                )

    @property
    def lengths(self) -> list[int]:
        """Every sequence length of the schedule, in its order."""
        if isinstance(self.sequence_length, int):
            return [self.sequence_length]
        return [length for _, length in self.sequence_length]

    def length_at(self, done: float) -> int:
        """The sequence length when the part `done` of the training is behind."""
        if isinstance(self.sequence_length, int):
            return self.sequence_length
        return [length for start, length in self.sequence_length if start <= done][-1]

    def tokens_at(self, done: float) -> int:
        """Tokens of a micro-batch then."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        assert self.batch_size is not None
        return self.batch_size * self.length_at(done)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019)."""

    learning_rate: float
    minimum_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # of the matrices other than embeddings
    clip: float | None = 1.0  # largest norm of the gradient
    average: int | None = None  # steps over which the averaged weights forget

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps", "clip", "average")
        if not 0 <= self.minimum_rate <= self.learning_rate:
            raise TritiumError(f"minimum_rate: must be 0 to the learning_rate, got {self.minimum_rate}")
        if self.weight_decay < 0:
            raise TritiumError(f"weight_decay: must be 0 or more, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise TritiumError(f"betas: must be 0 or more and below 1, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and how the learning rate goes."""

    steps: int
    warmup: int | float = 0  # steps, or a part of them
    decay: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        _positive(self, "steps")
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1) or self.warmup > self.steps:
            raise TritiumError(f"warmup: must be a number of steps, or a part of them below 1, got {self.warmup}")

    @property
    def warmup_steps(self) -> int:
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * self.steps)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the processes that torchrun started share the work."""

    data: int | None = None  # replicas of the model; None: as many as the processes make
    shard: int = 1  # processes over which a replica's weights are spread, each with micro-batches of its own
    tensor: int = 1  # processes that compute each layer together

    def __post_init__(self) -> None:
        _positive(self, "data", "shard", "tensor")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters that are trained in place of the weights: see ../lora.py."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0
    rslora: bool = False
    merge: bool = True  # checkpoints hold the merged model too

    def __post_init__(self) -> None:
        LoRA(self.rank, self.alpha, self.targets, self.dropout, self.rslora)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is added to the cross-entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _fraction(self, "label_smoothing", low_is_allowed=True)
        if self.z_loss < 0:
            raise TritiumError(f"z_loss: must be 0 or more, got {self.z_loss}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss on the validation data."""

    every: int | None = None  # steps; None: only at the end
    tokens: int | Literal["whole"] = "whole"
    window: int | None = None  # tokens that are read together; None: the last sequence length
    stride: int | None = None  # tokens from window to window; None: the window, so that they do not overlap

    def __post_init__(self) -> None:
        _positive(self, "every", "window", "stride")
        if isinstance(self.tokens, int):
            _positive(self, "tokens")
        if self.stride is not None and self.window is not None and self.stride > self.window:
            raise TritiumError(f"stride: must be at most the window of {self.window}, got {self.stride}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept of the run."""

    every: int | None = None  # steps; None: only at the end
    keep: int = 2  # newest ones that stay, besides the best
    dtype: Literal["bfloat16", "float16", "float32"] | None = None  # of model.safetensors; None: the model's own

    def __post_init__(self) -> None:
        _positive(self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written down."""

    every: int = 10  # steps

    def __post_init__(self) -> None:
        _positive(self, "every")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One run."""

    model: str  # a size's YAML, family:size, a checkpoint folder or a hub id
    overrides: Mapping[str, Any] = field(default_factory=dict)  # fields of the ModelSpec
    initialise: Initialise | None = None  # None: a checkpoint's own weights; for a YAML the defaults of Initialise
    output: str
    seed: int = 1
    device: str | None = None
    parallel: Parallel = Parallel()
    backend: Literal["auto", "triton", "torch"] = "auto"
    batch_invariant: bool = False
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    gradient_checkpointing: Literal["nothing", "attention", "products"] | None = None
    compile: bool = False
    lora: Lora | None = None  # None: the weights themselves are trained
    freeze: tuple[str, ...] = ()  # patterns of the names of parameters that stay as they are
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    loss: Loss = Loss()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise TritiumError(f"seed: must be 0 to 2^63 - 1, got {self.seed}")
        if self.lora is not None and (self.parallel.shard > 1 or self.parallel.tensor > 1):
            raise TritiumError("lora: is for whole replicas: leave it out, or parallel's shard and tensor")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def find(path: str | Path) -> Path:
    """A file or folder as it is named, or where that is not there, the one of that name in the installed package."""
    found = Path(path).expanduser()
    beside = MODELS.parent / found
    return beside if not found.exists() and not found.is_absolute() and beside.exists() else found


def read_config(path: str | Path, changes: Sequence[str] = ()) -> TrainingConfig:
    """A run's configuration from its YAML file, with `changes` of the form `section.key=value` laid over it.

    Raises TritiumError, one line with the key's path, for what is missing, unknown, of a wrong type or out of range.
    """
    found = find(path)
    values = read_yaml(found)
    for change in changes:
        _lay_over(values, change)
    return parse(values, str(path))


def parse(values: Mapping[str, Any], where: str) -> TrainingConfig:
    """A run's configuration from the mapping that its file holds. Raises TritiumError, naming `where` and the key."""
    config: TrainingConfig = _section(TrainingConfig, values, where)
    return config


def _lay_over(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *sections, key = name.split(".")
    if not equals or not all((*sections, key)):
        raise TritiumError(f"--set: must be KEY=VALUE, such as optimizer.learning_rate=3.0e-4, got {change!r}")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise TritiumError(f"--set: {name}: not a YAML value: {text!r}") from None


def _section(kind: Any, values: Any, where: str) -> Any:
    """A dataclass from a mapping."""
    if not isinstance(values, Mapping):
        raise TritiumError(f"{where}: must hold keys and values, got {values!r}")
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise TritiumError(f"{where}: unknown key {key!r}; {nearest(str(key), hints)}")
    required = {entry.name for entry in dataclasses.fields(kind) if entry.default is entry.default_factory is MISSING}
    if missing := [name for name in hints if name in required and name not in values]:
        raise TritiumError(f"{where}: missing {', '.join(missing)}")
    parsed = {name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return kind(**parsed)
    except TritiumError as error:
        raise TritiumError(f"{where}: {error}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`: of alternatives the one that has the value's form."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        choices = [choice for choice in arguments if choice is not type(None)]
        return _value(next((choice for choice in choices if _has_form(value, choice)), choices[0]), value, where)
    if dataclasses.is_dataclass(kind):
        return _section(kind, value, where)
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is str:
            return (value,)
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
            raise TritiumError(f"{where}: must be a list{count}, got {value!r}")
        kinds = arguments if arguments[-1] is not Ellipsis else arguments[:1] * len(value)
        return tuple(
            _value(kind, entry, f"{where}[{index}]")
            for index, (kind, entry) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is not None and origin is not Literal:  # a mapping
        if not isinstance(value, Mapping):
            raise TritiumError(f"{where}: must hold keys and values, got {value!r}")
        return dict(value)
    return checked_value(value, kind, where)


def _has_form(value: Any, kind: Any) -> bool:
    """Whether a value can only be meant as this type of several."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if get_origin(kind) is tuple:
        return isinstance(value, list) or (isinstance(value, str) and get_args(kind)[0] is str)
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    return type(value) is kind
