"""Positions beyond the trained length: the scaling rules' tables, and what a row's frequencies may depend on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Qwen2ForCausalLM, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2 import modeling_qwen2
from tritium.runtime.batch import Batch
from tritium.runtime.checkpoint import read_spec
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.hf_config import config_from_spec
from tritium.runtime.kv_cache import KVCache
from tritium.runtime.registry import get_family
from tritium.runtime.rope import RopeScaling, RotaryEmbedding, inverse_frequencies

import tritium
from tests import oracle

CPU = torch.device("cpu")
POSITIONS = [1, 8_000, 40_000, 131_071]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32768}


def theirs(rule: dict[str, Any], head_dim: int, base: float, length: int | None = None) -> tuple[Tensor, float]:
    """`transformers`' frequencies and factor, for a sequence of `length`."""
    kind = LlamaConfig if rule["rope_type"] == "llama3" else Qwen3Config
    limit = 32768 if rule["rope_type"] == "dynamic" else 131072
    config = kind(
        head_dim=head_dim,
        max_position_embeddings=limit,
        rope_parameters={"rope_theta": base, **{k: v for k, v in rule.items() if limit == 131072 or k != "original"}},
    )
    return ROPE_INIT_FUNCTIONS[rule["rope_type"]](config, CPU, seq_len=length)


@pytest.mark.parametrize(
    ("rule", "head_dim", "base", "prompt"),
    [(YARN, 128, 1e6, 131_072), (LLAMA3, 64, 5e5, 9), *((DYNAMIC, 128, 1e6, n) for n in (9, 32768, 40_001, 131_072))],
)
def test_tables_equal_transformers(rule: dict[str, Any], head_dim: int, base: float, prompt: int) -> None:
    """cos and sin at positions near and far; float32 angles of 131,071 radians resolve to 0.008, and are the same."""
    scaling = RopeScaling.parse(dict(rule), "test")
    rotary = RotaryEmbedding(head_dim, base, 131_072, scaling)
    table = rotary.table(CPU, (rotary.stretch(prompt),))
    frequencies, factor = theirs(rule, head_dim, base, prompt)
    angles = torch.tensor(POSITIONS, dtype=torch.float32)[:, None] * frequencies
    torch.testing.assert_close(table[POSITIONS, 0], angles.cos() * factor, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(table[POSITIONS, 1], angles.sin() * factor, rtol=1e-6, atol=1e-7)
    plain = inverse_frequencies(head_dim, base)[0]
    assert torch.equal(frequencies, plain) == (rule is DYNAMIC and prompt <= 32768)


@pytest.mark.parametrize(
    ("trained", "prompt", "alpha", "base"),
    [
        (8192, 1, 1, 10000.0),
        (8192, 8192, 1, 10000.0),
        (8192, 8193, 3, 30527.7367488),
        (8192, 16384, 3, 30527.7367488),
        (8192, 16385, 7, 72195.8600865),
        (8192, 32768, 7, 72195.8600865),
        (8192, 32769, 15, 156588.323457),
        (2048, 2048, 1, 10000.0),
        (2048, 2049, 3, 30527.7367488),
        (2048, 4097, 7, 72195.8600865),
    ],
)
def test_qwen1_stretch(trained: int, prompt: int, alpha: float, base: float) -> None:
    """The reference's alpha and the base that it makes of 10000 for heads of 128."""
    scaling = RopeScaling.parse({"rope_type": "qwen_ntk", "original_max_position_embeddings": trained}, "test")
    assert scaling.stretch(prompt) == alpha
    found, _ = inverse_frequencies(128, 1e4, scaling, scaling.stretch(prompt))
    exponent = torch.arange(0, 128, 2, dtype=torch.float64) / 128
    torch.testing.assert_close(found.double(), base**-exponent, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("trained", "position", "factor"),
    [
        (8192, 0, 1.0),
        (8192, 8191, 1.0),
        (8192, 8192, 1.00001354611),
        (8192, 16383, 1.07692307692),
        (8192, 32766, 1.15384266706),
        (2048, 4095, 1.09090909091),
    ],
)
def test_qwen1_log_n(trained: int, position: int, factor: float) -> None:
    scale = RotaryEmbedding(8, 1e4, 32768, None, trained).query_scale(CPU)
    assert scale is not None
    assert float(scale[position]) == pytest.approx(factor, rel=2e-7)
    assert RotaryEmbedding(8, 1e4, 64).query_scale(CPU) is None


def test_tables_are_kept_within_bounds() -> None:
    """Prompts of ever new lengths make ever new tables: the oldest go."""
    rotary = RotaryEmbedding(8, 1e4, 64, RopeScaling.parse({**DYNAMIC, "original_max_position_embeddings": 16}, "test"))
    for prompt in range(17, 60):
        rotary.table(CPU, (rotary.stretch(prompt),))
    assert len(rotary._tables) == RotaryEmbedding.KEPT


# Whole models. The trained length is 128 in the oracle's Qwen1.

QWEN1 = next(case for case in oracle.CASES if case.family == "qwen1")
LONG = 150  # alpha 3


@pytest.fixture(scope="module")
def qwen1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Qwen2ForCausalLM]:
    model = oracle.build(QWEN1)
    return tritium.load(oracle.save(QWEN1, model, tmp_path_factory.mktemp("qwen1")), device="cpu")[0], model


