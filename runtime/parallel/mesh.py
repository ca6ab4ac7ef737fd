"""The processes that torchrun started, as a mesh: `data` x `shard` x `tensor`, neighbours sharing layers."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import TritiumError

AXES = ("data", "shard", "tensor")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class Mesh:
    """All processes of a run, and this one's place among them."""

    devices: Any  # a torch.distributed DeviceMesh with the dimensions AXES
    device: torch.device  # this process's

    def size(self, axis: str) -> int:
        return int(self.devices[axis].size())

    def index(self, axis: str) -> int:
        return int(self.devices[axis].get_local_rank())

    def group(self, axis: str) -> Any:
        return self.devices.get_group(axis)


def launched() -> int:
    """How many processes torchrun started with this one; 0 where it did not."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 0


def shape_of(sizes: Mapping[str, int | None]) -> tuple[int, ...]:
    """The mesh's shape for the processes that there are: `data` takes those that the others leave, where it is None.

    Raises TritiumError where they do not fit.
    """
    world, named = max(launched(), 1), {axis: sizes.get(axis) for axis in AXES}
    shard, tensor = named["shard"] or 1, named["tensor"] or 1
    data = named["data"] or max(world // (shard * tensor), 1)
    if data * shard * tensor != world:
        wanted = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, (data, shard, tensor), strict=True))
        raise TritiumError(
            f"parallel: {wanted} takes {data * shard * tensor} processes, and there {'is' if world == 1 else 'are'} "
            f"{world}: start that many with torchrun --nproc-per-node {data * shard * tensor}"
        )
    return data, shard, tensor


@contextmanager
def started(sizes: Mapping[str, int | None], device: str | None) -> Iterator[Mesh | None]:
    """The mesh of these sizes inside the block; None for one process that torchrun did not start.

    `device` is `cpu` (over gloo), or `cuda` (over nccl), each process on the GPU of its number; None takes GPUs where
    there are some. Where the processes have met already (a default process group is there), they stay together
    afterwards. Raises TritiumError where the processes or their GPUs do not fit.
    """
    shape = shape_of(sizes)
    if not launched():
        yield None
        return
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise TritiumError(f"device: {device!r} with several processes: give cpu, or cuda for the GPU of its own each")
    own = torch.device("cpu")
    if kind == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise TritiumError(
                f"device: {local + 1} processes here need as many GPUs; torch sees {torch.cuda.device_count()}"
            )
        own = torch.device("cuda", local)
        torch.cuda.set_device(own)
    from torch.distributed.device_mesh import init_device_mesh

    met = dist.is_initialized()
    if not met:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=own if kind == "cuda" else None)
    yield Mesh(init_device_mesh(kind, shape, mesh_dim_names=AXES), own)
    if not met:  # and not where the block raised: the others may never come, and torchrun ends them with this process
        dist.destroy_process_group()
