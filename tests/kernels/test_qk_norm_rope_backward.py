"""The gradient of QK-norm and rotation: its definition is autograd's in float64, and rounds where it says."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.qk_norm_rope import qk_norm_rope_at_reference
from tritium.kernels.qk_norm_rope_backward import qk_norm_rope_backward_reference

HALVES = [torch.bfloat16, torch.float16]
HEADS, KV_HEADS, CONTEXT = 4, 2, 9
POSITIONS = torch.tensor([7, 2, 7, 0, 5])


def rope_table(head_dim: int) -> Tensor:
    angle = torch.outer(torch.arange(CONTEXT), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return torch.stack((angle.cos(), angle.sin()), 1).float()


@pytest.mark.parametrize(("scaled", "rotate"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(("norm", "first"), [("none", True), ("weighted", True), ("weighted", False), ("plain", False)])
def test_is_autograds_in_float64(norm: str, first: bool, scaled: bool, rotate: bool) -> None:
    """Rotation not turned back, the mean left out, a factor on k, a gradient for v: each would show."""
    torch.manual_seed(0)
    for tokens, head_dim in ((5, 16), (1, 80), (0, 2)):
        qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * head_dim, dtype=torch.float64, requires_grad=True)
        weight = 1 + 0.3 * torch.randn(HEADS + KV_HEADS, head_dim, dtype=torch.float64)
        given = (
            *(qkv, HEADS, KV_HEADS, rope_table(head_dim).double() if rotate else None),
            *(POSITIONS[:tokens] if rotate else None, torch.float64, norm != "none"),
            *(weight.requires_grad_() if norm == "weighted" else None, 0.1, first),
            1 + torch.rand(CONTEXT) if scaled else None,
        )
        q, k, _ = qk_norm_rope_at_reference(*given)
        dq, dk = torch.randn_like(q), torch.randn_like(k)
        wanted = [qkv, weight] if norm == "weighted" else [qkv]
        expected = torch.autograd.grad((q, k), wanted, (dq, dk))
        with torch.no_grad():
            dqkv, dweight = qk_norm_rope_backward_reference(dq, dk, *given)
            frozen = qk_norm_rope_backward_reference(dq, dk, *given, wants_weight=False)
        torch.testing.assert_close(dqkv, expected[0], rtol=1e-12, atol=1e-12)
        assert dqkv.is_contiguous()
        assert dqkv.unflatten(1, (-1, head_dim))[:, HEADS + KV_HEADS :].eq(0).all()
        if norm == "weighted":
            torch.testing.assert_close(dweight, expected[1], rtol=1e-12, atol=1e-12)
        else:
            assert dweight.shape == (0,)
        assert torch.equal(frozen[0], dqkv)
        assert frozen[1].shape == (0,)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_float32", [True, False])
def test_each_gradient_rounds_once_and_constants_are_the_forward_passs(
    in_float32: bool, first: bool, dtype: torch.dtype
) -> None:
    """Bit for bit the float64 gradient of the widened inputs with the constants that the forward pass multiplied by."""
    torch.manual_seed(1)
    head_dim = 64
    qkv = torch.randn(5, (HEADS + 2 * KV_HEADS) * head_dim).to(dtype)
    weight = (1 + 0.3 * torch.randn(HEADS + KV_HEADS, head_dim)).to(dtype)
    dq, dk = torch.randn(5, HEADS, head_dim).to(dtype), torch.randn(5, KV_HEADS, head_dim).to(dtype)
    table, factors = rope_table(head_dim), 1 + torch.rand(CONTEXT)
    rope = torch.float32 if in_float32 else dtype

    def call(wide: bool, table: Tensor, rope: torch.dtype, factors: Tensor) -> tuple[Tensor, Tensor]:
        x, w, *upstream = (t.double() if wide else t for t in (qkv, weight, dq, dk))
        rest = (table, POSITIONS, rope, True, w, 1e-6, first, factors)
        return qk_norm_rope_backward_reference(*upstream, x, HEADS, KV_HEADS, *rest)

    exact = call(True, table.to(rope).double(), torch.float64, factors.to(dtype).double())
    for got, truth in zip(call(False, table, rope, factors), exact, strict=True):
        assert got.dtype == dtype
        certain = ((truth - 4e-6).to(dtype) == (truth + 4e-6).to(dtype)) | (truth == 0)  # v's zeros
        assert certain.float().mean() > 0.9
        assert torch.equal(got[certain], truth.to(dtype)[certain])
    others = [call(True, table.double(), torch.float64, factors.double())[0]]
    if not in_float32:  # the factor alone would show in q
        others.append(call(True, table.double(), torch.float64, factors.to(dtype).double())[0])
    for other in others:
        assert (other.to(dtype) != exact[0].to(dtype)).float().mean() > 0.05  # else this test would prove nothing


def test_query_scale_needs_positions() -> None:
    dq, dk, rest = torch.zeros(2, 2, 4), torch.zeros(2, 1, 4), (torch.float32, False, None, 0.0, True, torch.ones(4))
    with pytest.raises(ValueError, match="it needs table and positions"):
        qk_norm_rope_backward_reference(dq, dk, torch.zeros(2, 16), 2, 1, None, None, *rest)
