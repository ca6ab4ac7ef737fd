"""Log-probabilities: what they are, and that a sampler's are a trainer's, to the bit where that is promised."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime import generation
from tritium.runtime.decoder import Decoder
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.log_probs import Log
from tritium.runtime.registry import get_family

import tritium
from tests import oracle, tiny
from tests.rule import DEVICE, same_bits

SHAPE = {
    "vocab_size": 61, "context_length": 300, "embedding_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 16, "hidden_dim": 32, "norm_eps": 1e-6, "rope_base": 1e4, "rope_scaling": None,
    "tie_embeddings": True, "dtype": "float32",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # what each needs besides SHAPE
    "qwen3": {},
    "mobilellm": {"rope_layers": [True, False], "qk_norm_layers": [True, False]},
    "qwen2": {"tie_embeddings": False},
    "qwen3_moe": {
        "expert_layers": [True, False], "num_experts": 4, "experts_per_token": 2, "expert_dim": 16,
        "renormalise_experts": True,
    },
    "gpt": {"num_kv_heads": 2, "activation": "gelu_tanh"},
}  # fmt: skip
PROMPTS = [[3, 14, 15], [9, 2, 6, 5, 35]]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def small(family: str = "qwen3", dtype: torch.dtype = torch.float32, backend: str = "torch", **changes: Any) -> Decoder:
    values = {name: value for name, value in SHAPE.items() if name not in get_family(family).traits}
    spec = get_family(family).spec_from({**values, **FAMILIES[family], **changes}, "test")
    model = Decoder(spec)
    oracle.redraw(model, 2)
    model = model.to(DEVICE, dtype).eval()
    return model.use_backend(backend, sampler_equals_trainer=backend == "triton")


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask) of ragged rows."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(length - len(tokens), length) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return ids.to(DEVICE), mask.to(DEVICE)


def reported(
    model: Decoder, prompts: list[list[int]], steps: int = 3, vocabulary: int | None = None, **options: Any
) -> tuple[list[list[int]], list[Tensor]]:
    """(prompts with what was generated, the log-probabilities of that)."""
    log: Log = []
    how = SamplingOptions(steps, **{"temperature": 0.7, "top_k": 9, "seed": 1, **options})
    found = list(generate(model, prompts, how, vocabulary=vocabulary, log_probs=log))
    rows = [[*prompt, *[step[row] or 0 for step in found]] for row, prompt in enumerate(prompts)]
    return rows, [torch.tensor([step[row] for step in log], device=DEVICE) for row in range(len(prompts))]


def trained(model: Decoder, rows: list[list[int]], left: bool = True) -> list[Tensor]:
    """Each row's log-probabilities by a training forward over all rows at once."""
    ids, mask = padded(rows, left)
    found = model.log_probs(ids, mask)
    assert found.requires_grad == torch.is_grad_enabled()
    assert found[mask[:, :-1] * mask[:, 1:] == 0].eq(0).all()
    ends = [ids.shape[1] - 1 if left else len(row) - 1 for row in rows]
    return [found[at, end - len(row) + 1 : end].detach() for at, (row, end) in enumerate(zip(rows, ends, strict=True))]


# What they are


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_are_those_of_the_softmax_with_their_gradients(family: str, left: bool) -> None:
    model = small(family)
    ids, mask = padded([[1, 2, 3, 4, 5], [6, 7], [8]], left)
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = model.log_probs(ids, mask)
    assert (found.dtype, found.shape) == (torch.float32, (3, 4))
    real = (mask[:, :-1] * mask[:, 1:]).bool()
    assert real.sum() == 5
    logits = model(ids, mask).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).masked_fill(~real, 0.0)
    torch.testing.assert_close(found, expected, **CLOSE)
    parameters = list(model.parameters())
    ours = torch.autograd.grad((found * weights).sum(), parameters)
    for got, right in zip(ours, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_the_loss_of_each_token() -> None:
    """`loss` with the reduction none is their opposite; its mean is the mean's."""
    model = small()
    tokens, labels = torch.tensor([1, 2, 3, 4], device=DEVICE), torch.tensor([2, 3, 4, -100], device=DEVICE)
    batch = tritium.runtime.batch.Batch.fresh([4], tokens.device)
    each = model.loss(tokens, labels, batch, reduction="none")
    torch.testing.assert_close(-each[:3], model.log_probs(tokens[None])[0], **CLOSE)
    assert each[3] == 0
    torch.testing.assert_close(each.sum() / 3, model.loss(tokens, labels, batch), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 0}], ids=str)
