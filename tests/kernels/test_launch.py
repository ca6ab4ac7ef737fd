"""What all launchers share: where they refuse, and the registered operations' devices and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch as launching
from tritium.runtime.operations import DEFINITIONS, KERNELS

from ..rule import DEVICE, draw

F32 = torch.float32


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, dtype=F32, seed=seed).requires_grad_()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "rms_norm": lambda: (leaf(3, 16), leaf(16, seed=1), 1e-6),
    "layer_norm": lambda: (leaf(3, 16), leaf(16, seed=1), leaf(16, seed=2), 1e-6),
    "linear": lambda: (leaf(3, 16), leaf(8, 16, seed=1), None),
    "linear_residual": lambda: (leaf(3, 16), leaf(8, 16, seed=1), leaf(8, seed=2), leaf(3, 8, seed=3)),
    "linear_swiglu": lambda: (leaf(3, 16), leaf(8, 16, seed=1), None),
    "swiglu": lambda: (leaf(3, 16),),
    "attention": lambda: (leaf(5, 4, 16), leaf(5, 2, 16, seed=1), leaf(5, 2, 16, seed=2), ints(0, 2, 5), 0.3),
    "qk_norm_rope": lambda: (
        *(leaf(3, 4 * 16), 2, 1, draw(8, 2, 8, dtype=F32, seed=1), torch.arange(3, device=DEVICE)),
        *(F32, True, leaf(3, 16, seed=2), 1e-6, True),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_definitions(name: str) -> None:
    """Through torch.ops: the same loss, differentiated through the definition by autograd itself."""
    results = []
    for function in (getattr(torch.ops.tritium, name), getattr(DEFINITIONS, name)):
        args = CASES[name]()
        out = function(*args)
        parts = out[:2] if isinstance(out, tuple) else (out,)  # the registered qk_norm_rope leaves out v, a view
        sum((part * draw(*part.shape, dtype=F32, seed=9)).sum() for part in parts).backward()
        results.append([value.grad for value in args if isinstance(value, Tensor) and value.requires_grad])
    assert len(results[0]) > 0
    for mine, expected in zip(*results, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_asked_for_twice_is_the_same() -> None:
    """Nothing that was saved is overwritten."""
    x, weight = leaf(3, 16), leaf(16, seed=1)
    out = torch.ops.tritium.rms_norm(x, weight, 1e-6)
    upstream = draw(3, 16, dtype=F32, seed=5)
    first = torch.autograd.grad(out, (x, weight), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (x, weight), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_output_that_depends_on_nothing_has_no_gradient() -> None:
    q, k = leaf(0, 2, 16), leaf(0, 1, 16)
    torch.ops.tritium.attention(q, k, k, ints(0), 0.3).sum().backward()
    assert q.grad is None or not q.grad.numel()


@pytest.mark.parametrize("name", CASES)
def test_a_launcher_loses_no_gradient(name: str) -> None:
    with pytest.raises(RuntimeError, match="a launcher computes no gradients"):
        getattr(KERNELS, name)(*CASES[name]())
    with torch.no_grad():
        getattr(KERNELS, name)(*CASES[name]())


@pytest.mark.parametrize("name", CASES)
def test_without_a_gpu_the_operation_is_its_definition(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On a CPU torch.ops computes, and the launcher says in a line why it cannot."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    with torch.no_grad():
        args = [value.cpu() if isinstance(value, Tensor) else value for value in CASES[name]()]
        got, expected = getattr(torch.ops.tritium, name)(*args), getattr(DEFINITIONS, name)(*args)
        pairs = zip(got, expected, strict=False) if isinstance(got, tuple) else [(got, expected)]
        assert all(torch.equal(a, b) for a, b in pairs)
        with pytest.raises(RuntimeError, match=r"cannot run here: .*GPU.*; the definition"):
            getattr(KERNELS, name)(*args)


def test_tensors_apart_are_refused() -> None:
    if DEVICE == "cuda":
        with pytest.raises(ValueError, match="they must be on one device"):
            KERNELS.rms_norm(torch.zeros(1, 16, device=DEVICE), torch.ones(16), 1e-6)
    with pytest.raises(ValueError, match="meta: they must be on one device"):
        KERNELS.rms_norm(torch.zeros(1, 16, device=DEVICE), torch.ones(16, device="meta"), 1e-6)


def test_contraction_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default differs between versions of Triton."""
    seen = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: seen.update(options)

    launching.launch(Kernel(), (1,), torch.zeros(1), num_warps=4)
    assert seen == {"num_warps": 4, "enable_fp_fusion": True}
