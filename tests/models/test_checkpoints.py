"""Checkpoints saved by `transformers`, loaded and run by the runtime, against `transformers` on the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from tritium.runtime.batch import Batch
from tritium.runtime.checkpoint import load_weights, read_spec
from tritium.runtime.decoder import Decoder
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.layers import MixtureOfExperts

import tritium
from tests import oracle

EXACT = {"atol": 1e-5, "rtol": 1e-5}


@dataclass
class Pair:
    """`transformers`' model and ours, from one folder."""

    case: oracle.Case
    directory: Path
    theirs: PreTrainedModel
    ours: Decoder

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.theirs(tokens).logits


@pytest.fixture(scope="module", params=oracle.CASES, ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = oracle.save(request.param, oracle.build(request.param), tmp_path_factory.mktemp("checkpoint"))
    theirs = oracle.build(request.param)
    ours, tokenizer, spec = tritium.load(directory, device="cpu")
    assert tokenizer is None
    assert spec.family == request.param.family
    return Pair(request.param, directory, theirs, ours)


def test_the_oracle_is_not_flat(pair: Pair) -> None:
    """Logits spread by at least one and no attention row is uniform: an all-but-constant model would prove nothing."""
    with torch.no_grad():
        out = pair.theirs(oracle.tokens(2, 30), output_attentions=True)
    assert out.logits.std(-1).mean() > 1
    weights = torch.stack(out.attentions)[..., -1, :]  # the last query's, over 30 keys
    assert weights.amax(-1).mean() > 3 / 30


def test_logits_equal(pair: Pair) -> None:
    x = oracle.tokens(3, 37)
    out = pair.ours(x)
    torch.testing.assert_close(out.logits, pair.logits(x), **EXACT)
    with torch.no_grad():
        body = pair.theirs.transformer if pair.case.family == "gpt" else pair.theirs.model
        hidden = body(x).last_hidden_state
    torch.testing.assert_close(out.hidden_states, hidden, **EXACT)


def test_loss_equal(pair: Pair) -> None:
    x = oracle.tokens(2, 21)
    labels = x.clone()
    labels[0, 5:9] = -100
    with torch.no_grad():
        expected = pair.theirs(x, labels=labels).loss
    torch.testing.assert_close(pair.ours(x, labels=labels).loss, expected, **EXACT)


def test_greedy_tokens_equal(pair: Pair) -> None:
    x = oracle.tokens(3, 11)
    expected = pair.theirs.generate(x, max_new_tokens=64, do_sample=False)
    assert torch.equal(pair.ours.generate(x, 64, temperature=0), expected)
    assert len(set(expected[0, 11:].tolist())) > 4  # not one token over and over


@pytest.mark.parametrize("chunks", [[29], [28, 1], [1] * 29, [5, 1, 1, 12, 10]], ids=str)
def test_cached_equals_full(pair: Pair, chunks: list[int]) -> None:
    """Prefill, chunked prefill and decode through the cache give the full forward's logits."""
    x = oracle.tokens(1, 29)
    expected = pair.logits(x)[0]
    cache = KVCache(pair.ours.config, 1, 40, torch.float32)
    plan, done = pair.ours.bind(), 0
    with torch.inference_mode():
        for count in chunks:
            batch = Batch.appended(cache, [0], [count])
            _, logits = pair.ours.run(plan, x[0, done : done + count], batch)
            torch.testing.assert_close(logits, expected[done : done + count], **EXACT)
            done += count
    assert cache.lengths == [29]


def test_ragged_batch_equals_single_runs(pair: Pair) -> None:
    """Rows of different lengths, one of a single token, generate what each generates alone."""
    prompts = [row[:length].tolist() for row, length in zip(oracle.tokens(4, 33), (33, 1, 8, 20), strict=True)]
    options = tritium.SamplingOptions(24, temperature=0)
    from tritium.runtime.generation import generate

    together = list(zip(*generate(pair.ours, prompts, options), strict=True))
    for prompt, row in zip(prompts, together, strict=True):
        alone = [new for (new,) in generate(pair.ours, [prompt], options)]
        assert list(row) == alone
        expected = pair.theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        assert alone == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pair: Pair, side: str) -> None:
    """Padded rows, whatever token pads them, equal each row alone, in logits and in generated tokens."""
    lengths, width = (17, 5, 12), 17
    x, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    rows = [oracle.tokens(1, length, seed=length)[0] for length in lengths]
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        x[index, place], mask[index, place] = row, 1
    x[mask == 0] = 7
    out = pair.ours(x, attention_mask=mask, labels=x)
    generated = pair.ours.generate(x, 10, temperature=0, attention_mask=mask)
    losses = []
    for index, row in enumerate(rows):
        expected = pair.logits(row.unsqueeze(0))[0]
        torch.testing.assert_close(out.logits[index][mask[index] == 1], expected, **EXACT)
        losses.append(torch.nn.functional.cross_entropy(expected[:-1], row[1:], reduction="sum"))
        alone = pair.theirs.generate(row.unsqueeze(0), max_new_tokens=10, do_sample=False)
        assert torch.equal(generated[index, width:], alone[0, len(row) :])
    assert not out.logits[mask == 0].any()
    torch.testing.assert_close(out.loss, torch.stack(losses).sum() / (sum(lengths) - 3), **EXACT)


