"""Routing's definitions: against Python's own sort and arithmetic, ties, what is not a number, torch's top-k."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tritium.kernels.routing import group_reference, route_reference

INF, NAN = math.inf, math.nan
LOGITS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 3e38, -3e38, 1e-45]),
    st.floats(width=32, min_value=-50, max_value=50),
)


def naive_choice(row: list[float], k: int) -> list[int]:
    """The k largest, ties to the lower index, a NaN as -inf."""
    values = [-INF if math.isnan(value) else value for value in row]
    return sorted(range(len(row)), key=lambda index: (-values[index], index))[:k]


def naive_weights(row: list[float], chosen: list[int], renormalise: bool) -> list[float]:
    """In Python's floats; NaN where the softmax is."""
    if any(map(math.isnan, row)) or math.isinf(max(row)):
        return [NAN] * len(chosen)
    masses = [math.exp(value - max(row)) for value in row]
    total = math.fsum(masses[index] for index in chosen) if renormalise else math.fsum(masses)
    return [masses[index] / total for index in chosen]


@settings(deadline=None, max_examples=200)
@given(st.lists(LOGITS, min_size=1, max_size=20), st.integers(1, 20), st.booleans())
def test_is_the_formula(row: list[float], k: int, renormalise: bool) -> None:
    """Any row: infinities, NaN, both zeros, many ties."""
    k = min(k, len(row))
    experts, weights = route_reference(torch.tensor([row], dtype=torch.float64), k, renormalise)
    assert experts.dtype == torch.int32
    assert experts.tolist() == [naive_choice(row, k)]
    expected = naive_weights(row, experts[0].tolist(), renormalise)
    assert weights[0].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300, nan_ok=True)


@pytest.mark.parametrize("renormalise", [True, False])
def test_is_top_k_of_the_probabilities(renormalise: bool) -> None:
    """Where nothing ties: the softmax over all experts, its k largest, divided by their sum."""
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, indices = logits.softmax(-1).topk(8)
    if renormalise:
        values = values / values.sum(-1, keepdim=True)
    experts, weights = route_reference(logits, 8, renormalise)
    assert torch.equal(experts.long(), indices)
    torch.testing.assert_close(weights, values, rtol=1e-13, atol=0.0)
    assert (weights.sum(-1) - 1).abs().max().lt(1e-12) == renormalise


def test_ties_go_to_the_lower_expert() -> None:
    experts, weights = route_reference(torch.tensor([[2.0, 5.0, 2.0, 5.0], [0.0] * 4, [-INF] * 4, [NAN] * 4]), 3, True)
    assert experts.tolist() == [[1, 3, 0], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[2:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    logits = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts, weights = route_reference(logits, 4, True)
    exact_experts, exact = route_reference(logits.double(), 4, True)
    assert weights.dtype == dtype
    assert torch.equal(experts, exact_experts)
    certain = (exact * (1 - 1e-6)).to(dtype) == (exact * (1 + 1e-6)).to(dtype)
    assert certain.float().mean() > 0.98
    assert torch.equal(weights[certain], exact.to(dtype)[certain])


def test_gradients_reach_the_chosen_logits() -> None:
    """Against finite differences; the choice itself has none."""
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    for renormalise in (True, False):
        assert torch.autograd.gradcheck(lambda x, how=renormalise: route_reference(x, 3, how)[1], (logits,))
    assert not route_reference(logits, 3, True)[0].requires_grad


def naive_group(experts: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
    flat = experts.flatten().tolist()
    order = [index for expert in range(num_experts) for index, one in enumerate(flat) if one == expert]
    starts = [sum(0 <= one < expert for one in flat) for expert in range(num_experts + 1)]
    return order + [0] * (len(flat) - len(order)), starts


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 12), st.integers(1, 4), st.data())
def test_assignments_are_sorted_by_expert(num_experts: int, k: int, data: st.DataObject) -> None:
    """Stable, experts without tokens among them, no tokens at all, ids that are no expert's."""
    rows = st.lists(st.lists(st.integers(-2, num_experts + 1), min_size=k, max_size=k), max_size=9)
    experts = torch.tensor(data.draw(rows), dtype=torch.int32).reshape(-1, k)
    order, starts = group_reference(experts, num_experts)
    assert order.dtype == starts.dtype == torch.int32
    assert (order.tolist(), starts.tolist()) == naive_group(experts, num_experts)
