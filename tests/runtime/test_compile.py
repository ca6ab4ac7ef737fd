"""torch.compile over whole models: one graph for forward and loss, and one for every length of a bucket."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.registry import get_family

from ..rule import DEVICE

SHAPE = {
    "num_layers": 2, "embedding_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 48,
    "vocab_size": 101, "context_length": 64, "dtype": "float32",
}  # fmt: skip
EXPERTS = {"expert_layers": True, "num_experts": 4, "experts_per_token": 2, "expert_dim": 16}
MODELS = {
    "qwen3": ("qwen3", "0.6B", {}),
    "mixture": ("qwen3", "30B-A3B", EXPERTS),
    "mobilellm": ("mobilellm", "140m", {}),
    "gpt": ("gpt", "small", {"num_kv_heads": 4}),
}


def model_of(kind: str, **changes: Any) -> Decoder:
    family, size, special = MODELS[kind]
    model = Decoder(get_family(family).spec(size).replace(**{**SHAPE, **special, **changes}))
    return model.to(DEVICE).initialise(std=0.2, seed=3)


@pytest.fixture(autouse=True)
def by_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the operations are their definitions, as without the interpreter, which would take minutes here."""
    torch._dynamo.reset()
    if DEVICE == "cpu":
        monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")


class Counting:
    """A compiler that counts the graphs that it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs)


def inputs(rows: int, length: int, padded: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(100 * rows + length)
    x = torch.randint(0, 101, (rows, length), generator=generator).to(DEVICE)
    labels = x.clone()
    labels[0, length // 2] = -100
    if not padded:
        return x, None, labels
    mask = torch.ones_like(x)
    mask[0, : length // 3] = 0  # on the left,
    mask[1, length - 2 :] = 0  # on the right
    return x, mask, labels


def step(run: Callable[..., Any], model: Decoder, *args: Any) -> list[Tensor]:
    model.zero_grad()
    out = run(*args)
    loss = out if isinstance(out, Tensor) else out.loss
    loss.backward()
    rest = [] if isinstance(out, Tensor) else [out.logits, out.hidden_states]
    found = [loss, *rest, *(parameter.grad for parameter in model.parameters())]
    return [tensor.detach().clone() for tensor in found if tensor is not None]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_loss_are_one_graph_for_all_lengths(kind: str, padded: bool) -> None:
    """Loss, logits, hidden states and gradients are those without compilation; the third length compiles nothing."""
    model, compiler = model_of(kind), Counting()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    graphs = []
    for length in (9, 10, 12, 17, 33, 64):
        args = inputs(3, length, padded)
        for got, want in zip(step(compiled, model, *args), step(model, model, *args), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        graphs.append(compiler.graphs)
    assert graphs[0] >= 1
    assert graphs[2:] == [graphs[1]] * 4
    with pytest.raises(TritiumError, match="65 tokens exceeds the context length of 64"):
        model(*inputs(3, 65, padded))


@pytest.mark.parametrize("kind", MODELS)
def test_packed_sequences_of_any_lengths_are_one_graph(kind: str) -> None:
    """What `tritium train` compiles: the tokens of a step are as many, their sequences are not."""
    model, compiler = model_of(kind), Counting()

    def loss(tokens: Tensor, labels: Tensor, starts: Tensor, positions: Tensor) -> Tensor:
        return model.loss(tokens, labels, Batch.traced(starts, positions, 20))

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    tokens = inputs(1, 20, False)[0][0]
    graphs = []
    for counts in ([20], [7, 13], [1, 18, 1], [4] * 5, [19, 1]):
        batch = Batch.fresh(counts, tokens.device)
        found = step(compiled, model, tokens, tokens.roll(-1), batch.device_starts, batch.positions)
        wanted = step(model.loss, model, tokens, tokens.roll(-1), batch)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        graphs.append(compiler.graphs)
    assert graphs[2:] == [graphs[1]] * 3


def test_a_rule_that_goes_by_the_prompt_is_refused() -> None:
    """Compiled, a batch does not know its rows' lengths: stretching nothing would be wrong without a word."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    model = model_of("qwen3", rope_scaling=scaling)
    x = inputs(2, 20, False)[0]
    assert model(x).logits.shape == (2, 20, 101)
    with pytest.raises((TritiumError, torch._dynamo.exc.TorchDynamoException), match="cannot be compiled"):
        torch.compile(copy.copy(model), fullgraph=True, backend="aot_eager")(x)
