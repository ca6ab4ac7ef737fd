"""Which kernel set runs: the choice between the PyTorch path and the Triton path, and what stands in the way."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels.decode_attention import WIDEST_GROUP, WIDEST_HEAD
from ..kernels.launch import DTYPES, INTERPRETED, obstacle
from ..kernels.routing import MOST_EXPERTS
from .errors import TritiumError, nearest
from .fused import fuse
from .kernel_set import REFERENCE, KernelSet
from .operations import DIFFERENTIABLE, KERNELS
from .spec import ModelSpec
from .triton_path import Modes, compose

NAMES = ("auto", "triton", "torch")


@functools.cache
def triton_kernels(modes: Modes) -> KernelSet:
    """The phases over the Triton kernels, and those of a decode step.

    As the trainer, a token decoded goes through the kernels of a prefill: there is no other set for it.
    """
    plain = compose("triton", KERNELS, modes)
    return plain if modes.sampler_equals_trainer else replace(plain, decode=fuse(plain, KERNELS))


@functools.cache
def differentiable_kernels(modes: Modes) -> KernelSet:
    """The same over the operations that torch.library has of them, with their gradients."""
    return compose("triton", DIFFERENTIABLE, modes)


@dataclass(frozen=True)
class Backend:
    """What was asked for: `torch`, `triton`, or `auto`: Triton on a GPU that it drives, and torch elsewhere."""

    name: str = "auto"
    modes: Modes = field(default_factory=Modes)
    traced: KernelSet = field(init=False, repr=False, compare=False)  # what torch.compile finds without a look-up

    def __post_init__(self) -> None:
        """Raises TritiumError for an unknown name, and for `triton` where nothing here could run it."""
        if self.name not in NAMES:
            raise TritiumError(f"backend: unknown {self.name!r}; {nearest(str(self.name), NAMES)}")
        object.__setattr__(self, "traced", differentiable_kernels(self.modes))
        if self.name != "triton" and self.modes.sampler_equals_trainer:
            raise TritiumError(f"sampler_equals_trainer: backend {self.name!r} cannot promise it; use 'triton'")
        if self.name == "triton" and (why := obstacle(torch.device("cpu" if INTERPRETED else "cuda"))) is not None:
            raise _cannot(why)

    def kernels(self, like: Tensor, parameters: Iterable[Tensor] = ()) -> KernelSet:
        """The set for tensors such as `like`. Raises TritiumError where `triton` was asked for and cannot run them.

        Where a gradient is wanted, of `like` or of the parameters, the kernels are those that have one. Traced by
        torch.compile, they are those that can be traced; each then finds out at run time where it runs.
        """
        if self.name == "torch":
            return REFERENCE
        if torch.compiler.is_compiling():
            return self.traced
        why = _obstacle(like.device, like.dtype)
        if why is None and not (self.name == "auto" and like.device.type == "cpu"):
            wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (like, *parameters))
            return (differentiable_kernels if wanted else triton_kernels)(self.modes)
        if self.name == "triton":
            raise _cannot(why or "")
        return REFERENCE


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(map(str, DTYPES))}, not {dtype}"
    return obstacle(device, dtype)


def shape_obstacle(spec: ModelSpec) -> str | None:
    """What of a model's shape the kernels do not hold, in words; None where they do."""
    if spec.head_dim > WIDEST_HEAD:
        return f"its heads are {spec.head_dim} wide, and the kernels hold {WIDEST_HEAD}"
    if spec.num_heads > WIDEST_GROUP * spec.num_kv_heads:
        group = spec.num_heads // spec.num_kv_heads
        return f"{group} query heads share a key/value head, and the kernels hold {WIDEST_GROUP}"
    if spec.num_experts > MOST_EXPERTS:
        return f"it has {spec.num_experts} experts, and the kernels hold {MOST_EXPERTS}"
    return None


def _cannot(why: str) -> TritiumError:
    return TritiumError(f"backend 'triton' cannot run here: {why}; use backend 'torch' or 'auto'")
