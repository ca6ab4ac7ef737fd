"""The SwiGLU kernel: the rule, its two roundings, batch invariance, views, extremes, what it refuses."""

import pytest
import torch
from tritium.kernels.swiglu import swiglu, swiglu_reference

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
