"""The grouped kernels within a layer: which tile is whose, tokens that go to no expert, what a launch costs."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tritium.kernels.combine import combine
from tritium.kernels.grouped_linear import grouped_linear, grouped_swiglu
from tritium.kernels.launch import tl, triton
from tritium.kernels.routing import group

from ..rule import DEVICE, draw, same_bits
from .test_grouped_linear_kernel import drawn, grouped, route

module = import_module("tritium.kernels.grouped_linear")  # the package has the function of this name

pytestmark = pytest.mark.usefixtures("poisoned")


@triton.jit  # type: ignore[untyped-decorator]
def _find_kernel(
    found_ptr: Any,
    starts_ptr: Any,
    tile: Any,
    num_experts: Any,
    BLOCK_E: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
) -> None:
    expert, begin = module._find(starts_ptr, tile, num_experts, BLOCK_E, BLOCK_M)
    tl.store(found_ptr, expert)
    tl.store(found_ptr + 1, begin)


@pytest.mark.parametrize("block_m", [16, 128])
@pytest.mark.parametrize("count", [1000, 1024])
def test_tiles_of_many_experts(count: int, block_m: int) -> None:
    """As many experts as there may be, whose tiles lack as many rows as they can, or none."""
    counts = torch.tensor([(0, 1, 127, 128, 129, 1, 1)[e % 7] if e < 60 else 1 for e in range(count)])
    starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    tiles = [(e, int(starts[e]) + m) for e in range(count) for m in range(0, int(counts[e]), block_m)]
    found = torch.empty(2, dtype=torch.int32, device=DEVICE)
    for tile in (*range(12), *range(12, len(tiles), 89), len(tiles) - 1):
        _find_kernel[(1,)](found, starts.to(DEVICE), tile, count, 1024, block_m)
        assert tuple(found.tolist()) == tiles[tile]
    _find_kernel[(1,)](found, starts.to(DEVICE), len(tiles), count, 1024, block_m)
    assert found[0] >= count


@pytest.mark.parametrize("none", [-1, 5])
def test_padding_that_goes_to_no_expert(none: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured batch: the real tokens have the bits that they have alone. Memory that held zeros: an index that
    nobody wrote would be of the first token."""
    monkeypatch.setattr(torch, "empty", torch.zeros)
    x, up = drawn("swiglu", 12, 5, 24, 40, torch.float32)
    down, weights = draw(5, 40, 24, dtype=torch.float32, seed=2), draw(12, 2, dtype=torch.float32, seed=3)

    def layer(tokens: Any, experts: Tensor) -> Tensor:
        order, starts = group(experts.int(), 5)
        hidden = grouped_swiglu(x[tokens], up, order, starts, 2)
        return combine(grouped_linear(hidden, down, order, starts, 1), weights[tokens], x[tokens])

    experts, real = 4 - route(12, 5, 2), torch.arange(12, device=DEVICE) % 3 < 2
    expected = layer(real, experts[real])
    assert not expected.isnan().any()
    assert same_bits(layer(slice(None), experts.where(real[:, None], none))[real], expected)
    assert layer(slice(1), torch.full((1, 2), none, device=DEVICE)).shape == (1, 40)


class Recorded(TorchDispatchMode):
    """The operations that torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_launch_does_nothing_beside_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """No view, no copy: at a decoding step, each takes as long as the launch itself."""
    monkeypatch.setattr(module, "launch", lambda *args, **options: None)
    args = *drawn("plain", 3, 5, 16, 16, torch.float16), *grouped(route(3, 5, 2), 5)
    with Recorded() as recorded:
        grouped_linear(*args)
    assert recorded.names == ["aten.new_empty.default"]
