"""`generate` of an accelerated model: the untouched one's tokens, by every way of choosing them and every cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tritium
from tests import oracle
from tests.dropin.accelerated import SMALL, build, launch

X = oracle.tokens(2, 7) % 200 + 1  # 0 is the padding
NEW = 6
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam search": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


def generated(model: Any, x: Tensor, **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    tokens: list[list[int]] = model.generate(x, max_new_tokens=NEW, min_new_tokens=NEW, **options).tolist()
    return tokens


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_same_tokens(case: oracle.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")
    model = build(case)
    padded, mask = X.clone(), torch.ones_like(X)
    padded[0, :3], mask[0, :3] = 0, 0
    draft = build(case, seed=1)

    def all_ways() -> dict[str, list[list[int]]]:
        found = {way: generated(model, X, **options) for way, options in WAYS.items()}
        left = {way: WAYS[way] for way in ("greedy", "beam search", "static cache")}
        found |= {f"{way}, padded": generated(model, padded, attention_mask=mask, **left[way]) for way in left}
        found["assisted"] = generated(model, X[:1], do_sample=False, assistant_model=draft)
        found["alone"] = generated(model, X[:1, 3:], do_sample=False)
        return found

    expected = all_ways()
    assert len({str(tokens) for tokens in expected.values()}) > 6  # else the ways would be one
    report = tritium.accelerate(model)
    assert all_ways() == expected
    tritium.accelerate(draft)  # both
    assert generated(model, X[:1], do_sample=False, assistant_model=draft) == expected["assisted"]
    report.undo()
    assert generated(model, X, **WAYS["beam search"]) == expected["beam search"]


@pytest.mark.parametrize("case", [SMALL[1]], ids=str)
def test_by_the_kernels(case: oracle.Case) -> None:
    """Prefill, then steps over the cache, interpreted or on the GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x = build(case).to(device), X[:, :5].to(device)
    options = {"max_new_tokens": 2, "do_sample": False}
    expected = model.generate(x, **options)
    tritium.accelerate(model)
    assert torch.equal(model.generate(x, **options), expected)
