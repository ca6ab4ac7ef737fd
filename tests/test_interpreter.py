"""What stands in for a GPU's arithmetic, against torch's own: a wrong stand-in would prove wrong kernels right."""

import numpy as np
import pytest
import torch
from tritium.kernels.launch import INTERPRETED, launch, tl, triton

from .interpreter import narrow, widen

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU nothing stands in")


@triton.jit
def _arithmetic(x_ptr, y_ptr, add_ptr, multiply_ptr, exp_ptr, less_ptr, half_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(add_ptr + at, x + y)
    tl.store(multiply_ptr + at, x * y)
    tl.store(exp_ptr + at, tl.exp(x.to(tl.float32)))
    tl.store(less_ptr + at, (x < y).to(tl.int32))
    tl.store(half_ptr + at, x.to(tl.float16))


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="ieee"))


def test_every_bfloat16_widens_and_narrows_to_itself() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    assert np.array_equal(widen(bits), values.float().numpy(), equal_nan=True)
    numbers = ~values.isnan().numpy()
    assert np.array_equal(narrow(widen(bits))[numbers], bits[numbers])


def test_rounding_is_to_nearest_even() -> None:
    """Random words, every tie, the largest number, infinities and subnormals, as torch rounds them."""
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16) | 0x8000
    values = np.concatenate((words, ties)).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    got = torch.from_numpy(narrow(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), expected[~got.isnan()].view(torch.int16))


def test_arithmetic_on_bfloat16_is_torch_s() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(256).to(torch.bfloat16), torch.randn(256).to(torch.bfloat16)
    add, multiply, exponential = (torch.empty(256, dtype=torch.bfloat16) for _ in range(3))
    less, half = torch.empty(256, dtype=torch.int32), torch.empty(256, dtype=torch.float16)
    launch(_arithmetic, (1,), x, y, add, multiply, exponential, less, half, N=256)
    assert torch.equal(add, x + y)
    assert torch.equal(multiply, x * y)
    assert torch.equal(exponential, x.float().exp().to(torch.bfloat16))
    assert torch.equal(less, (x < y).int())
    assert torch.equal(half, x.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dot_is_the_exact_product_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    c = torch.empty(16, 32)
    launch(_product, (1,), a, b, c, M=16, N=32, K=64)
    assert torch.equal(c, (a.double() @ b.double()).float())


@triton.jit
def _count_kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    tl.store(y_ptr + tl.arange(0, 8), (x < 6).to(tl.int32) + (x < 3).to(tl.int32))


def test_truth_values_are_numbers_once_cast() -> None:
    """Would break: the sum of two comparisons is a logical or."""
    x, y = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    _count_kernel[(1,)](x, y)
    assert y.tolist() == [2, 2, 2, 1, 1, 1, 0, 0]
