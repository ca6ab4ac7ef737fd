"""The generation loop: what a row gets does not depend on its batch, its pages or its padding."""

import pytest
import torch
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.kv_cache import PAGE_SIZE, KVCache
from tritium.runtime.registry import get_family

import tritium
from tests import oracle

SHAPE = {
    "vocab_size": 97, "context_length": 700, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "hidden_dim": 48, "norm_eps": 1e-6, "rope_base": 1e4, "rope_scaling": None,
    "tie_embeddings": False, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(get_family("qwen3").spec_from(SHAPE, "test"), "torch")
    oracle.redraw(model, 2)
    return model.eval()


def prompts(*lengths: int) -> list[list[int]]:
    return [
        torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in lengths
    ]


def rows(model: Decoder, batch: list[list[int]], options: SamplingOptions, eos: tuple[int, ...] = ()) -> list[list]:
    return [list(row) for row in zip(*generate(model, batch, options, eos), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampling_repeats_with_its_seed_whatever_the_batch(model: Decoder, dtype: torch.dtype) -> None:
    """Row r draws with seed + r: alone with that seed it gives the same tokens. Another seed gives others."""
    model = Decoder(model.config, "torch").to(dtype).eval()
    oracle.redraw(model, 2)
    batch = prompts(3, 20, 9)
    options = SamplingOptions(15, temperature=0.9, top_k=40, top_p=0.95, seed=11)
    together = rows(model, batch, options)
    assert together == rows(model, batch, options)
    if dtype == torch.float32:
        for row, prompt in enumerate(batch):
            alone = SamplingOptions(15, temperature=0.9, top_k=40, top_p=0.95, seed=11 + row)
            assert rows(model, [prompt], alone) == [together[row]]
    assert together != rows(model, batch, SamplingOptions(15, temperature=0.9, top_k=40, top_p=0.95, seed=12))
    unseeded = SamplingOptions(15, temperature=0.9)
    assert rows(model, batch, unseeded) != rows(model, batch, unseeded)


def test_every_token_stays_in_the_prompts_context(model: Decoder) -> None:
    """Greedy tokens are the argmax of a full forward over what came before, across a page boundary."""
    batch = prompts(PAGE_SIZE - 3, 2)
    for prompt, row in zip(batch, rows(model, batch, SamplingOptions(8, temperature=0)), strict=True):
        logits = model(torch.tensor([prompt + row])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == row


def test_eos_ends_a_row_and_all_rows_end_the_loop(model: Decoder) -> None:
    batch = prompts(4, 7)
    free = rows(model, batch, SamplingOptions(30, temperature=0))
    eos = free[0][3]
    ended = rows(model, batch, SamplingOptions(30, temperature=0), (eos, 96))
    for row, tokens in zip(ended, free, strict=True):
        end = tokens.index(eos) + 1 if eos in tokens else 30
        assert row == tokens[:end] + [None] * (len(row) - end)
    assert len(rows(model, batch[:1], SamplingOptions(30, temperature=0), (eos,))[0]) == free[0].index(eos) + 1
    out = model.generate(torch.tensor(batch[:1]), 30, temperature=0, eos_token_id=eos, pad_token_id=5)
    assert out[0, 4:].tolist() == free[0][: free[0].index(eos) + 1]


def test_padding_behind_an_eos(model: Decoder) -> None:
    x = torch.tensor([prompts(6)[0], prompts(6)[0][::-1]])
    free = model.generate(x, 20, temperature=0)
    eos = next(token for token in free[0, 6:].tolist() if token not in free[1, 6:].tolist())
    out = model.generate(x, 20, temperature=0, eos_token_id=[eos], pad_token_id=77)
    end = free[0, 6:].tolist().index(eos) + 7
    assert torch.equal(out[0, :end], free[0, :end])
    assert end < out.shape[1]
    assert set(out[0, end:].tolist()) == {77}


def test_nothing_to_generate(model: Decoder) -> None:
    x = torch.tensor(prompts(5))
    assert torch.equal(model.generate(x, 0), x)
    assert list(generate(model, [], SamplingOptions(5))) == []


def test_promised_defaults(model: Decoder) -> None:
    """generate(input_ids, max_new_tokens=100, temperature=1.0, top_p=0.9), in that order."""
    x = torch.tensor(prompts(5))
    assert model.generate(x).shape == (1, 105)
    assert torch.equal(model.generate(x, 9, 1.0, 0.9, seed=1), model.generate(x, 9, temperature=1.0, top_p=0.9, seed=1))
    assert SamplingOptions() == SamplingOptions(100, 1.0, 0, 0.9, None)


def test_shuffled_pages_change_nothing(model: Decoder) -> None:
    """Rows whose pages lie anywhere in the pool give the logits of rows whose pages follow one another."""
    lengths, x = (PAGE_SIZE + 20, 3, 2 * PAGE_SIZE), prompts(PAGE_SIZE + 40, 20, 2 * PAGE_SIZE + 20)
    found = []
    for shuffle in (False, True):
        cache = KVCache(model.config, 3, 2 * PAGE_SIZE + 30, torch.float32)
        if shuffle:
            cache.assign_pages(torch.tensor([[8, 3, 0], [1, 2, 6], [5, 7, 4]]))
        plan, steps = model.bind(), []
        with torch.inference_mode():
            tokens = torch.tensor([token for row, length in zip(x, lengths, strict=True) for token in row[:length]])
            steps.append(model.run(plan, tokens, Batch.appended(cache, [0, 1, 2], lengths))[1])
            for step in range(12):
                tokens = torch.tensor([row[length + step] for row, length in zip(x, lengths, strict=True)])
                steps.append(model.run(plan, tokens, Batch.appended(cache, [0, 1, 2], [1, 1, 1]))[1])
            subset = Batch.appended(cache, [2, 0], [2, 1])  # some of the rows, in another order
            steps.append(model.run(plan, torch.tensor([1, 2, 3]), subset)[1])
            permuted = Batch.appended(cache, [2, 0, 1], [1, 1, 1])  # all of them, in another order
            steps.append(model.run(plan, torch.tensor([4, 5, 6]), permuted)[1])
        found.append(torch.cat(steps))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_a_neighbour_full_of_nan_does_not_spread(model: Decoder) -> None:
    """One row's broken keys and values stay its own."""
    cache, plan = KVCache(model.config, 2, 40, torch.float32), model.bind()
    x = prompts(9, 9)
    with torch.inference_mode():
        model.run(plan, torch.tensor(x[0] + x[1]), Batch.appended(cache, [0, 1], [9, 9]))
        for layer in range(2):
            cache.keys[layer][:, 1] = float("nan")
            cache.values[layer][:, 1] = float("nan")
        _, logits = model.run(plan, torch.tensor([5, 5]), Batch.appended(cache, [0, 1], [1, 1]))
    expected = model(torch.tensor([x[0] + [5]])).logits[0, -1]
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)
    assert logits[1].isnan().all()


def test_a_full_cache_refuses_before_it_writes(model: Decoder) -> None:
    cache = KVCache(model.config, 1, 10, torch.float32)
    plan = model.bind()
    with torch.inference_mode():
        model.run(plan, torch.tensor(prompts(8)[0]), Batch.appended(cache, [0], [8]))
    before = [layer.clone() for layer in cache.keys]
    with pytest.raises(TritiumError, match=r"row 0: 8 \+ 3 tokens do not fit the cache's 10"):
        Batch.appended(cache, [0], [3])
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True))
    assert cache.lengths == [8]
    with pytest.raises(TritiumError, match="a cache of 701 tokens exceeds the context length of 700"):
        KVCache(model.config, 1, 701, torch.float32)


def test_clear_starts_anew(model: Decoder) -> None:
    cache, plan, x = KVCache(model.config, 1, 30, torch.float32), model.bind(), torch.tensor(prompts(8)[0])
    with torch.inference_mode():
        first = model.run(plan, x, Batch.appended(cache, [0], [8]))[1]
        cache.clear()
        again = model.run(plan, x, Batch.appended(cache, [0], [8]))[1]
    assert torch.equal(first, again)
    assert cache.lengths == [8]


def test_use_backend_switches_a_loaded_model(model: Decoder) -> None:
    before = model.kernels
    assert model.use_backend("torch") is model
    assert model.kernels is before
    with pytest.raises(TritiumError, match="backend: unknown 'tritn'; did you mean triton"):
        model.use_backend("tritn")
    assert model.kernels is before
    assert tritium.load_model(model.config, device="cpu", backend="auto").kernels is not None
