"""The combining kernel: the rule, one rounding, batch invariance to the bit, views, what it refuses."""

import pytest
import torch
from torch import Tensor
from tritium.kernels import tuning
from tritium.kernels.combine import combine, combine_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, room_around_outputs, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = [(1, 1, 1), (1, 8, 80), (3, 2, 255), (2, 3, 257), (2, 8, 513), (2, 17, 40)]  # the last is not unrolled
Inputs = tuple[Tensor, Tensor, Tensor]


def drawn(tokens: int, k: int, width: int, dtype: torch.dtype, scale: float = 1.0) -> Inputs:
    return (
        draw(tokens * k, width, dtype=dtype, seed=1, scale=scale),
        draw(tokens, k, dtype=dtype, seed=2).abs(),
        draw(tokens, width, dtype=dtype, seed=3, scale=3 * scale),
    )


def check(*inputs: Tensor) -> Tensor:
    out = combine(*inputs)
    assert_rule(out, combine_reference(*inputs), truth_of(combine_reference, *inputs), str(list(inputs[0].shape)))
    return out


def narrowed(inputs: Inputs, tokens: slice | Tensor) -> Inputs:
    """What belongs to some of the tokens."""
    outputs, weights, residual = inputs
    chosen = outputs.unflatten(0, weights.shape)[tokens]
    return chosen.flatten(0, 1), weights[tokens], residual[tokens]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "width"), SHAPES)
def test_rule(tokens: int, k: int, width: int, dtype: torch.dtype) -> None:
    check(*drawn(tokens, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rule_for_many_tokens(dtype: torch.dtype) -> None:
    """Above 64 tokens another configuration runs."""
    check(*drawn(65, 2, 24, dtype))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "width"), [(8, 2048), (8, 4096), (8, 7168), (1, 2047), (4, 1365), (16, 8192)])
def test_rule_in_full(k: int, width: int, dtype: torch.dtype) -> None:
    for tokens in (1, 16, 65, 2048):
        check(*drawn(tokens, k, width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 300.0])
def test_extreme_magnitudes(scale: float, dtype: torch.dtype) -> None:
    check(*drawn(2, 4, 96, dtype, scale))


def test_row_by_row() -> None:
    """By hand: token t's j-th expert is row t * k + j, and has weight [t, j]."""
    outputs = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]], device=DEVICE)
    weights = torch.tensor([[1.0, 0.5], [-1.0, 2.0]], device=DEVICE)
    residual = torch.tensor([[100.0, 200.0], [300.0, 400.0]], device=DEVICE)
    assert combine(outputs, weights, residual).tolist() == [[102.0, 220.0], [305.0, 450.0]]


@pytest.mark.parametrize("k", [8, 16, 17, 64])
def test_sums_in_order_by_fused_multiply_adds_and_adds_the_residual_last(k: int) -> None:
    """To the bit, in float32: another order, a product that rounds, a residual that comes first would each differ."""
    outputs, weights, residual = drawn(2, k, 256, torch.float32)
    total = torch.zeros(2, 256, dtype=torch.float64, device=DEVICE)
    for j in range(k):
        # A product of two float32 is exact in float64, and so, nearly always, is that and one more rounded once.
        exact = weights[:, j, None].double() * outputs.unflatten(0, (2, k))[:, j].double() + total
        total = exact.float().double()
    expected = (total + residual.double()).float()
    assert (combine(outputs, weights, residual) == expected).float().mean() == 1
    first = residual.clone()
    for j in range(k):
        first = torch.addcmul(first, outputs.unflatten(0, (2, k))[:, j], weights[:, j, None])
    assert (first != expected).float().mean() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    inputs = drawn(4, 4, 128, dtype)
    exact = truth_of(combine_reference, *inputs)
    certain = (exact - 1e-5).to(dtype) == (exact + 1e-5).to(dtype)
    assert certain.float().mean() > 0.9
    assert torch.equal(combine(*inputs)[certain], exact.to(dtype)[certain])


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's bits: alone, among 1 to 17, under any launch, at another place, beside NaN."""
    inputs = drawn(17, 3, 96, dtype)
    whole = combine(*inputs)
    for tokens in range(1, 18, 1 if DEVICE == "cuda" else 4):
        assert same_bits(combine(*narrowed(inputs, slice(tokens))), whole[:tokens])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    assert same_bits(combine(*narrowed(inputs, order)), whole[order])
    poisoned: Inputs = tuple(torch.full_like(x, float("nan")) for x in inputs)  # type: ignore[assignment]
    for alone, x in zip(narrowed(poisoned, slice(8, 9)), narrowed(inputs, slice(8, 9)), strict=True):
        alone.copy_(x)
    assert same_bits(combine(*poisoned)[8], whole[8])
    for use in ({"BLOCK_N": 32, "num_warps": 2}, {"BLOCK_N": 1024, "num_warps": 8}):
        monkeypatch.setattr(tuning, "config", lambda *args, use=use, **key: use)
        assert same_bits(combine(*narrowed(inputs, slice(2))), whole[:2])


