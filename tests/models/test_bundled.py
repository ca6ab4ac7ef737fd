"""The bundled model: its stated figures are true, and it runs on the same way as any checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Llama4ForCausalLM
from tritium.models.mobilellm.shakespeare import evaluate
from tritium.runtime.loading import BUNDLED
from tritium.runtime.registry import get_family

import tritium

FOLDER = Path(evaluate.__file__).resolve().parent


@pytest.fixture(scope="module")
def loaded() -> tuple[tritium.Decoder, tritium.Tokenizer, tritium.ModelSpec]:
    model, tokenizer, spec = tritium.load(BUNDLED, device="cpu")
    assert tokenizer is not None
    return model, tokenizer, spec


def test_held_out_figures_are_what_the_files_give(loaded: tuple) -> None:
    """Bits per byte of the whole held-out part, computed again: as stated, and better than both 5-gram models."""
    stated = json.loads((FOLDER / "results.json").read_text())["held_out_bits_per_byte"]
    training, held_out = evaluate.split_text((FOLDER / "tinyshakespeare.txt").read_bytes())
    assert len(held_out) / len(training + held_out) == pytest.approx(0.1, abs=1e-4)
    bits = evaluate.bits_per_byte(loaded[0], loaded[1], held_out)
    assert bits == pytest.approx(stated["model"], abs=0.003)
    ngrams = evaluate.baselines(loaded[1], training, held_out)
    for name, value in ngrams.items():
        assert value == pytest.approx(stated[name], abs=1e-6)
    assert bits < 0.97 * min(ngrams.values())
    assert loaded[0].num_parameters() == 2_877_888


def test_the_size_file_is_the_checkpoint(loaded: tuple) -> None:
    assert get_family("mobilellm").spec("shakespeare") == loaded[2]
    assert (FOLDER / "model.safetensors").stat().st_size < 12_000_000


def test_transformers_opens_it(loaded: tuple) -> None:
    """The same logits, the same token ids, the same greedy continuation."""
    theirs = Llama4ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = loaded[1].encode("JULIET:\nWhat light through yonder window breaks?")
    assert ids == AutoTokenizer.from_pretrained(FOLDER)("JULIET:\nWhat light through yonder window breaks?").input_ids
    x = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(loaded[0](x).logits, theirs(x).logits, atol=1e-4, rtol=1e-5)
    expected = theirs.generate(x, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert torch.equal(loaded[0].generate(x, 30, temperature=0), expected)


def test_text(loaded: tuple) -> None:
    """A seed repeats a text; streamed pieces join to it; it looks like a play."""
    generator = tritium.TextGenerator(loaded[0], loaded[1], device="cpu")
    text = generator.generate("ROMEO:", max_new_tokens=80, seed=4)
    assert text == "".join(generator.generate("ROMEO:", max_new_tokens=80, seed=4, stream=True))
    assert text != generator.generate("ROMEO:", max_new_tokens=80, seed=5)
    assert sum(word in text.lower() for word in ("the", "and", "thou", "you", "my", "i", "to", "of")) >= 4
    cut = generator.generate("ROMEO:", max_new_tokens=80, seed=4, stop=["\n"])
    assert cut == text.split("\n")[0]


def test_tokenizer_round_trips_any_text(loaded: tuple) -> None:
    for text in ("ROMEO:\nO!", "naïve 中文 😀\t\r\n  x", "def f(x):\n    return x", " leading", ""):
        assert loaded[1].decode(loaded[1].encode(text)) == text
