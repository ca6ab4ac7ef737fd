"""The plain functions of `tritium.kernels`: each gives what its definition gives, with gradients where it says so, and
is whole under torch.compile."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
import tritium.kernels as kernels
from torch import Tensor
from tritium.kernels import functional
from tritium.runtime.operations import DEFINITIONS

HEADS, KV_HEADS, DIM = 4, 2, 16
NO_GRADIENT = (
    *("qk_norm_rope_cache", "paged_attention", "decode_attention", "rope_decode_attention", "sample", "norm_head"),
    *("group", "quantised_linear", "norm_linear", "norm_linear_swiglu", "decode_linear_residual"),
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@dataclass
class Call:
    """A call of a public function, and the definition's arguments for the same."""

    arguments: tuple[Any, ...]
    named: dict[str, Any] = field(default_factory=dict)
    definition: tuple[Any, ...] | None = None  # where they differ from `arguments`


def rotation() -> tuple[Tensor, Tensor]:
    angles = draw(8, DIM // 2).abs()
    return torch.stack((angles.cos(), angles.sin()), 1), ints(0, 3, 7, 1, 2, dtype=torch.int64)


def cached() -> tuple[Tensor, Tensor, Tensor]:
    """Two caches of three pages of 256 tokens, and the table of two rows."""
    return draw(KV_HEADS, 3, 256, DIM), draw(KV_HEADS, 3, 256, DIM, seed=1), torch.tensor([[2, 0], [1, 1]]).int()


def calls() -> dict[str, Call]:
    table, positions = rotation()
    k_cache, v_cache, pages = cached()
    qkv, weight = draw(5, (HEADS + 2 * KV_HEADS) * DIM), draw(HEADS + KV_HEADS, DIM)
    rope = (table, positions, torch.float32, True, weight, 1e-6, True, None)
    named = {"weight": weight}
    slots, lengths = ints(2, 267, dtype=torch.int64), ints(259, 12)
    two = (qkv[:2], HEADS, KV_HEADS, table, positions[:2])
    rope_two = (*two, torch.float32, True, weight, 1e-6, True, None)
    scale = DIM**-0.5
    starts = ints(0, 3, 5)
    dense = (draw(2, 3, HEADS, DIM), draw(2, KV_HEADS, 6, DIM), draw(2, KV_HEADS, 6, DIM, seed=1))
    q, k, v = draw(5, HEADS, DIM), draw(5, KV_HEADS, DIM), draw(5, KV_HEADS, DIM, seed=3)
    labels = ints(3, -100, 0, 6, 1, dtype=torch.int64)
    experts = ints(2, 0, 1, 2, 0, 1, 2, 1, 0, 1).view(5, 2)
    order, bounds = DEFINITIONS.group(experts, 3)
    from tritium.kernels.quantised_linear import quantise

    values, scales = quantise(draw(24, 64), 8)
    x, norm, logits = draw(5, 32), draw(32), draw(5, 7)
    return {
        "rms_norm": Call((draw(2, 3, 32), norm, 1e-6)),
        "add_rms_norm": Call((draw(3, 32), draw(3, 32, seed=1), norm, 1e-6)),
        "layer_norm": Call((draw(3, 32), norm, draw(32, seed=1), 1e-5)),
        "linear": Call((x, draw(24, 32), draw(24))),
        "linear_residual": Call((x, draw(24, 32), None, draw(5, 24))),
        "linear_swiglu": Call((x, draw(24, 32), draw(24))),
        "quantised_linear": Call((draw(5, 64), values, scales)),
        "swiglu": Call((draw(3, 48),)),
        "silu_mul": Call((draw(3, 24), draw(3, 24, seed=1))),
        "qk_norm_rope": Call((qkv, HEADS, KV_HEADS, table, positions), named, (qkv, HEADS, KV_HEADS, *rope)),
        "qk_norm_rope_cache": Call(
            (*two, k_cache, v_cache, slots), named, (*rope_two, k_cache.clone(), v_cache.clone(), slots)
        ),
        "attention": Call((q, k, v, starts), {"window": 2}, (q, k, v, starts, scale, 2)),
        "paged_attention": Call(
            (q, k_cache, v_cache, pages, starts, lengths), {}, (q, k_cache, v_cache, pages, starts, lengths, scale)
        ),
        "dense_attention": Call((*dense, ints(0, 2), ints(6, 4)), {}, (*dense, ints(0, 2), ints(6, 4), scale)),
        "decode_attention": Call(
            (q[:2], k_cache, v_cache, pages, lengths), {}, (q[:2], k_cache, v_cache, pages, lengths, scale)
        ),
        "rope_decode_attention": Call(
            (*two, k_cache, v_cache, slots, pages, lengths),
            named,
            (*rope_two, k_cache.clone(), v_cache.clone(), slots, pages, lengths, scale),
        ),
        "cross_entropy": Call((logits, labels), {"z_loss": 0.1}, (logits, labels, -100, 0.0, 0.1)),
        "linear_cross_entropy": Call((x, draw(7, 32), labels)),
        "route": Call((draw(5, 8), 2)),
        "group": Call((experts, 3)),
        "grouped_linear": Call((draw(10, 32), draw(3, 24, 32), order, bounds, 1)),
        "grouped_swiglu": Call((x, draw(3, 24, 32), order, bounds, 2)),
        "combine": Call((draw(10, 32), draw(5, 2), x)),
        "sample": Call((draw(5, 40), 0.7, 10, 0.9, torch.rand(5, generator=torch.Generator().manual_seed(1)))),
        "norm_linear": Call((x, norm, 1e-6, draw(24, 32))),
        "norm_linear_swiglu": Call((x, norm, 1e-6, draw(24, 32))),
        "decode_linear_residual": Call((x, draw(24, 32), None, draw(5, 24))),
        "norm_head": Call((x, norm, 1e-6, draw(24, 32)), {"limit": 20}, (x, norm, 1e-6, draw(24, 32), None, 20)),
    }


DEFAULTS = {"route": (True,)}  # what the definitions demand and the functions have defaults for
NAMES = sorted(kernels.__all__)


def definition(name: str) -> Callable[..., Any]:
    apart = {"add_rms_norm": "rms_norm", "dense_attention": "dense_attention", "silu_mul": "swiglu"}
    if name in apart:  # not an operation of the decoder's
        found: Callable[..., Any] = getattr(import_module(f"tritium.kernels.{apart[name]}"), f"{name}_reference")
        return found
    found = getattr(DEFINITIONS, name)
    return found


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def close(mine: Any, theirs: Any) -> None:
    for a, b in zip(tensors(mine), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.fixture(params=["kernels", "definitions"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "definitions":
        monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")
    return str(request.param)


def test_every_function_has_a_case() -> None:
    assert sorted(calls()) == NAMES


def test_every_function_is_in_the_file_and_documented() -> None:
    found = {n for n, value in vars(functional).items() if inspect.isfunction(value) and not n.startswith("_")}
    assert {name for name in found if vars(functional)[name].__module__ == functional.__name__} == set(NAMES)
    for name in NAMES:
        assert getattr(kernels, name) is getattr(functional, name)
        assert "[" in (inspect.getdoc(getattr(kernels, name)) or "")  # shapes
        annotations = inspect.signature(getattr(kernels, name)).parameters.values()
        assert all(parameter.annotation is not inspect.Parameter.empty for parameter in annotations)


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_what_the_definition_gives(name: str, form: str) -> None:
    call = calls()[name]
    arguments = call.arguments if call.definition is None else call.definition
    expected = definition(name)(*arguments, *DEFAULTS.get(name, ()))
    close(getattr(kernels, name)(*call.arguments, **call.named), expected)
    if call.definition is not None and "cache" in name:  # what was written
        for mine, theirs in zip(call.arguments[5:7], call.definition[11:13], strict=True):
            close(mine, theirs)


def leaves(call: Call) -> list[Tensor]:
    return [value for value in call.arguments if isinstance(value, Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_GRADIENT])
def test_its_gradients_are_the_definitions(name: str) -> None:
    found = []
    for function in (getattr(kernels, name), definition(name)):
        call = calls()[name]
        wanted = [leaf.requires_grad_() for leaf in leaves(call) if leaf.shape != (8, 2, DIM // 2)]  # not the table
        if function is getattr(kernels, name):
            result = function(*call.arguments, **call.named)
        else:
            arguments = call.arguments if call.definition is None else call.definition
            result = function(*arguments, *DEFAULTS.get(name, ()))
        parts = [part for part in tensors(result) if part.requires_grad]
        weights = [draw(*part.shape, seed=5) for part in parts]
        total = sum(((part * weight).sum() for part, weight in zip(parts, weights, strict=True)), torch.zeros(()))
        found.append(torch.autograd.grad(total, wanted))
    close(*found)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole_under_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")
    function = getattr(kernels, name)
    call = calls()[name]
    expected = function(*call.arguments, **call.named)
    again = calls()[name]
    torch._dynamo.reset()  # each case is a first call of the same line
    compiled = torch.compile(lambda *a, **n: function(*a, **n), fullgraph=True, backend="aot_eager")
    close(compiled(*again.arguments, **again.named), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name in NO_GRADIENT and "cache" in name])
def test_what_writes_refuses_a_gradient(name: str) -> None:
    call = calls()[name]
    call.arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient"):
        getattr(kernels, name)(*call.arguments, **call.named)