def test_bfloat16_is_near_transformers(pair: Pair) -> None:
    """In bfloat16 both round at the same places: logits of a prefill and of decode steps differ by rounding only."""
    theirs = oracle.copied(pair.theirs, torch.bfloat16)
    ours, _, _ = tritium.load(pair.directory, dtype="bfloat16", device="cpu")
    assert ours.bind().layers[0].attention.rope_dtype == (
        torch.float32 if pair.case.rotates_in_float32 else torch.bfloat16
    )
    x = oracle.tokens(2, 15)
    with torch.inference_mode():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x).logits, expected, atol=0.5, rtol=0)
        assert (ours(x).logits - expected).abs().float().mean() < 0.05
        cache, plan = KVCache(ours.config, 2, 20, torch.bfloat16), ours.bind()
        ours.run(plan, x[:, :12].flatten(), Batch.appended(cache, [0, 1], [12, 12]))
        for step in range(12, 15):
            _, logits = ours.run(plan, x[:, step], Batch.appended(cache, [0, 1], [1, 1]))
            assert (logits - expected[:, step]).abs().float().mean() < 0.05


def test_layers_without_rotation(tmp_path: Path) -> None:
    """MobileLLM's no_rope_layers: a layer with 0 neither rotates nor normalises q and k, in prefill and decode."""
    case = oracle.Case("mobilellm", 6, 2, 16, tied=True)
    theirs = oracle.build(case, no_rope_layers=[1, 0, 1])
    theirs.save_pretrained(tmp_path)
    ours, _, spec = tritium.load(tmp_path, device="cpu")
    assert spec.rope_layers == spec.qk_norm_layers == (True, False, True)
    x = oracle.tokens(2, 21)
    with torch.no_grad():
        torch.testing.assert_close(ours(x).logits, theirs(x).logits, **EXACT)
    expected = theirs.generate(x, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours.generate(x, 20, temperature=0), expected)


def test_export_is_the_inverse_of_loading(pair: Pair, tmp_path: Path) -> None:
    """Saved again, the checkpoint opens in transformers with the very same tensors, and in one or many files."""
    tritium.save_pretrained(pair.ours, tmp_path / "single")
    tritium.save_pretrained(pair.ours, tmp_path / "sharded", shard_bytes=50_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected = oracle.own_layout(pair.case, dict(pair.theirs.named_parameters()))
    for name in ("single", "sharded"):
        found = oracle.again(pair.case, pair.theirs, tmp_path / name)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key
        assert read_spec(tmp_path / name) == pair.ours.config


def test_half_precision_is_the_rounded_checkpoint(pair: Pair) -> None:
    """dtype= converts each weight once, straight from the stream."""
    ours, _, _ = tritium.load(pair.directory, dtype="bfloat16", device="cpu")
    assert ours.dtype == torch.bfloat16
    for name, parameter in pair.ours.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter.to(torch.bfloat16)), name