def test_generation_reports_the_models_own(options: dict[str, Any]) -> None:
    """At temperature 1 over all ids, whatever the tokens were chosen by; asking changes no token."""
    model = small()
    rows, scores = reported(model, PROMPTS, **options)
    for row, score, whole, prompt in zip(rows, scores, trained(model, rows), PROMPTS, strict=True):
        torch.testing.assert_close(score, whole[len(prompt) - 1 :], **CLOSE)
        assert score.unique().numel() == 3, row
    how = SamplingOptions(3, **{"temperature": 0.7, "top_k": 9, "seed": 1, **options})
    plain = list(generate(model, PROMPTS, how))
    assert [[*prompt, *[step[row] for step in plain]] for row, prompt in enumerate(PROMPTS)] == rows


def test_ids_that_cannot_be_chosen_count() -> None:
    model = small()
    rows, scores = reported(model, PROMPTS, vocabulary=20)
    assert all(token < 20 for row, prompt in zip(rows, PROMPTS, strict=True) for token in row[len(prompt) :])
    assert any(token >= 20 for row in reported(model, PROMPTS)[0] for token in row[5:])
    for score, whole in zip(scores, trained(model, rows), strict=True):
        torch.testing.assert_close(score, whole[-3:], **CLOSE)


def test_padded_generation_returns_them() -> None:
    """[B, N] beside the tokens; 0 behind an EOS, whose own is there; nothing generated is nothing reported."""
    model = small()
    ids, mask = padded(PROMPTS, left=True)
    free = model.generate(ids, 4, temperature=0, attention_mask=mask)
    stop = int(free[0, -3])
    tokens, scores = model.generate(
        ids, 4, temperature=0, attention_mask=mask, eos_token_id=stop, return_log_probs=True
    )
    assert torch.equal(tokens, model.generate(ids, 4, temperature=0, attention_mask=mask, eos_token_id=stop))
    assert (scores.dtype, scores.shape) == (torch.float32, (2, tokens.shape[1] - ids.shape[1]))
    kept = torch.cat((mask, (scores != 0).to(mask.dtype)), 1)
    assert kept[0].tolist() == [0, 0, 1, 1, 1, 1, 1, *[0] * (scores.shape[1] - 2)]
    expected = model.log_probs(tokens, kept)[:, ids.shape[1] - 1 :]
    torch.testing.assert_close(scores, expected.detach(), **CLOSE)
    tokens, scores = model.generate(ids, 0, attention_mask=mask, return_log_probs=True)
    assert (tokens.shape, scores.shape) == (ids.shape, (2, 0))


def test_text_reports_them() -> None:
    tokenizer = tiny.tokenizer()
    model = small(vocab_size=352, num_layers=1)
    generator = tritium.TextGenerator(model, tokenizer)
    text = generator.generate("The fox", max_new_tokens=5, temperature=0, log_probs=True)
    assert generator.last_stats is not None
    scores = generator.last_stats.log_probs
    assert text == generator.generate("The fox", max_new_tokens=5, temperature=0)
    assert generator.last_stats.log_probs is None
    tokens = tokenizer.encode("The fox")
    found = generate(model, [tokens], SamplingOptions(5, 0), vocabulary=tokenizer.id_limit)
    ids = torch.tensor([[*tokens, *[token or 0 for (token,) in found]]], device=DEVICE)
    expected = model.log_probs(ids)[0, len(tokens) - 1 :].detach()
    torch.testing.assert_close(torch.tensor(scores, device=DEVICE), expected, **CLOSE)


