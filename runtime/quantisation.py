"""Models whose weights are stored in 8 or 4 bits: the module that holds such a weight, and how one comes to hold it.

The projections of all layers are quantised, and the head; embeddings, norms and biases stay as they are. The format is
that of kernels/quantised_linear.py; what it costs in quality is in docs/architecture/quantisation.md.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.quantised_linear import quantise, quantised_shapes
from .errors import TritiumError, nearest
from .plan import QuantisedDense
from .weight_map import Piece

if TYPE_CHECKING:
    from .decoder import Decoder

SCHEMES = {"int8": 8, "int4": 4}  # bits of the layers' weights
HEAD_BITS = 8  # of the head in every scheme: the last thing that is rounded, and a small part of a large model


class QuantisedLinear(nn.Module):
    """In place of an nn.Linear [rows, width], on the meta device; buffers, no parameters: there is nothing to train."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    like: Tensor

    def __init__(self, rows: int, width: int, bias: bool, bits: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.width, self.bits = rows, width, bits
        values, scale = quantised_shapes(rows, width, bits)
        with torch.device("meta"):
            self.register_buffer("values", torch.empty(values, dtype=torch.int8 if bits == 8 else torch.uint8))
            self.register_buffer("scale", torch.empty(scale, dtype=torch.float32 if bits == 8 else dtype))
            self.register_buffer("bias", torch.empty(rows, dtype=dtype) if bias else None)
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        """A scale is a part of what is stored: it keeps its dtype in whatever dtype the model computes."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def store(self, weight: Tensor) -> None:
        """Becomes this weight [rows, width], quantised. Raises ValueError for NaN or infinity in it."""
        values, scale = quantise(weight, self.bits)
        self.values.copy_(values)
        self.scale.copy_(scale)

    def bind(self) -> QuantisedDense:
        return QuantisedDense(self.values, self.bias, self.scale)

    def num_parameters(self) -> int:
        """Those of the nn.Linear that it stands for."""
        return self.rows * self.width + (0 if self.bias is None else self.rows)

    def extra_repr(self) -> str:
        return f"in_features={self.width}, out_features={self.rows}, bias={self.bias is not None}, bits={self.bits}"


def check_dense(model: "Decoder", what: str) -> None:
    """Raises TritiumError for a quantised model, which `what` is not for."""
    if model.quantisation is not None:
        raise TritiumError(f"{what}: not for a quantised model; load it without quantise={model.quantisation!r}")


def check_scheme(scheme: str | None) -> None:
    """Raises TritiumError for what is neither None nor a scheme."""
    if scheme is not None and scheme not in SCHEMES:
        raise TritiumError(f"quantise: unknown {str(scheme)!r}; {nearest(str(scheme), SCHEMES)}")


class Quantiser:
    """Puts modules for quantised weights into a model on the meta device, and fills them one weight at a time.

    A weight is there in the model's dtype only while it is being filled, so that the most memory taken is little more
    than what stays. `pieces` are those of a checkpoint that will be given.
    """

    def __init__(self, model: "Decoder", scheme: str, pieces: Iterable[Piece] = ()) -> None:
        check_scheme(scheme)
        if any(model.config.expert_layers):
            raise TritiumError("quantise: a mixture of experts cannot be quantised; load it without quantise")
        self.model = model
        self.modules: dict[str, QuantisedLinear] = {}  # by the name of the weight
        self._names = [name for name, _ in model.named_parameters()]
        self._missing = Counter(piece.parameter for piece in pieces)
        self._waiting: dict[str, Tensor] = {}
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            bits = HEAD_BITS if linear is model.head else SCHEMES[scheme]
            rows, width = linear.weight.shape
            module = QuantisedLinear(rows, width, linear.bias is not None, bits, linear.weight.dtype)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module)
            self.modules[f"{name}.weight"] = module
        if model.head is None:  # tied: a copy of the embedding, which stays as it is
            rows, width = model.embedding.weight.shape
            model.head = QuantisedLinear(rows, width, False, HEAD_BITS, model.dtype)
        model.quantisation = scheme
        model.requires_grad_(False)

    def fill(self, piece: Piece, tensor: Tensor) -> None:
        """Puts a checkpoint's tensor into the weight that it is a piece of; the last one quantises that weight.

        Raises TritiumError for a weight with NaN or infinity in it.
        """
        name = piece.parameter
        if name not in self._waiting:
            self._waiting[name] = self._dense(name)
        piece.fill(self._waiting[name], tensor)
        self._missing[name] -= 1
        if not self._missing[name]:
            self._store(name, self.modules[name], self._waiting.pop(name))

    def finish(self) -> None:
        """Quantises the head that is tied to the embedding, once that is there."""
        if self.model.config.tie_embeddings:
            assert isinstance(self.model.head, QuantisedLinear)
            self._store("embedding.weight", self.model.head, self.model.embedding.weight)

    def initialise(self, std: float = 0.02, seed: int = 0) -> None:
        """The weights that `Decoder.initialise` draws, quantised."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        others = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name in self._names:
            weight = self._dense(name) if name in self.modules else others[name]
            draw(name, weight, std, generator)
            if name in self.modules:
                self._store(name, self.modules[name], weight)
        self.finish()

    def _dense(self, name: str) -> Tensor:
        module = self.modules[name]
        return torch.empty(module.rows, module.width, dtype=module.like.dtype, device=module.like.device)

    def _store(self, name: str, module: QuantisedLinear, weight: Tensor) -> None:
        try:
            module.store(weight)
        except ValueError:
            raise TritiumError(f"quantise: {name} has NaN or infinity in it and cannot be quantised") from None


def draw(name: str, parameter: Tensor, std: float, generator: torch.Generator) -> None:
    """Redraws a parameter of this name: a matrix from a normal distribution, a norm as one, a bias as zero."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, std, generator=generator)
    else:
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