def test_views_and_empty_input() -> None:
    storage = draw(6, 3, 96, dtype=torch.float32)
    outputs, weights, residual = storage[:, 0, :40], storage[0, :, :2], storage[:3, 2, 50:90]
    expected = combine(outputs.contiguous(), weights.contiguous(), residual.contiguous())
    assert same_bits(check(outputs, weights, residual), expected)
    turned = outputs.t().contiguous().t(), weights.t().contiguous().t(), residual.t().contiguous().t()
    assert same_bits(combine(*turned), expected)
    assert combine(outputs[:0], weights[:0], residual[:0]).shape == (0, 40)
    assert combine(outputs[:, :0], weights, residual[:, :0]).shape == (3, 0)


def test_the_inputs_are_not_overwritten() -> None:
    inputs = drawn(3, 2, 40, torch.bfloat16)
    before = [x.clone() for x in inputs]
    combine(*inputs)
    assert all(same_bits(a, b) for a, b in zip(inputs, before, strict=True))


def test_nothing_is_written_beside_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room around each output keeps its marks; neighbouring rows would hide a column too many, but for the last."""
    rooms = room_around_outputs(monkeypatch)
    for width in (57, 256, 257):
        assert combine(*drawn(2, 2, width, torch.float32)).ne(7).all()
    assert len(rooms) == 3
    assert all(room[:64].eq(7).all() and room[-64:].eq(7).all() for room in rooms)


def test_rows_beyond_int32_offsets() -> None:
    """A third row more than 2^31 elements from the first, by a stride that is less: int32 products would wrap."""
    torch.use_deterministic_algorithms(False)  # only the pages that are written are ever there: nothing is poisoned
    apart = 2**30 + 2**20
    storage = torch.empty(2 * apart + 64, dtype=torch.float16, device=DEVICE)
    far, near = storage.as_strided((3, 32), (apart, 1)), storage[32:].as_strided((3, 32), (apart, 1))
    outputs, weights, residual = drawn(3, 1, 32, torch.float16)
    assert same_bits(combine(far.copy_(outputs), weights, near.copy_(residual)), combine(outputs, weights, residual))


@needs_gpu
def test_no_race() -> None:
    inputs = drawn(300, 8, 2048, torch.bfloat16)
    first = combine(*inputs)
    assert all(same_bits(combine(*inputs), first) for _ in range(200))


def test_refuses_what_does_not_fit() -> None:
    outputs, weights, residual = drawn(3, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"outputs must be \[6, 16\] for weights \[3, 2\], got \[5, 16\]"):
        combine(outputs[:5], weights, residual)
    with pytest.raises(ValueError, match=r"residual must be \[3, 16\] for weights \[3, 2\], got \[2, 16\]"):
        combine(outputs, weights, residual[:2])
    for bad in (weights[0], weights[:, :0]):
        with pytest.raises(ValueError, match=r"weights must be \[T, k\]"):
            combine(outputs, bad, residual)
    with pytest.raises(TypeError, match=r"one dtype, got torch\.float32, torch\.float16 and torch\.float32"):
        combine(outputs, weights.half(), residual)
    with pytest.raises(TypeError, match="float64"):
        combine(outputs.double(), weights.double(), residual.double())
    with pytest.raises(RuntimeError, match="computes no gradients"):
        combine(outputs, weights.clone().requires_grad_(), residual)


def test_registered() -> None:
    op, inputs = torch.ops.tritium.combine, drawn(3, 2, 16, torch.float32)
    torch.library.opcheck(op, inputs)
    torch.library.opcheck(op, tuple(x.clone().requires_grad_() for x in inputs))
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")(*inputs)
    assert same_bits(compiled, op(*inputs))
    assert same_bits(op(*inputs), combine(*inputs))
