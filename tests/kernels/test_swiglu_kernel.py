"""The SwiGLU kernel and its gradient's: the rule, roundings, batch invariance, views, extremes, what they refuse."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import launch
from tritium.kernels.swiglu import (
    silu_mul,
    silu_mul_backward,
    silu_mul_backward_reference,
    silu_mul_reference,
    swiglu,
    swiglu_backward,
    swiglu_backward_reference,
    swiglu_reference,
)

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
WIDTHS = [1, 8, 56, 80, 128, 511, 513, 1025]
FULL = [(rows, width) for rows in (1, 17, 65, 4096) for width in (64, 768, 2047, 2048, 3072, 9728, 28672)]


def check(rows: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> None:
    gate_up = draw(rows, 2 * width, dtype=dtype, scale=scale)
    expected, truth = swiglu_reference(gate_up), truth_of(swiglu_reference, gate_up)
    assert_rule(swiglu(gate_up), expected, truth, f"{rows}x{width}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rule(width: int, dtype: torch.dtype) -> None:
    check(5, width, dtype)
    check(1, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_for_many_rows(dtype: torch.dtype) -> None:
    """Above 64 rows another configuration runs."""
    check(65, 80, dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), FULL)
def test_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    check(rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 80.0])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(3, 96, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_saturate_without_overflow(dtype: torch.dtype) -> None:
    """exp(10000) is infinite: silu must still be 0 far below zero and the identity far above."""
    gate = torch.tensor([-10000.0, -200.0, 0.0, 200.0, 10000.0]).to(dtype).to(DEVICE)
    y = swiglu(torch.cat((gate, torch.ones_like(gate))))
    assert y.tolist() == [0.0, 0.0, 0.0, 200.0, gate[-1].item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_rounds_and_the_product_rounds_again(dtype: torch.dtype) -> None:
    """Bit for bit the definition's order where float32 noise cannot decide; one rounding would differ."""
    gate_up = draw(16, 256, dtype=dtype, scale=3.0)
    gate, up = gate_up.chunk(2, -1)
    exact = torch.nn.functional.silu(gate.double())
    certain = (exact * (1 - 2e-6)).to(dtype) == (exact * (1 + 2e-6)).to(dtype)
    assert certain.float().mean() > 0.97
    assert torch.equal(swiglu(gate_up)[certain], (exact.to(dtype) * up)[certain])
    assert ((exact * up.double()).to(dtype) != exact.to(dtype) * up).float().mean() > 0.1


