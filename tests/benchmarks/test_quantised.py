"""What quantisation costs: the figures are of the text that they name, bounds hold, and a worse model would show."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import quantised
from tritium.benchmarks.harness import ROOT
from tritium.models.mobilellm.shakespeare import evaluate
from tritium.runtime.loading import BUNDLED

import tritium

TEXT = evaluate.split_text((evaluate.HERE / "tinyshakespeare.txt").read_bytes())[1]
BOUNDS = {  # of nats a token, of any one token, of bits a byte lost, and of tokens whose best is another
    "int8": (1e-4, 2e-3, 5e-4, 0.02),
    "int4": (6e-3, 0.3, 5e-3, 0.08),
}


def within(row: dict[str, Any], scheme: str) -> None:
    divergence, largest, bits, others = BOUNDS[scheme]
    assert 0 < row["divergence"] < divergence
    assert row["divergence"] < row["largest_divergence"] < largest
    assert abs(row["bits_per_byte"] - row["dense_bits_per_byte"]) < bits
    assert row["same_best"] > 1 - others


@pytest.mark.parametrize("scheme", BOUNDS)
def test_quality(scheme: str) -> None:
    """On a part of the held-out text; a bound of 4 bits would not do for 8, nor one of 8 for 4."""
    row = quantised.measure(scheme, TEXT[:3000])
    within(row, scheme)
    worse = row["divergence"] > BOUNDS["int8"][0]
    assert worse == (scheme == "int4")


@pytest.mark.parametrize("scheme", BOUNDS)
def test_the_committed_figures(scheme: str) -> None:
    """Those of the whole held-out text, beside the bundled model's own."""
    record = json.loads((ROOT / "benchmarks/results/cpu-quantised.json").read_text())
    row = next(row for row in record["results"] if row["scheme"] == scheme)
    within(row, scheme)
    stated = json.loads((evaluate.HERE / "results.json").read_text())
    assert row["tokens"] == stated["tokens"]["held_out"]
    assert row["dense_bits_per_byte"] == pytest.approx(stated["held_out_bits_per_byte"]["model"], abs=0.003)


def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantised, "BYTES", 500)
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "quantised", "--json", str(path)])
    assert command.main() == 0
    shown = quantised.summary(json.loads(path.read_text()))
    assert shown in capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["bfloat16", "int8", "int4"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "show", "--json", str(path)])
    assert command.main() == 0
    assert capsys.readouterr().out.strip() == shown


def test_the_comparison_sees_what_is_off() -> None:
    """Nothing between a model and itself; by hand, what a constant factor on the logits costs, over two windows."""
    model, tokenizer, _ = tritium.load(BUNDLED, device="cpu", dtype="float32", backend="torch", progress=False)
    other = tritium.load(BUNDLED, device="cpu", dtype="float32", backend="torch", progress=False)[0]
    assert tokenizer is not None
    ids = evaluate.encode(tokenizer, TEXT[:300])
    same = quantised.compared(model, other, ids, window=64)
    assert same["divergence"] == same["largest_divergence"] == 0
    assert same["same_best"] == 1
    assert same["nats"] * len(ids) == pytest.approx(evaluate.nats(model, ids, 64), rel=1e-6)
    with torch.no_grad():
        other.stack.norm.weight *= 1.5
    found = quantised.compared(model, other, ids, window=64)
    p, q = [], []
    for logits, _ in evaluate.predictions(model, ids, 64):
        p.append(logits.double().log_softmax(-1))
        q.append((1.5 * logits.double()).log_softmax(-1))
    by_hand = (torch.cat(p).exp() * (torch.cat(p) - torch.cat(q))).sum(-1)
    assert found["divergence"] == pytest.approx(by_hand.mean().item(), rel=1e-4)
    assert found["largest_divergence"] == pytest.approx(by_hand.max().item(), rel=1e-4)
    assert found["same_best"] == 1