def test_refuses_what_does_not_fit() -> None:
    model = small()
    for wrong, said in (
        (torch.tensor([1, 2]), "must be [batch, length], got [2]"),
        (torch.tensor([[1, 61]]), "token id 61 lies outside 0 to 60"),
        (torch.zeros(1, 301, dtype=torch.int64), "a row of 301 tokens exceeds the context length of 300"),
    ):
        with pytest.raises(tritium.TritiumError) as error:
            model.log_probs(wrong.to(DEVICE))
        assert said in str(error.value)


# A sampler's are a trainer's


def assert_same(model: Decoder, prompts: list[list[int]], steps: int = 2, **options: Any) -> list[list[int]]:
    """What generation reports, what a training forward of all rows gives, and of each row alone: the same bits."""
    # Without top-k and top-p, whose passes cost much in the interpreter and change no log-probability.
    rows, scores = reported(model, prompts, steps, **{"top_k": 0, "top_p": 1.0, **options})
    for row, (score, whole) in enumerate(zip(scores, trained(model, rows), strict=True)):
        assert same_bits(score, whole[-steps:]), f"row {row}"
    with torch.no_grad():
        (alone,) = trained(model, rows[-1:], left=False)
    assert same_bits(scores[-1], alone[-steps:])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits(family: str) -> None:
    assert_same(small(family, backend="triton"), PROMPTS)


def test_same_bits_in_bfloat16_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in pieces; and bfloat16 computed over float32 parameters is a bfloat16 model."""
    model = small("qwen3", torch.bfloat16, "triton")
    rows = assert_same(model, PROMPTS)
    monkeypatch.setattr(generation, "prefill", partial(generation.prefill, at_once=4))
    again, pieces = reported(model, PROMPTS[1:], 2, seed=2, top_k=0, top_p=1.0)
    assert again == rows[1:]
    master = copy.deepcopy(model).float().compute_in(torch.bfloat16)
    (found,) = trained(master, again)
    assert same_bits(found[-2:], pieces[0])


def test_same_bits_for_every_batch() -> None:
    """1 to 17 sequences: rows are padded to 16 in a tile, and go on in another behind it."""
    model = small(num_layers=1, backend="triton")
    rows, scores = reported(model, [[row] for row in range(17)], 2, temperature=0)
    with torch.no_grad():
        for count in (1, 3, 16, 17) if DEVICE == "cpu" else range(1, 18):
            for got, right in zip(trained(model, rows[:count], left=False), scores, strict=False):
                assert same_bits(got, right)


def test_same_bits_with_adapters_recomputed_and_limited() -> None:
    """Adapters that are not zero, gradient checkpointing, ids that cannot be chosen; other sessions are left."""
    model = small(num_layers=1, backend="triton")
    tritium.add_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter.b"):
                parameter.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    model.enable_gradient_checkpointing()
    list(generate(model, PROMPTS, SamplingOptions(2, 0.7, 0, 1.0, seed=1), vocabulary=20))
    rows = assert_same(model, PROMPTS, vocabulary=20)
    assert max(max(row[-2:]) for row in rows) < 20


def test_outside_the_mode_they_are_close() -> None:
    """Fused steps, whose head knows of ids that cannot be chosen, too."""
    model, free = small(num_layers=1).use_backend("triton"), PROMPTS
    for vocabulary in (None, 20):
        rows, scores = reported(model, PROMPTS, 3, vocabulary=vocabulary, temperature=0)
        assert vocabulary is None or max(max(row[-3:]) for row in rows) < vocabulary < max(max(row) for row in free)
        free = rows
        for score, whole, prompt in zip(scores, trained(model, rows), PROMPTS, strict=True):
            torch.testing.assert_close(score, whole[len(prompt) - 1 :], **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_in_full(family: str, dtype: torch.dtype) -> None:
    """Captured steps, prompts and rows of many lengths."""
    shape = {
        "embedding_dim": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "hidden_dim": 320,
        "vocab_size": 997,
    }
    changes = {"num_kv_heads": 4} if family == "gpt" else {}
    model = small(family, dtype, "triton", **{**shape, **changes})
    for count in (1, 3, 17):
        generator = torch.Generator().manual_seed(count)
        prompts = [torch.randint(997, (5 + 11 * row,), generator=generator).tolist() for row in range(count)]
        assert_same(model, prompts, 40)