@pytest.mark.parametrize("pair", [case for case in oracle.CASES if case.tied], indirect=True, ids=str)
def test_a_redundant_head_in_a_tied_checkpoint_is_ignored(pair: Pair, tmp_path: Path) -> None:
    """Published tied files may still hold lm_head.weight: the embedding is the head all the same."""
    from safetensors.torch import load_file, save_file

    tritium.save_pretrained(pair.ours, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = torch.zeros(oracle.VOCAB, pair.case.hidden)
    save_file(state, tmp_path / "model.safetensors")
    again, _, _ = tritium.load(tmp_path, device="cpu")
    x = oracle.tokens(1, 9)
    assert torch.equal(again(x).logits, pair.ours(x).logits)


# ---- Mutations: what is wrong by one tensor, one position or one swap must not pass the comparison above ----


VICTIMS = [
    oracle.Case("qwen3", 6, 2, 16, tied=False),
    oracle.Case("mobilellm", 6, 2, 16, tied=True),
    oracle.Case("mobilellm1", 6, 2, 8, tied=True, layers=2, what="shared"),
    oracle.Case("llama", 6, 2, 8, tied=False, what="biased"),
    oracle.Case("qwen2", 6, 2, 8, tied=True),
    oracle.Case("qwen1", 6, 6, 8, tied=False),
    oracle.Case("qwen3_moe", 6, 2, 16, tied=False),
    oracle.Case("gpt", 6, 6, 8, tied=True),
]


@pytest.fixture(scope="module", params=VICTIMS, ids=str)
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case = request.param
    theirs = oracle.build(case)
    directory = oracle.save(case, theirs, tmp_path_factory.mktemp("victim"))
    return Pair(case, directory, theirs, tritium.load(directory, device="cpu")[0])


def caught(pair: Pair, mutate: Callable[[Decoder], None]) -> bool:
    """Whether the logits comparison fails once `mutate` changed a fresh copy of our model."""
    with torch.device("meta"):
        mutant = Decoder(pair.ours.config)
    load_weights(mutant, pair.directory, progress=False)
    x = oracle.tokens(2, 19)
    expected = pair.logits(x)
    torch.testing.assert_close(mutant(x).logits, expected, **EXACT)
    with torch.no_grad():
        mutate(mutant)
        found = mutant(x).logits
    return not torch.allclose(found, expected, **EXACT)


def test_every_perturbed_tensor_is_caught(victim: Pair) -> None:
    """One part in a hundred on any single parameter shows."""
    for name, parameter in victim.ours.named_parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))

        def perturb(model: Decoder, name: str = name, noise: Tensor = noise) -> None:
            weight = model.get_parameter(name)
            weight += 0.01 * weight.std() * noise

        assert caught(victim, perturb), name


