"""The one decoder that every family is assembled into from its spec."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..kernels.cross_entropy import IGNORE_INDEX
from .backend import Backend, shape_obstacle
from .batch import Batch, Padding
from .errors import TritiumError
from .generation import SamplingOptions, generate_padded
from .kernel_set import REFERENCE, KernelSet, Loss, normalise
from .layers import Layer, TransformerDecoder, as_spec
from .log_probs import Log, padded
from .parallel.exchange import Exchange
from .plan import Dense, Norm, Plan
from .quantisation import QuantisedLinear, check_dense, draw
from .sessions import Sessions
from .spec import DTYPES
from .triton_path import Modes


@dataclass
class ModelOutput:
    """What a forward returns. `hidden_states` are those after the final norm; `loss` is None without labels."""

    loss: Tensor | None
    logits: Tensor | None  # [B, S, V]; None where they were not asked for
    hidden_states: Tensor  # [B, S, E]


class Decoder(nn.Module):
    """Token ids to logits. `config` is a ModelSpec or anything with `to_spec()`."""

    def __init__(self, config: Any, backend: str = "auto") -> None:
        super().__init__()
        self.config = as_spec(config)
        spec = self.config
        self.embedding = _embedding(spec.vocab_size, spec.embedding_dim)
        learned = spec.positions == "learned"
        self.position_embedding = _embedding(spec.context_length, spec.embedding_dim) if learned else None
        self.stack = TransformerDecoder(spec)
        self.head: nn.Linear | QuantisedLinear | None = None
        if not spec.tie_embeddings:
            self.head = nn.Linear(spec.embedding_dim, spec.vocab_size, bias=False)
        self.quantisation: str | None = None  # the scheme in which weights are stored: see quantisation.py
        self.backend = Backend(backend)
        # Other ones only where processes share the layers: see parallel/tensor.py.
        self.local_config = self.config
        self.exchange: Exchange | None = None
        self.sessions = Sessions()
        self.copied: tuple[str, ...] = ()  # parameters of transformers that are no views of ours: dropin/conversion.py

    def _apply(self, fn: Any, recurse: bool = True) -> "Decoder":
        self.sessions.clear()  # it holds a cache where the model was
        found: Decoder = super()._apply(fn, recurse)
        return found

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def kernels(self) -> KernelSet:
        """The kernel set that runs this model now: it depends on where the weights are, and on gradients.

        Raises TritiumError where backend `triton` was asked for and cannot run it.
        """
        if self.backend.name != "torch" and (why := shape_obstacle(self.config)) is not None:
            if self.backend.name == "triton":
                raise TritiumError(f"backend 'triton' cannot run this model: {why}; use backend 'torch' or 'auto'")
            return REFERENCE
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            check_dense(self, "training")
        return self.backend.kernels(self.embedding.weight, self.parameters())

    def use_backend(
        self, backend: str, *, batch_invariant: bool = True, sampler_equals_trainer: bool = False
    ) -> "Decoder":
        """Switches a loaded model between `torch`, `triton` and `auto`, on the same weights.

        The two modes are promises of the Triton path about bits: see Modes in triton_path.py. Raises TritiumError for
        an unknown name, and for `triton` where it cannot run; the model then stays as it was.
        """
        self.backend = Backend(backend, Modes(batch_invariant, sampler_equals_trainer))
        return self

    def num_parameters(self) -> int:
        """Weights of the model, in however many bits they are stored; tied embeddings count once."""
        own = None if self.config.tie_embeddings else self.head
        quantised = (module for module in self.stack.modules() if isinstance(module, QuantisedLinear))
        count = sum(module.num_parameters() for module in quantised)
        count += own.num_parameters() if isinstance(own, QuantisedLinear) else 0
        return count + sum(parameter.numel() for parameter in self.parameters())

    def enable_gradient_checkpointing(self, enable: bool = True, keep: str = "nothing") -> None:
        """Recomputes each layer in the backward pass instead of keeping its activations.

        `keep` says what is kept besides a layer's input: `nothing`; the results of `attention`, which costs the most to
        compute again for what it takes to keep; or of the matrix `products` too. Raises TritiumError for another.
        """
        self.stack.enable_gradient_checkpointing(enable, keep)

    def compute_in(self, dtype: torch.dtype | None) -> "Decoder":
        """Computes in `dtype` on parameters that stay as they are, whose gradients come in their own dtype: bfloat16
        over float32 parameters is how one trains. None: in the parameters' own dtype.
        """
        if dtype is not None and dtype not in DTYPES.values():
            raise TritiumError(f"compute_in: takes {', '.join(DTYPES)} or None, got {dtype}")
        for module in self.modules():
            if isinstance(module, Layer):
                module.compute_dtype = dtype
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool = True,
    ) -> ModelOutput:
        """input_ids [B, S] int64, attention_mask [B, S] (1 at real tokens, any padding), labels [B, S].

        The loss is the mean over the real tokens of predicting the next label of the same row; labels of -100 do not
        count. Logits and hidden states are zero at the padding. With `return_logits=False` the logits are never whole
        in memory, and None in the result. Raises TritiumError for token ids outside the vocabulary, rows beyond the
        context length and shapes that do not fit; under torch.compile ids are not looked at.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise TritiumError(f"labels: must be {list(input_ids.shape)} like input_ids, got {list(labels.shape)}")
        padding, batch = self._packed(input_ids, attention_mask)
        if labels is not None and not torch.compiler.is_compiling():
            self.check_tokens(labels.masked_fill(labels == IGNORE_INDEX, 0), "labels")
        kernels = self.kernels
        x, norm = self._advance(padding.pack(input_ids), batch, kernels)
        follow = None if labels is None else _next_labels(padding.pack(labels), batch.device_starts)
        loss = logits = None
        if return_logits:
            hidden, logits = kernels.norm_head(x, norm, self._bind_head())
            assert hidden is not None  # only the kernels of a decode step leave it out
            loss = None if follow is None else kernels.cross_entropy(logits, follow)
            logits = padding.unpack(logits)
        elif follow is None:
            hidden = normalise(x, norm)[1]
        else:
            hidden, loss = kernels.norm_head_loss(x, norm, self._bind_head(), follow, Loss())
        return ModelOutput(loss, logits, padding.unpack(hidden))

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        batch: Batch,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """The loss of packed sequences, a float32 scalar: what a training step calls. Logits never stand whole. With
        the reduction `none` each token's, [T]: without the other options, minus the next one's log-probability.

        tokens [T] int64, labels [T] int64: what follows each token, -100 where that does not count; `batch` bounds the
        sequences (`Batch.fresh(counts, device)`). Ids and lengths are the caller's to check: nothing here waits for the
        device. Raises ValueError for options that kernels/cross_entropy.py does not take.
        """
        kernels = self.kernels
        x, norm = self._advance(tokens, batch, kernels)
        how = Loss(label_smoothing, z_loss, reduction)
        return kernels.norm_head_loss(x, norm, self._bind_head(), labels, how)[1]

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The log-probability of each next token, float32 [B, S - 1]: of input_ids[:, 1:], given all that is before.

        input_ids [B, S] int64, attention_mask [B, S] (1 at real tokens, any padding). 0 for padding, and for a row's
        first token where padding is before it: nothing foretells it. With gradients where they are enabled; logits
        never stand whole. See runtime/log_probs.py for when these are what generation reports, to the bit. Raises what
        `forward` raises.
        """
        padding, batch = self._packed(input_ids, attention_mask)
        kernels = self.kernels
        x, norm = self._advance(padding.pack(input_ids), batch, kernels)
        follow = _next_labels(padding.pack(input_ids), batch.device_starts)
        losses = kernels.norm_head_loss(x, norm, self._bind_head(), follow, Loss(reduction="none"))[1]
        return padding.unpack(-losses)[:, :-1]

    def _packed(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Padding, Batch]:
        """How padded rows are packed. Raises TritiumError for what `forward` refuses of them."""
        if input_ids.dim() != 2:
            raise TritiumError(f"input_ids: must be [batch, length], got {list(input_ids.shape)}")
        if torch.compiler.is_compiling():
            self.check_length(input_ids.shape[1])
            return Padding.traced(input_ids, attention_mask)
        self.check_tokens(input_ids, "input_ids")
        padding = Padding.of(input_ids, attention_mask)
        self.check_length(max(padding.counts, default=0))
        return padding, Batch.fresh(padding.counts, input_ids.device)

    def _advance(self, tokens: Tensor, batch: Batch, kernels: KernelSet) -> tuple[Tensor, Norm | None]:
        """Packed tokens [T] -> the stream [T, E] after all blocks, and the norm that comes last; without a cache."""
        x = self._embed(tokens, self.embedding.weight, batch, self._positions())
        if self.training and self.config.dropout:
            x = nn.functional.dropout(x, self.config.dropout)
        return self.stack.advance(x, batch, kernels)

    def _positions(self) -> Tensor | None:
        return None if self.position_embedding is None else self.position_embedding.weight

    def _bind_head(self) -> Dense:
        if self.head is not None:
            return self.stack.dense(self.head)
        return Dense(self.stack.cast(self.embedding.weight), None)

    def _embed(
        self, tokens: Tensor, weight: Tensor, batch: Batch, positions: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        x = nn.functional.embedding(tokens, weight) if out is None else torch.index_select(weight, 0, tokens, out=out)
        if positions is not None:
            x = x + nn.functional.embedding(batch.positions, positions)
        return self.stack.cast(x)

    def bind(self) -> Plan:
        """The plan of this model as its parameters are now: see plan.py."""
        layers, norm = self.stack.bind()
        return Plan(self.embedding.weight, self._positions(), layers, norm, self._bind_head())

    def run(self, plan: Plan, tokens: Tensor, batch: Batch, last_only: bool = False) -> tuple[Tensor | None, Tensor]:
        """Packed tokens [T] -> (hidden after the final norm, logits), for all of them or each row's last.

        With a cache in the batch, the new keys and values are in it afterwards and its lengths are advanced. A decode
        step whose norm and head are one kernel has no hidden states to give: None.
        """
        kernels = self.kernels
        if batch.is_decode and kernels.decode is not None:
            kernels = kernels.decode
        found = self.compute(plan, tokens, batch, kernels, last_only)
        if batch.cache is not None:
            batch.cache.advance(batch.rows, [end - start for start, end in pairwise(batch.starts)])
        return found

    def compute(
        self,
        plan: Plan,
        tokens: Tensor,
        batch: Batch,
        kernels: KernelSet,
        last_only: bool = False,
        stream: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """`run` by these kernels, the cache's lengths left as they are; what is embedded goes into `stream`."""
        if kernels.step is not None:
            return None, kernels.step(plan, tokens, batch)
        x = self._embed(tokens, plan.embedding, batch, plan.positions, stream)
        x = self.stack.run(x, plan.layers, batch, kernels)
        if last_only and not batch.is_decode:
            x = x[[end - 1 for end in batch.starts[1:]]]
        return kernels.norm_head(x, plan.norm, plan.head)

    @overload
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 0.9,
        *,
        top_k: int = 0,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        progress: Callable[[int], None] | None = None,
        return_log_probs: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 0.9,
        *,
        top_k: int = 0,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        progress: Callable[[int], None] | None = None,
        return_log_probs: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 0.9,
        *,
        top_k: int = 0,
        seed: int | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        progress: Callable[[int], None] | None = None,
        return_log_probs: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prompts [B, S] -> prompts followed by what was generated, [B, S + N] with N at most `max_new_tokens`.

        Row r draws with the seed `seed + r` (a fresh random seed when None), so that a row repeats whatever else is
        in the batch. `temperature=0` is greedy. A row that met an EOS is filled with `pad_token_id` behind it.

        With `return_log_probs` the log-probabilities of the new tokens come besides, float32 [B, N], 0 behind an EOS:
        at temperature 1 over all ids, whatever the token was chosen by.
        """
        options = SamplingOptions(max_new_tokens, temperature, top_k, top_p, seed)
        eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        log: Log | None = [] if return_log_probs else None
        tokens = generate_padded(self, input_ids, attention_mask, options, eos, pad_token_id, progress, log)
        return tokens if log is None else (tokens, padded(log, len(tokens)).to(tokens.device))

    def check_tokens(self, tokens: Tensor, what: str) -> None:
        """Raises TritiumError where an id lies outside the vocabulary: checked before anything indexes with it."""
        if tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() < 1:
            raise TritiumError(f"{what}: must hold whole numbers (int64), got {tokens.dtype} {list(tokens.shape)}")
        if tokens.numel():
            low, high = (int(bound) for bound in tokens.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise TritiumError(f"{what}: token id {wrong} lies outside 0 to {self.config.vocab_size - 1}")

    def check_length(self, length: int) -> None:
        """Raises TritiumError for a row longer than the context."""
        if length > self.config.context_length:
            raise TritiumError(f"a row of {length} tokens exceeds the context length of {self.config.context_length}")

    @torch.no_grad()
    def initialise(self, std: float = 0.02, seed: int = 0) -> "Decoder":
        """Redraws matrices from a normal distribution, sets norms to one and biases to zero. Raises TritiumError for a
        quantised model.
        """
        check_dense(self, "initialise")
        if self.device.type == "meta":  # nothing to draw into yet
            return self
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            draw(name, parameter, std, generator)
        return self


def _embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding, but that on the meta device nothing is drawn: that would import torch's compiler, for seconds."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding.from_pretrained(weight, freeze=False)


def _next_labels(labels: Tensor, starts: Tensor) -> Tensor:
    """Packed labels [T] shifted so that each token's is its successor's; a row's last has none, nor has padding behind
    the last row: starts [rows + 1].
    """
    place = torch.arange(1, labels.shape[0] + 1, device=labels.device)
    alone = torch.isin(place, starts) | (place > starts[-1])
    return nn.functional.pad(labels[1:].to(torch.int64), (0, 1), value=IGNORE_INDEX).masked_fill(alone, IGNORE_INDEX)
