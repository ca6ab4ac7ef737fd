"""The model and the tokenizer of a run are those that its configuration asks for."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from tritium.runtime.decoder import Decoder
from tritium.runtime.tokenizer import Tokenizer
from tritium.runtime.training import config, trainer
from tritium.runtime.training.model import build_model
from tritium.runtime.training.vocabulary import END, Vocabulary, of_folder, train_bpe

Values = dict[str, Any]
TEXTS = ["ten green bottles", "hanging on the wall"]


def built(values: Values, **changes: Any) -> Decoder:
    return build_model(config.parse({**copy.deepcopy(values), **changes}, "test"))[0]


def test_weights_are_drawn_from_the_seed(values: Values) -> None:
    """And with the residual projections, and only those, smaller by sqrt(2 layers)."""
    values["overrides"]["num_layers"] = 2
    plain = dict(built(values, initialise={"std": 0.5}).named_parameters())
    again = dict(built(values, initialise={"std": 0.5}).named_parameters())
    other = dict(built(values, initialise={"std": 0.5}, seed=2).named_parameters())
    scaled = dict(built(values, initialise={"std": 0.5, "scale_residual": True}).named_parameters())
    residual = {name for name in plain if name.endswith((".out.weight", ".down.weight"))}
    assert len(residual) == 4
    for name, value in plain.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, again[name])
        assert torch.equal(value, other[name]) == (value.dim() == 1)
        torch.testing.assert_close(scaled[name], value / 2 if name in residual else value, rtol=0, atol=0)
        if value.dim() > 1:
            assert value.std().item() == pytest.approx(0.5, rel=0.15)
    bound = (6 / (16 + 32)) ** 0.5
    xavier = dict(built(values, initialise={"method": "xavier"}).named_parameters())["stack.layers.0.mlp.up.weight"]
    assert 0.9 * bound < xavier.abs().max().item() < bound


def test_settings_reach_the_model(values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would break: an option is parsed and dropped."""
    model = built(values, backend="torch", batch_invariant=True)
    assert (model.backend.name, model.backend.modes.batch_invariant) == ("torch", True)
    assert not built(values).backend.modes.batch_invariant
    asked = []
    monkeypatch.setattr(Decoder, "enable_gradient_checkpointing", lambda self, *, keep: asked.append(keep))
    built(values)
    built(values, gradient_checkpointing="attention")
    assert asked == ["attention"]


def test_smoothing_and_z_loss_are_trained_with_and_not_measured(values: Values) -> None:
    def prepared(**loss: float) -> trainer.Run:
        return trainer.prepare(config.parse({**copy.deepcopy(values), "loss": loss}, "test"))

    plain, smooth, square = prepared(), prepared(label_smoothing=0.3), prepared(z_loss=0.1)
    measured = [trainer.evaluate(run) for run in (plain, smooth, square)]
    assert measured[0] == measured[1] == measured[2]
    (micro,) = plain.batches.at(0)
    with torch.no_grad():
        logits = plain.model(micro.tokens.view(4, 16)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, micro.labels)
    smoothed = torch.nn.functional.cross_entropy(logits, micro.labels, label_smoothing=0.3)
    squared = expected + 0.1 * logits.logsumexp(-1).square().mean()
    found = [trainer.train_step(run, 0).loss for run in (plain, smooth, square)]
    assert found == pytest.approx([expected.item(), smoothed.item(), squared.item()], rel=1e-5)
    assert len({round(value, 4) for value in found}) == 3


def test_a_document_opens_with_what_the_tokenizer_puts_before_a_text() -> None:
    vocabulary = train_bpe(TEXTS, 300)
    assert (vocabulary.opening, vocabulary.end) == (0, 0)
    fast = vocabulary.tokenizer.fast
    fast.add_special_tokens(["<s>"])
    fast.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", fast.token_to_id("<s>"))])
    assert vocabulary.opening == fast.token_to_id("<s>") != 0
    assert vocabulary.end == 0
    assert Vocabulary(Tokenizer(fast, eos_ids=[7, 9]), None).end == 7
    assert Vocabulary(Tokenizer(fast), None).end is None


def test_the_files_of_a_tokenizer_come_along(tmp_path: Path) -> None:
    """Those of a folder as they are, its weights and config.json not; one that was trained reads as it was."""
    made = train_bpe(TEXTS, 300)
    (tmp_path / "made").mkdir()
    made.save(tmp_path / "made")
    read = of_folder(tmp_path / "made")
    assert read.tokenizer.encode(TEXTS[0]) == made.tokenizer.encode(TEXTS[0])
    assert read.tokenizer.special == {"bos_token": END, "eos_token": END}
    assert read.tokenizer.eos_ids == (0,)
    (tmp_path / "made/generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.6}))
    for name in ("chat_template.jinja", "config.json", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / "made" / name).write_text("{}")
    (tmp_path / "copy").mkdir()
    read.save(tmp_path / "copy")
    copied = {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()}
    assert set(copied) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name, content in copied.items():
        assert content == (tmp_path / "made" / name).read_text()