def _swap_gate_and_up(model: Decoder) -> None:
    mlp = model.stack.layers[1].mlp
    weight = mlp.up if isinstance(mlp, MixtureOfExperts) else mlp.up.weight
    weight.copy_(weight.roll(weight.shape[-2] // 2, -2))


def _swap_experts(model: Decoder) -> None:
    """The first two experts of one layer, for the router."""
    weight = model.stack.layers[1].mlp.router.weight
    weight[:2] = weight[:2].flip(0)


def _one_expert_less(model: Decoder) -> None:
    model.stack.layers[1].mlp.experts_per_token -= 1


def _weights_as_they_are(model: Decoder) -> None:
    model.stack.layers[1].mlp.renormalise = False


def _positions_shifted(model: Decoder) -> None:
    weight = model.position_embedding.weight
    weight.copy_(weight.roll(-1, 0))


def _another_activation(model: Decoder) -> None:
    model.stack.layers[0].mlp.activation = "gelu"  # exact instead of the tanh form


def _each_layer_once(model: Decoder) -> None:
    for block in model.stack.layers:
        block.repeats = 1


def _layers_in_turns(model: Decoder) -> None:
    """0, 1, 0, 1 instead of 0, 0, 1, 1."""
    _each_layer_once(model)
    model.stack.layers = torch.nn.ModuleList([*model.stack.layers, *model.stack.layers])


def _permute_kv_heads(model: Decoder) -> None:
    attention = model.stack.layers[1].attention
    heads = attention.qkv.weight.unflatten(0, (-1, attention.head_dim)).clone()
    first = attention.num_heads  # k heads first:first + kv, v heads after them
    heads[[first, first + 1, first + 2, first + 3]] = heads[[first + 1, first, first + 3, first + 2]]
    attention.qkv.weight.copy_(heads.flatten(0, 1))


def _swap_k_and_v(model: Decoder) -> None:
    attention = model.stack.layers[0].attention
    width = attention.num_kv_heads * attention.head_dim
    weight = attention.qkv.weight
    weight[-2 * width :] = weight[-2 * width :].roll(width, 0)


def _shift_frequencies(model: Decoder) -> None:
    rotary = model.stack.layers[0].attention.rotary
    rotary.table(torch.device("cpu")).copy_(rotary.table(torch.device("cpu")).roll(1, -1))


def _interleave_instead_of_halves(model: Decoder) -> None:
    attention = model.stack.layers[0].attention
    rows = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    weight = attention.qkv.weight
    weight[:rows] = weight[:rows].unflatten(0, (-1, 2, attention.head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _stretch_positions(model: Decoder) -> None:
    table = model.stack.layers[0].attention.rotary.table(torch.device("cpu"))
    table[10:] = table[9:-1].clone()  # every position from 10 on is one too small


def _wrong_eps(model: Decoder) -> None:
    for block in model.stack.layers:
        block.attention.norm_eps = 1e-2


GATED = {case.family for case in VICTIMS} - {"gpt"}
QK_NORM = {"qwen3", "mobilellm", "qwen3_moe"}
GROUPED = {case.family for case in VICTIMS if case.heads != case.kv_heads}
EVERY = GATED | {"gpt"}
MUTATIONS: dict[Callable[[Decoder], None], set[str]] = {  # -> the families that have what is mutated
    _swap_gate_and_up: GATED,
    _permute_kv_heads: GROUPED,
    _swap_k_and_v: EVERY,
    _shift_frequencies: GATED,
    _interleave_instead_of_halves: GATED,
    _stretch_positions: GATED,
    _wrong_eps: QK_NORM,
    _swap_experts: {"qwen3_moe"},
    _one_expert_less: {"qwen3_moe"},
    _weights_as_they_are: {"qwen3_moe"},
    _positions_shifted: {"gpt"},
    _another_activation: {"gpt"},
    _each_layer_once: {"mobilellm1"},
    _layers_in_turns: {"mobilellm1"},
}


def test_mutations_are_caught(victim: Pair) -> None:
    tried = [mutate for mutate, families in MUTATIONS.items() if victim.case.family in families]
    assert len(tried) >= 3
    assert [mutate.__name__ for mutate in tried if not caught(victim, mutate)] == []


def test_a_position_off_by_one_in_decode_is_caught(victim: Pair) -> None:
    """A decode step rotated for the next position differs from the full forward."""
    x = oracle.tokens(1, 12)
    cache = KVCache(victim.ours.config, 1, 20, torch.float32)
    plan = victim.ours.bind()
    with torch.inference_mode():
        victim.ours.run(plan, x[0, :11], Batch.appended(cache, [0], [11]))
        batch = Batch.appended(cache, [0], [1])
        batch.positions = batch.positions + 1
        _, logits = victim.ours.run(plan, x[0, 11:], batch)
    assert not torch.allclose(logits[0], victim.logits(x)[0, 11], **EXACT)