def test_the_gate_comes_first() -> None:
    y = swiglu(torch.tensor([[1.0, 2.0], [2.0, 1.0]], device=DEVICE))
    assert y.flatten().tolist() == pytest.approx([2 / (1 + 2.718281828459045**-1), 2 / (1 + 2.718281828459045**-2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [56, 576])
def test_batch_invariance(width: int, dtype: torch.dtype) -> None:
    """A row's bits: alone, among 1 to 17, in the configuration of many rows, at another place, beside NaN."""
    gate_up = draw(17, 2 * width, dtype=dtype)
    whole = swiglu(gate_up)
    for rows in range(1, 18):
        assert same_bits(swiglu(gate_up[:rows]), whole[:rows])
    many = torch.cat((gate_up, gate_up.new_zeros(48, 2 * width)))
    assert same_bits(swiglu(many)[:17], whole)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(swiglu(gate_up[order]), whole[order])
    poisoned = torch.full_like(gate_up, float("nan"))
    poisoned[8] = gate_up[8]
    assert same_bits(swiglu(poisoned)[8], whole[8])


def test_views_and_empty_input() -> None:
    """Strided rows, a transposed last dimension, more dimensions, one dimension, no rows, no columns."""
    storage = draw(6, 4, 160, dtype=torch.float32)
    for x in (storage[:, 1, :80], storage[::2, :, 40:120], storage[:, :, :80].transpose(0, 1), storage[0, 0]):
        y = swiglu(x)
        assert y.is_contiguous()
        assert y.shape == (*x.shape[:-1], x.shape[-1] // 2)
        assert same_bits(y, swiglu(x.contiguous()))
        assert_rule(y, swiglu_reference(x), truth_of(swiglu_reference, x))
    turned = draw(80, 6, dtype=torch.float32).t()
    assert same_bits(swiglu(turned), swiglu(turned.contiguous()))
    assert swiglu(storage[:0]).shape == (0, 4, 80)
    assert swiglu(storage[..., :0]).shape == (6, 4, 0)


def test_the_input_is_not_overwritten() -> None:
    gate_up = draw(3, 112, dtype=torch.bfloat16)
    before = gate_up.clone()
    swiglu(gate_up)
    assert same_bits(gate_up, before)


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks; neighbouring rows would hide a column too many, but for the last."""
    rooms = room_around_outputs(monkeypatch)
    for width in (57, 512, 513):
        assert swiglu(draw(3, 2 * width, dtype=torch.float32)).ne(7).all()
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    gate_up = torch.empty(2 * apart + 128, dtype=torch.float16, device=DEVICE).as_strided((3, 128), (apart, 1))
    gate_up.copy_(draw(3, 128, dtype=torch.float16))
    assert same_bits(swiglu(gate_up), swiglu(gate_up.contiguous()))


@needs_gpu
def test_no_race() -> None:
    gate_up = draw(300, 2 * 3072, dtype=torch.bfloat16)
    first = swiglu(gate_up)
    assert all(same_bits(swiglu(gate_up), first) for _ in range(200))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(TypeError, match="float64"):
        swiglu(draw(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"gate and up of equal width, got \[2, 63\]"):
        swiglu(draw(2, 63, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"got \[\]"):
        swiglu(torch.zeros((), device=DEVICE))


def test_registered() -> None:
    op, gate_up = torch.ops.tritium.swiglu, draw(3, 4, 64, dtype=torch.float32)
    torch.library.opcheck(op, (gate_up,))
    torch.library.opcheck(op, (gate_up.transpose(0, 1),))
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(gate_up)
    assert same_bits(compiled, op(gate_up))
    assert same_bits(op(gate_up), swiglu(gate_up))


# The gradient


def autograds(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Autograd's gradient of the definition in float64, of (rounded) inputs."""
    leaf = gate_up.double().requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu_reference(leaf), leaf, dy.double())
    return gradient


def check_backward(rows: int, width: int, dtype: torch.dtype, scale: float = 3.0) -> None:
    gate_up, dy = draw(rows, 2 * width, dtype=dtype, scale=scale), draw(rows, width, dtype=dtype, seed=1)
    got, expected, truth = swiglu_backward(dy, gate_up), swiglu_backward_reference(dy, gate_up), autograds(dy, gate_up)
    for part in (slice(None, width), slice(width, None)):  # a large gradient of one would hide a wrong one of the other
        assert_rule(got[:, part], expected[:, part], truth[:, part], f"{rows}x{width} {part}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_backward_rule(width: int, dtype: torch.dtype) -> None:
    check_backward(5, width, dtype)
    check_backward(1, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_rule_for_many_rows(dtype: torch.dtype) -> None:
    """Above 64 rows another configuration runs."""
    check_backward(65, 80, dtype)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), FULL)
def test_backward_rule_in_full(rows: int, width: int, dtype: torch.dtype) -> None:
    check_backward(rows, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 80.0])
def test_backward_of_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check_backward(3, 96, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_large_gates_saturates_without_overflow(dtype: torch.dtype) -> None:
    """silu's slope is 0 far below zero, 1 far above and 1/2 at zero; exp(10000) must not make NaN of 0 * inf."""
    gate = torch.tensor([-10000.0, -200.0, 0.0, 200.0, 10000.0]).to(dtype).to(DEVICE)
    gradient = swiglu_backward(torch.full_like(gate, 2.0), torch.cat((gate, torch.full_like(gate, 3.0))))
    assert gradient.tolist() == [0.0, 0.0, 3.0, 6.0, 6.0, 0.0, 0.0, 0.0, 400.0, 2 * gate[-1].item()]


def test_backward_views_and_empty_input() -> None:
    """Strided rows, transposed columns, more dimensions, one, expanded dy; no rows, no columns."""
    storage, dys = draw(6, 4, 160, dtype=torch.float32), draw(6, 4, 90, dtype=torch.float32, seed=1)
    expanded = dys[0, 0, 0].expand(6, 4, 80)
    for x, dy in (
        (storage[:, 1], dys[:, 2, :80]),
        (storage[::2], dys[1::2, :, 7:87]),
        (storage.transpose(0, 1), dys[..., :80].transpose(0, 1)),
        (storage[0, 0], dys[0, 0, :80]),
        (storage, expanded),
        (storage, dys[:, :1, :80].expand(6, 4, 80)),
        (storage[0], dys[0, :, :80].t().contiguous().t()),
        (storage[0].t().contiguous().t(), dys[0, :, ::2].repeat(1, 2)[:, :80]),
    ):
        gradient = swiglu_backward(dy, x)
        assert gradient.is_contiguous()
        assert gradient.shape == x.shape
        assert same_bits(gradient, swiglu_backward(dy.contiguous(), x.contiguous()))
        assert_rule(gradient, swiglu_backward_reference(dy, x), autograds(dy, x))
    assert swiglu_backward(dys[:0, :, :80], storage[:0]).shape == (0, 4, 160)
    assert swiglu_backward(dys[..., :0], storage[..., :0]).shape == (6, 4, 0)


def test_backward_depends_on_its_row_alone_and_repeats() -> None:
    """To the bit: alone, in the configuration of many rows, beside NaN, and again."""
    gate_up, dy = draw(70, 112, dtype=torch.bfloat16), draw(70, 56, dtype=torch.bfloat16, seed=1)
    whole = swiglu_backward(dy, gate_up)
    assert same_bits(swiglu_backward(dy, gate_up), whole)
    for rows in (slice(1), slice(3, 20)):
        assert same_bits(swiglu_backward(dy[rows], gate_up[rows]), whole[rows])
    beside, beside_dy = torch.full_like(gate_up, float("nan")), torch.full_like(dy, float("nan"))
    beside[8], beside_dy[8] = gate_up[8], dy[8]
    assert same_bits(swiglu_backward(beside_dy, beside)[8], whole[8])


def test_backward_overwrites_nothing_and_writes_nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was saved nor the gradient that came in, which others may still use; room around keeps its marks."""
    rooms = room_around_outputs(monkeypatch)
    for width in (57, 512, 513):
        gate_up, dy = draw(3, 2 * width, dtype=torch.float32), draw(3, width, dtype=torch.float32, seed=1)
        before = gate_up.clone(), dy.clone()
        assert swiglu_backward(dy, gate_up).ne(7).all()
        assert same_bits(gate_up, before[0])
        assert same_bits(dy, before[1])
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_backward_of_rows_beyond_int32_offsets() -> None:
    """A third row of gate_up and of dy more than 2^31 elements from the first."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 256, dtype=torch.float16, device=DEVICE)
    gate_up, dy = storage.as_strided((3, 128), (apart, 1)), storage.as_strided((3, 64), (apart, 1), 128)
    gate_up.copy_(draw(3, 128, dtype=torch.float16))
    dy.copy_(draw(3, 64, dtype=torch.float16, seed=1))
    assert same_bits(swiglu_backward(dy, gate_up), swiglu_backward(dy.contiguous(), gate_up.contiguous()))


@needs_gpu
def test_backward_has_no_race() -> None:
    gate_up, dy = draw(300, 2 * 3072, dtype=torch.bfloat16), draw(300, 3072, dtype=torch.bfloat16, seed=1)
    first = swiglu_backward(dy, gate_up)
    assert all(same_bits(swiglu_backward(dy, gate_up), first) for _ in range(200))


def test_backward_refuses_what_does_not_fit() -> None:
    gate_up, dy = draw(2, 64, dtype=torch.float32), draw(2, 32, dtype=torch.float32)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (dy, gate_up.double(), TypeError, "float64"),
        (dy, gate_up[:, :63], ValueError, r"gate and up of equal width, got \[2, 63\]"),
        (dy[:1], gate_up, ValueError, r"dy must be \[2, 32\] torch.float32, as swiglu's output, got \[1, 32\]"),
        (dy.half(), gate_up, ValueError, r"dy must be .* got \[2, 32\] torch.float16"),
        (dy.to("meta"), gate_up, ValueError, "they must be on one device"),
        (dy, gate_up.clone().requires_grad_(), RuntimeError, "computes no gradients"),
    ]
    for gradient, x, error, message in wrong:
        with pytest.raises(error, match=message):
            swiglu_backward(gradient, x)


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_backward_registered(definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through autograd, twice, with an expanded gradient, compiled as one graph; also where no kernel can run."""
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, backward = torch.ops.tritium.swiglu, torch.ops.tritium.swiglu_backward
    leaf, dy = draw(3, 4, 64, dtype=torch.float32).requires_grad_(), draw(3, 4, 32, dtype=torch.float32, seed=1)
    torch.library.opcheck(op, (leaf,))
    torch.library.opcheck(backward, (dy, leaf.detach()))
    torch.library.opcheck(backward, (dy.transpose(0, 1).requires_grad_(), leaf.transpose(0, 1)))
    ours = swiglu_backward_reference if definition else swiglu_backward
    expected, before = ours(dy, leaf.detach()), dy.clone()
    y = op(leaf)
    for _ in range(2):
        (gradient,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
        assert same_bits(gradient, expected)
    assert same_bits(dy, before)
    y.sum().backward()
    assert leaf.grad is not None
    assert same_bits(leaf.grad, ours(torch.ones_like(dy), leaf.detach()))
    assert torch.autograd.grad(op(leaf.detach()).sum() + leaf.sum(), leaf)[0].eq(1).all()  # its input needs none
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
    assert same_bits(torch.autograd.grad(compiled(leaf), leaf, dy)[0], expected)


def test_autograd_takes_the_gradients_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the definition's vector-Jacobian product, which would need the memory of its steps."""
    launched: list[str] = []
    run = launch.launch

    def recorded(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(import_module("tritium.kernels.swiglu"), "launch", recorded)
    leaf = draw(2, 8, dtype=torch.float32).requires_grad_()
    torch.ops.tritium.swiglu(leaf).sum().backward()
    assert launched == ["_swiglu_kernel", "_swiglu_backward_kernel"]


def test_the_gradient_can_be_differentiated() -> None:
    """Through the gradient's definition, against float64."""
    x, dy = draw(2, 8, dtype=torch.float32), draw(2, 4, dtype=torch.float32, seed=1)
    found = []
    for function, dtype in ((torch.ops.tritium.swiglu, torch.float32), (swiglu_reference, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, dy.to(dtype), create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 56), (65, 513)])
def test_apart_is_the_packed_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit, gradients too, from contiguous and from strided projections."""
    gate_up, dy = draw(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=3.0), draw(*shape, dtype=dtype, seed=1)
    packed, gradient = swiglu(gate_up), swiglu_backward(dy, gate_up)
    gate, up = gate_up.chunk(2, -1)
    for pair in ((gate, up), (gate.contiguous(), up), (gate.contiguous(), up.contiguous())):
        assert same_bits(silu_mul(*pair), packed)
        found = silu_mul_backward(dy, *pair)
        assert all(x.is_contiguous() for x in found)
        assert same_bits(torch.cat(found, -1), gradient)
    assert same_bits(silu_mul_reference(gate, up), swiglu_reference(gate_up))
    expected = swiglu_backward_reference(dy, gate_up)
    assert same_bits(torch.cat(silu_mul_backward_reference(dy, gate, up), -1), expected)


@pytest.mark.parametrize("definition", [False, True], ids=["kernel", "definition"])
def test_apart_registered(definition: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if definition:
        monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    op, backward = torch.ops.tritium.silu_mul, torch.ops.tritium.silu_mul_backward
    gate = draw(3, 4, 32, dtype=torch.float32).requires_grad_()
    up, dy = draw(3, 4, 32, dtype=torch.float32, seed=1).requires_grad_(), draw(3, 4, 32, dtype=torch.float32, seed=2)
    torch.library.opcheck(op, (gate, up))
    torch.library.opcheck(backward, (dy, gate.detach(), up.detach()))
    torch.library.opcheck(op, (gate.detach()[0, :, :0], up.detach()[0, :, :0]))
    expected = backward(dy, gate.detach(), up.detach())
    compiled = torch.compile(lambda *pair: op(*pair), fullgraph=True, backend="aot_eager")
    for function in (op, compiled):
        assert all(map(same_bits, torch.autograd.grad(function(gate, up), (gate, up), dy), expected))
    (alone,) = torch.autograd.grad(op(gate.detach(), up), up, dy)
    assert same_bits(alone, expected[1])


def test_apart_refuses_what_does_not_fit() -> None:
    gate, up = draw(2, 32, dtype=torch.float32), draw(2, 32, dtype=torch.float32, seed=1)
    for wrong in (up[:1], up.half(), up[:, :16]):
        for function in (silu_mul, silu_mul_reference):
            with pytest.raises(ValueError, match=r"gate and up must be .* of one shape and dtype, got \[2, 32\]"):
                function(gate, wrong)
    with pytest.raises(ValueError, match=r"dy must be \[2, 32\] torch.float32, as swiglu's output, got \[1, 32\]"):
        silu_mul_backward(gate[:1], gate, up)
    with pytest.raises(RuntimeError, match="computes no gradients"):
        silu_mul(gate, up.requires_grad_())