def reference_beyond(model: Qwen2ForCausalLM, monkeypatch: pytest.MonkeyPatch, alpha: float) -> Qwen2ForCausalLM:
    """`transformers`' Qwen2 on the same weights, with the stretched base and a query scaled by its position."""
    base = 1e4 * alpha ** (QWEN1.head_dim / (QWEN1.head_dim - 2))
    config = type(model.config).from_dict({**model.config.to_dict(), "rope_parameters": None})
    config.rope_parameters = {"rope_type": "default", "rope_theta": base}
    config._attn_implementation = "eager"
    stretched = Qwen2ForCausalLM(config).eval()
    stretched.load_state_dict(model.state_dict())
    plain = modeling_qwen2.eager_attention_forward

    def scaled(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        ends = torch.arange(1, query.shape[2] + 1, dtype=torch.float64)
        factor = (ends.log() / torch.tensor(128.0, dtype=torch.float64).log()).clamp(min=1).float()
        return plain(module, query * factor[:, None], *args, **kwargs)

    monkeypatch.setattr(modeling_qwen2, "eager_attention_forward", scaled)
    return stretched


@pytest.mark.parametrize(("length", "alpha"), [(128, 1.0), (129, 3.0), (LONG, 3.0), (300, 7.0)])
def test_qwen1_beyond_its_trained_length(
    qwen1: tuple[Decoder, Qwen2ForCausalLM], monkeypatch: pytest.MonkeyPatch, length: int, alpha: float
) -> None:
    ours, model = qwen1
    x = oracle.tokens(1, length)
    reference = reference_beyond(model, monkeypatch, alpha)
    with torch.inference_mode():
        found, expected = ours(x).logits, reference(x).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    unstretched = reference_beyond(model, monkeypatch, 1.0)
    if alpha > 1:
        assert not torch.allclose(found, unstretched(x).logits, atol=1e-2)


def logits_in_pieces(model: Decoder, tokens: Tensor, pieces: list[int], prompt: int) -> Tensor:
    cache = KVCache(model.config, 1, 320, torch.float32)
    done, found = 0, []
    with torch.inference_mode():
        for count in pieces:
            batch = Batch.appended(cache, [0], [count], [prompt])
            found.append(model.run(model.bind(), tokens[0, done : done + count], batch)[1])
            done += count
    return torch.cat(found)


def test_qwen1_frequencies_are_the_prompts(qwen1: tuple[Decoder, Qwen2ForCausalLM]) -> None:
    """In pieces or whole, a prompt has one alpha; tokens that follow keep it, even across the trained length."""
    model, _ = qwen1
    x = oracle.tokens(1, LONG)
    with torch.inference_mode():
        whole = model(x).logits[0]
    torch.testing.assert_close(logits_in_pieces(model, x, [40, 100, 10], LONG), whole, atol=2e-5, rtol=1e-5)
    # 120 tokens of prompt, then 30 one by one: alpha stays 1, as if the model had no dynamic NTK.
    plain = Decoder(model.config.replace(rope_scaling=None)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.inference_mode():
        kept = plain(x).logits[0]
    torch.testing.assert_close(logits_in_pieces(model, x, [120] + [1] * 30, 120), kept, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(kept, whole, atol=1e-2)


def test_a_batch_changes_no_row(qwen1: tuple[Decoder, Qwen2ForCausalLM]) -> None:
    """Rows of alphas 1, 3 and 7 together: each its own, prefilled, continued in place and padded."""
    model, _ = qwen1
    rows = [oracle.tokens(1, length, seed=length)[0].tolist() for length in (20, LONG, 126, 300)]
    options = SamplingOptions(8, temperature=0)
    together = list(zip(*generate(model, rows, options), strict=True))
    for row, continued in zip(rows, together, strict=True):
        assert [new for (new,) in generate(model, [row], options)] == list(continued)
    width = max(map(len, rows))
    x = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        padded = model(x, attention_mask=mask).logits
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(padded[index, width - len(row) :], alone, atol=2e-5, rtol=1e-5)


def stretched_to(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    config = config_from_spec(get_family("qwen3"), get_family("qwen3").spec("0.6B"))
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_yarn_as_the_model_cards_prescribe_it(tmp_path: Path) -> None:
    """The cards add rope_scaling and leave max_position_embeddings at 40960: the context is 131,072 all the same."""
    old = {"rope_theta": 1e6, "rope_parameters": None, "rope_scaling": YARN}
    for change in ({**old}, {"rope_parameters": {"rope_theta": 1e6, **YARN}}):
        spec = read_spec(stretched_to(tmp_path, lambda config, change=change: config.update(change)))
        assert spec.context_length == 131_072
        assert spec.rope_scaling == RopeScaling.parse(dict(YARN), "test")
    overridden = read_spec(stretched_to(tmp_path, lambda config: None), {"rope_scaling": YARN})
    assert overridden == spec
    assert read_spec(tmp_path).rope_scaling is None


def test_dynamic_ntk_of_a_checkpoint(tmp_path: Path) -> None:
    """Its max_position_embeddings is the trained length; and it survives saving."""
    rule = {"rope_type": "dynamic", "factor": 4.0}
    directory = stretched_to(tmp_path, lambda config: config.update(rope_parameters={"rope_theta": 1e6, **rule}))
    spec = read_spec(directory)
    assert spec.context_length == 4 * 40960
    assert spec.rope_scaling is not None
    assert dict(spec.rope_scaling.values)["original_max_position_embeddings"] == 40960
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(get_family("qwen3"), spec)), encoding="utf-8")
    assert read_spec(tmp_path) == spec


def test_dynamic_ntk_gives_transformers_logits(tmp_path: Path) -> None:
    """A prompt longer than the trained length, in `transformers` and here."""
    case = oracle.Case("qwen3", 4, 2, 16, tied=True)
    rule = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}
    model = oracle.build(case, rope_parameters=rule, max_position_embeddings=32)
    ours, _, spec = tritium.load(oracle.save(case, model, tmp_path), device="cpu")
    assert spec.context_length == 96
    for length in (30, 40, 77):
        x = oracle.tokens(2, length)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x).logits, model(x).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rope_type": "qwen_ntk"}, "lacks original_max_position_embeddings"),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 0}, "must be above 0"),
        ({"rope_type": "ntk"}, "unknown rope_type 'ntk'"),
    ],
)
def test_wrong_rules_say_what_is_wrong(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(TritiumError, match=message):
        RopeScaling.parse(rule, "test")
