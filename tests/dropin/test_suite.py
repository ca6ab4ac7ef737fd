"""The command that runs the tests of `transformers` against accelerated models sees what fails only with us."""

import subprocess
import sys
from pathlib import Path

from tests.dropin.suite import ROOT, only_with_us

TESTS = """
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

CONFIG = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16, n_positions=8)


def test_runs():
    GPT2LMHeadModel(CONFIG)(GPT2LMHeadModel(CONFIG).dummy_inputs["input_ids"] % 16)


def test_untouched():
    assert CONFIG._attn_implementation == GPT2Model(CONFIG).config._attn_implementation


def test_loaded(tmp_path):
    model = GPT2LMHeadModel(CONFIG)
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "tritium", "not ours"
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "tritium", "not loaded as ours"


def test_fails():
    assert False
"""


def test_what_ends_worse_is_found() -> None:
    """A skipped test that fails with us, and one that is no longer there; not what failed before or fares better."""
    before = {
        name: (end, "") for name, end in zip("abcde", ["passed", "skipped", "failed", "passed", "failed"], strict=True)
    }
    after = {name: (end, name) for name, end in zip("abce", ["failed", "failed", "failed", "passed"], strict=True)}
    assert only_with_us(before, after) == {"a": "a", "b": "b", "d": "it did not run"}


def test_a_checkout(tmp_path: Path) -> None:
    """One test fails only with us, one only as they are, which shows that models made and loaded are accelerated."""
    folder = tmp_path / "tests" / "models" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "test_modeling_gpt2.py").write_text(TESTS)
    command = [sys.executable, "-m", "tests.dropin.suite", str(tmp_path), "--models", "gpt2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    counts, with_us, *found = run.stdout.splitlines()
    assert counts == "gpt2 as they are: {'passed': 2, 'failed': 2}"
    assert with_us == "gpt2 accelerated: {'passed': 2, 'failed': 2}"
    assert len(found) == 1
    assert "fails only with us: tests.models.gpt2.test_modeling_gpt2::test_untouched" in found[0]
