"""An embedding's rows behind the vocabulary: no token is ever made of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models
from tritium.runtime import text as text_module
from tritium.runtime.decoder import Decoder
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.registry import get_family
from tritium.runtime.text import TextGenerator
from tritium.runtime.tokenizer import Tokenizer

from tests import oracle
from tests.rule import DEVICE

ROWS = 48
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
REAL = len(LETTERS)
SHAPE = {
    "context_length": 64, "embedding_dim": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
    "hidden_dim": 48, "norm_eps": 1e-6, "rope_base": 1e4, "rope_scaling": None, "tie_embeddings": False,
    "dtype": "float32",
}  # fmt: skip


def padded(rows: int, backend: str = "torch") -> Decoder:
    """The first `rows` rows of one model's vocabulary, whose largest logit is always that of an id behind LETTERS."""
    whole, model = (
        Decoder(get_family("qwen3").spec_from({**SHAPE, "vocab_size": size}, "test"), backend) for size in (ROWS, rows)
    )
    oracle.redraw(whole, 2)
    assert whole.head is not None
    with torch.no_grad():
        whole.head.weight[REAL:] = 50 * whole.head.weight[: ROWS - REAL]
        whole.head.weight[-1] = -whole.head.weight[-2]
        for parameter, values in zip(model.parameters(), whole.parameters(), strict=True):
            parameter.copy_(values[: len(parameter)])
    return model.to(DEVICE).eval()


def run(rows: int, limit: int | None, options: SamplingOptions, backend: str = "torch") -> list[list[int | None]]:
    return list(generate(padded(rows, backend), [[1, 2, 3], [7]], options, (), limit))


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_ids_behind_the_limit_are_not_chosen(temperature: float) -> None:
    """Exactly as if the embedding ended with the vocabulary. Without a limit, or behind it, nothing changes."""
    options = SamplingOptions(12, temperature=temperature, top_k=30, top_p=0.99, seed=5)
    limited = run(ROWS, REAL, options)
    assert limited == run(REAL, None, options) == run(REAL, REAL, options) == run(REAL, ROWS, options)
    free = run(ROWS, None, options)
    assert free == run(ROWS, ROWS, options)
    assert min(token or 0 for step in free for token in step) >= REAL


def test_nor_on_the_triton_path() -> None:
    options = SamplingOptions(2, temperature=1.5, top_p=1.0, seed=5)
    limited = run(ROWS, REAL, options, "triton")
    assert limited == run(REAL, None, options, "triton") == run(REAL, None, options)


def test_texts_hold_none_of_them() -> None:
    """Would break: a checkpoint whose embedding is padded, as Qwen's are, answers with holes in its text."""
    fast = FastTokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, []))
    generator = TextGenerator(padded(ROWS), Tokenizer(fast))
    texts = [generator.generate("abc", max_new_tokens=20, temperature=1.5, top_p=1.0, seed=seed) for seed in range(5)]
    assert [len(str(text).replace(" ", "")) for text in texts] == [20] * 5


def test_what_the_text_generator_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is the largest id's, which a count misses where ids have gaps; chats go the tokenizer's own way."""
    fast = FastTokenizer(models.BPE({"a": 40, "b": 7, "c": 3}, []))
    tokenizer = Tokenizer(fast, chat_template="x")
    assert (tokenizer.vocab_size, tokenizer.id_limit) == (3, 41)
    asked: list[Any] = []

    def nothing(*given: Any) -> Iterator[list[int | None]]:
        asked.append(given)
        return iter(())

    monkeypatch.setattr(text_module, "generate", nothing)
    monkeypatch.setattr(Tokenizer, "encode_chat", lambda self, messages, **options: [len(messages), len(options)])
    generator = TextGenerator(padded(ROWS), tokenizer)
    assert generator.chat("a", system="b", max_new_tokens=1) == ""
    ((_, prompts, _, _, limit, *_),) = asked
    assert (prompts, limit) == ([[2, 1]], 41)
