"""The definitions of the grouped products against loops over single numbers, what they read, where they round."""

import math

import pytest
import torch
from torch import Tensor
from tritium.kernels.grouped_linear import grouped_linear_reference, grouped_swiglu_reference
from tritium.kernels.swiglu import swiglu_reference

HALVES = [torch.bfloat16, torch.float16]
NAN = float("nan")


def grouped(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """order and starts of experts [T, k], one assignment after the other."""
    flat = experts.flatten().tolist()
    owned = [[a for a, expert in enumerate(flat) if expert == chosen] for chosen in range(num_experts)]
    starts = [0]
    for mine in owned:
        starts.append(starts[-1] + len(mine))
    order = [a for mine in owned for a in mine]
    return torch.tensor(order, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def naive(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """[T, K], [E, N, K], [T, k] -> [T * k, N], a number at a time, in Python's own float64."""
    rows, matrices = x.double().tolist(), weight.double().tolist()
    out = [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in matrices[expert]]
        for row, chosen in zip(rows, experts.tolist(), strict=True)
        for expert in chosen
    ]
    return torch.tensor(out, dtype=torch.float64).reshape(experts.numel(), weight.shape[1])


def naive_gated(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    width = weight.shape[1] // 2
    rows = [
        [gate / (1 + math.exp(-gate)) * up for gate, up in zip(row[:width], row[width:], strict=True)]
        for row in naive(x, weight, experts).tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(experts.numel(), width)


# The experts of each token, and how many experts there are.
ROUTINGS = {
    "two of four": ([[2, 0], [0, 3], [3, 2]], 4),
    "one of one": ([[0], [0], [0]], 1),
    "all of five": ([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]], 5),
    "all on the last": ([[2], [2], [2], [2]], 3),
    "the same twice": ([[1, 1], [0, 1]], 3),
    "one token": ([[5, 1, 3]], 7),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_is_the_formula_in_float64(routing: str) -> None:
    """Assignments in another order, a token's row of another token, a turned weight, gate and up swapped would show."""
    chosen, count = ROUTINGS[routing]
    experts = torch.tensor(chosen)
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((len(chosen), 5), (count, 6, 5)))
    order, starts = grouped(experts, count)
    k = experts.shape[1]
    exact = naive(x, weight, experts)
    torch.testing.assert_close(grouped_linear_reference(x, weight, order, starts, k), exact, rtol=1e-12, atol=1e-12)
    out = grouped_swiglu_reference(x, weight, order, starts, k)
    torch.testing.assert_close(out, naive_gated(x, weight, experts), rtol=1e-12, atol=1e-12)
    # The second product of a layer: a row for each assignment, in the order of assignments.
    down = torch.randn(count, 4, 3, dtype=torch.float64)
    per_row = naive(out, down, experts.reshape(-1, 1))
    found = grouped_linear_reference(out, down, order, starts, 1)
    torch.testing.assert_close(found, per_row, rtol=1e-12, atol=1e-12)


def test_assignments_keep_their_order() -> None:
    """By hand: expert e multiplies by e + 1; row a is the a-th assignment, whatever the grouped order is."""
    weight = torch.tensor([[[1.0]], [[2.0]], [[3.0]]])
    order, starts = torch.tensor([1, 2, 0, 3], dtype=torch.int32), torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    x = torch.tensor([[10.0], [100.0]])
    assert grouped_linear_reference(x, weight, order, starts, 2).tolist() == [[30.0], [10.0], [100.0], [300.0]]


def test_reads_only_experts_with_tokens() -> None:
    weight = torch.full((5, 6, 4), NAN)
    weight[[1, 3]] = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    x, experts = torch.ones(2, 4), torch.tensor([[3, 1], [1, 3]])
    out = grouped_linear_reference(x, weight, *grouped(experts, 5), 2)
    torch.testing.assert_close(out.double(), naive(x, weight.nan_to_num(), experts))


@pytest.mark.parametrize("dtype", HALVES)
def test_rounds_like_the_linear_layer(dtype: torch.dtype) -> None:
    """Bit for bit on sums that are exact in float32; gated, the projection rounds before the activation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (9, 48), generator=generator).to(dtype)
    weight = (torch.randint(-127, 128, (4, 20, 48), generator=generator) * 2.0**-7).to(dtype)
    experts = torch.randint(4, (9, 2), generator=generator)
    order, starts = grouped(experts, 4)
    once = naive(x, weight, experts).to(dtype)
    assert torch.equal(grouped_linear_reference(x, weight, order, starts, 2), once)
    out = grouped_swiglu_reference(x, weight, order, starts, 2)
    assert torch.equal(out, swiglu_reference(once))
    assert not torch.equal(out, swiglu_reference(naive(x, weight, experts)).to(dtype))  # else this would prove nothing


def test_empty() -> None:
    none = torch.empty(0, dtype=torch.int32)
    starts = torch.zeros(4, dtype=torch.int32)
    assert grouped_linear_reference(torch.empty(0, 5), torch.ones(3, 6, 5), none, starts, 2).shape == (0, 6)
    assert grouped_swiglu_reference(torch.empty(0, 5), torch.ones(3, 6, 5), none, starts, 2).shape == (0, 3)
    order, starts = grouped(torch.tensor([[0, 2]]), 3)
    out = grouped_linear_reference(torch.empty(1, 0), torch.ones(3, 4, 0), order, starts, 2)
    assert out.tolist() == [[0.0] * 4] * 2


def test_gradients() -> None:
    """Against finite differences; an expert without tokens gets zeros, a token the sum over its experts."""
    torch.manual_seed(1)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, 4, dtype=torch.float64, requires_grad=True)
    order, starts = grouped(torch.tensor([[2, 0], [0, 3], [3, 2]]), 4)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear_reference(a, b, order, starts, 2), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: grouped_swiglu_reference(a, b, order, starts, 2), (x, weight))
    out = torch.ops.tritium.grouped_swiglu(x.float(), weight.float(), order, starts, 2)
    (found,) = torch.autograd.grad(out.sum(), weight)
    (expected,) = torch.autograd.grad(grouped_swiglu_reference(x, weight, order, starts, 2).sum(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected[1].abs().sum() == 0 < expected[0].abs().sum()


def test_views_and_inputs_survive() -> None:
    torch.manual_seed(2)
    x = torch.randn(10, 24, dtype=torch.float64)[::2, ::3]
    weight = torch.randn(8, 3, 6, dtype=torch.float64).permute(1, 2, 0)
    experts = torch.tensor([[0, 2]] * 4 + [[2, 1]])
    order, starts = grouped(experts, 3)
    before = [tensor.clone() for tensor in (x, weight, order, starts)]
    out = grouped_linear_reference(x, weight, order, starts, 2)
    torch.testing.assert_close(out, naive(x, weight, experts), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, order, starts), before, strict=True))
