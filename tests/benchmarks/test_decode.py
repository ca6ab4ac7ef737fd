"""The decode benchmark measures what it says: right tokens first, every weight in the floor, figures in the file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tritium.benchmarks import __main__ as command
from tritium.benchmarks import decode
from tritium.benchmarks.harness import Timing
from tritium.runtime.decoder import Decoder

SHAPE = {
    "embedding_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 48, "vocab_size": 64,
}  # fmt: skip


def test_the_command_writes_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": SHAPE})
    monkeypatch.setattr(decode, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "decode", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    assert command.main() == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert decode.summary(record) in capsys.readouterr().out
    assert [row["batch"] for row in record["results"]] == [1, 8]
    assert record["environment"]["versions"]["torch"] == torch.__version__
    for row in record["results"]:
        assert row["step_over_matmuls"] == pytest.approx(row["step_us"]["p50"] / row["matmuls_us"]["p50"])
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / row["transformers_tokens_per_second"])


def test_wrong_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The correctness gate: a disturbed peer stops the benchmark."""
    model = decode.build(SHAPE, torch.device("cpu"))
    twin = decode.transformers_twin(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.add_(1.0)
    with pytest.raises(ValueError, match="greedy tokens differ"):
        decode._measure(model, twin, 1, torch.device("cpu"))


def test_the_floor_multiplies_by_every_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decode.build(SHAPE, torch.device("cpu"))
    seen: list[int] = []
    monkeypatch.setattr(decode.F, "linear", lambda x, weight: seen.append(weight.data_ptr()) or x)
    decode.floor_step(model, 2)()
    matrices = [parameter.data_ptr() for parameter in model.parameters() if parameter.dim() == 2]
    assert sorted(seen) == sorted(matrices)


def test_a_step_is_the_decode_of_the_runtime() -> None:
    """Steps follow the greedy tokens of generate, also after the cache began again."""
    model: Decoder = decode.build(SHAPE, torch.device("cpu"))
    prompt = torch.randint(0, 64, (2, decode.PROMPT))
    expected = model.generate(prompt, decode.STEPS, temperature=0)[:, decode.PROMPT :]
    step = decode.decode_step(model, prompt)
    state = next(cell.cell_contents for cell in step.__wrapped__.__closure__ if isinstance(cell.cell_contents, dict))
    assert torch.equal(state["tokens"], expected[:, 0])
    for index in range(1, decode.STEPS):
        step()
        assert torch.equal(state["tokens"], expected[:, index])
    for _ in range(decode.STEPS):
        step()


def test_percentiles() -> None:
    assert Timing.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Timing(2.0, 3.0, 5.0)
