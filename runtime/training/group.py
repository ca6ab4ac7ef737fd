"""A process of several: what those of a mesh `data` x `shard` x `tensor` exchange in a run.

Gradients of replicas are summed in one pass after a step's last micro-batch, bucket by bucket in the parameters' order,
and not while the backward runs, as DistributedDataParallel does: that sums in an order and in buckets which follow the
backward, wants its own wrapper around the model, and divides by the processes where a step here divides by its labels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..decoder import Decoder
from ..errors import TritiumError
from ..parallel.mesh import Mesh
from ..parallel.sharded import reduces, reshard, shard_model
from ..parallel.tensor import PARTIAL, Split, split_model, splits
from .config import TrainingConfig
from .optimizer import local
from .processes import Processes

T = TypeVar("T")
BUCKET = 2**24  # elements of gradients that are summed at once


@dataclass(frozen=True)
class Group(Processes):
    """One process of a mesh."""

    mesh: Mesh = field(kw_only=True)
    cuts: dict[str, Split] = field(default_factory=dict)  # parameters of which each `tensor` process has a piece
    cut: set[int] = field(default_factory=set)  # the same by identity
    partial: set[int] = field(default_factory=set)  # those whose gradients are summands, though they are whole

    @classmethod
    def of(cls, mesh: Mesh, config: TrainingConfig) -> "Group":
        """Raises TritiumError for a configuration that this mesh cannot run."""
        world = mesh.size("data") * mesh.size("shard")
        if config.data.accumulation % world:
            raise TritiumError(
                f"data: accumulation: the micro-batches of a step are shared out over {world} processes: give a "
                f"multiple of {world}, got {config.data.accumulation}"
            )
        if config.compile and (mesh.size("shard") > 1 or mesh.size("tensor") > 1):
            raise TritiumError("compile: is for whole replicas: leave it out, or parallel's shard and tensor")
        return cls(mesh.index("data") * mesh.size("shard") + mesh.index("shard"), world, mesh=mesh)

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0

    @property
    def count(self) -> int:
        return dist.get_world_size()

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    def together(self, work: Callable[[], T]) -> T:
        found: list[T] = []
        failure = None
        try:
            found.append(work())
        except (TritiumError, OSError) as error:
            failure = str(error)
        failures: list[str | None] = [None] * self.count
        dist.all_gather_object(failures, failure)
        for number, message in enumerate(failures):
            if message is not None:
                raise TritiumError(message if number == 0 else f"process {number}: {message}")
        return found[0]

    def first(self, work: Callable[[], None]) -> None:
        dist.barrier()
        self.together(work if self.is_first else lambda: None)

    def any(self, flag: bool) -> bool:
        holder = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(holder)
        return bool(holder)

    def total(self, value: Tensor) -> Tensor:
        value = value.clone()
        for axis in ("data", "shard"):
            self._sum([value], axis)
        return value

    def spread(self, model: Decoder, compute_dtype: torch.dtype) -> None:
        if self.mesh.size("tensor") > 1:
            self.cuts.update(splits(model.config))
            split_model(model, self.mesh.index("tensor"), self.mesh.size("tensor"), self.mesh.group("tensor"))
        if self.mesh.size("shard") > 1:
            shard_model(model, self.mesh.devices["shard"], compute_dtype)
        for name, parameter in model.named_parameters():
            if name in self.cuts:
                self.cut.add(id(parameter))
            elif name.endswith(PARTIAL):
                self.partial.add(id(parameter))

    def expect(self, model: Decoder, last: bool) -> None:
        if self.mesh.size("shard") > 1:
            reduces(model, last)

    def release(self, model: Decoder) -> None:
        if self.mesh.size("shard") > 1:
            reshard(model)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        self._sum(_gradients(parameter for parameter in parameters if id(parameter) in self.partial), "tensor")
        self._sum(_gradients(parameters), "data")  # over `shard` the backward has summed them

    def _sum(self, tensors: Sequence[Tensor], axis: str) -> None:
        """Makes each the sum over an axis of the mesh, in place."""
        if self.mesh.size(axis) == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat, group=self.mesh.group(axis))
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    @torch.no_grad()
    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        squares = torch.stack(torch._foreach_norm(_gradients(parameters))).double().square()
        is_cut = torch.tensor([id(parameter) in self.cut for parameter in parameters], device=squares.device)
        cut, uncut = squares[is_cut].sum(), squares[~is_cut].sum()
        self._sum([cut], "tensor")
        total = cut + uncut
        self._sum([total], "shard")
        return total.sqrt().float()

    @torch.no_grad()
    def whole(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() == 0:  # the optimizer's count of steps
            return tensor
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if name in self.cuts:
            tensor = self.cuts[name].whole(tensor, self.mesh.devices["tensor"])
        return tensor.cpu() if self.is_first else tensor.new_empty(0)  # not all of a model at once on every device

    def whole_model(self, model: Decoder) -> Decoder:
        if self.mesh.size("shard") == self.mesh.size("tensor") == 1:
            return model
        parameters = {name: self.whole(name, parameter.detach()) for name, parameter in model.named_parameters()}
        if not self.is_first:
            return model
        with torch.device("meta"):
            whole = Decoder(model.config)
        whole.load_state_dict(parameters, assign=True)
        return whole

    def whole_shape(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        return self.cuts[name].shape(parameter) if name in self.cuts else tuple(parameter.shape)

    def part(self, name: str, whole: Tensor, parameter: Tensor) -> Tensor:
        if whole.dim() == 0:
            return whole
        if name in self.cuts:
            whole = self.cuts[name].take(whole, self.mesh.index("tensor"), self.mesh.size("tensor"))
        if self.mesh.size("shard") == 1:
            return whole
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        return distribute_tensor(whole.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that have about BUCKET elements together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(entry.numel() for entry in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
