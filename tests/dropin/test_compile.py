"""An accelerated model under torch.compile: one graph, and no other for another length."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf

import tritium
from tests import oracle
from tests.dropin.accelerated import SMALL, build, launch

LENGTHS = [*range(5, 55)]


def each(*few: int) -> list[Any]:
    """All architectures where there is a GPU, a few elsewhere: a trace takes seconds."""
    marks = [() if index in few else pytest.mark.gpu for index in range(len(SMALL))]
    return [pytest.param(case, marks=mark) for case, mark in zip(SMALL, marks, strict=True)]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted() -> tuple[Any, list[int]]:
    """A backend that counts its graphs."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("case", each(1, 4, 5), ids=str)
def test_one_graph_for_fifty_prompt_lengths(case: oracle.Case) -> None:
    model = build(case)
    tritium.accelerate(model)
    backend, graphs = counted()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in LENGTHS:
            x = oracle.tokens(2, length)
            torch._dynamo.mark_dynamic(x, 1)
            found = compiled(x, use_cache=False).logits
            if length % 13 == 5:
                torch.testing.assert_close(found, model(x).logits, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("case", each(2), ids=str)
def test_one_graph_for_steps_over_a_static_cache(case: oracle.Case) -> None:
    model = build(case)
    x = oracle.tokens(2, 12)
    with torch.no_grad():
        expected = model(x).logits
        tritium.accelerate(model)
        cache = hf.StaticCache(config=model.config, max_cache_len=16)
        torch.testing.assert_close(model(x[:, :5], past_key_values=cache).logits, expected[:, :5], atol=1e-5, rtol=1e-5)
        backend, graphs = counted()
        step = torch.compile(model, backend=backend, fullgraph=True)
        for place in range(5, 12):
            positions = torch.full((2, 1), place)
            found = step(x[:, place : place + 1], past_key_values=cache, position_ids=positions).logits
            torch.testing.assert_close(found[:, 0], expected[:, place], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize(("case", "logits"), [(SMALL[1], False), (SMALL[5], True)], ids=str)
def test_a_training_step_is_one_graph(case: oracle.Case, logits: bool) -> None:
    """Forward and backward, with gradients of the untouched model."""
    model, x = build(case), oracle.tokens(2, 9)
    model(x, labels=x).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    tritium.accelerate(model, logits=logits)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x, labels=x, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        limit = 2e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], atol=limit, rtol=0.0, msg=name)
