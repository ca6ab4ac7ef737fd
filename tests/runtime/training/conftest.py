"""A run that is over in a second: a GPT with one narrow layer, on the characters of a few lines."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tritium.runtime.training import log

TEXT = "".join(f"{number} green bottles hanging on the wall,\n" for number in range(120))
LETTERS = len(set(TEXT))
NARROW = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "embedding_dim": 16, "hidden_dim": 32}


@pytest.fixture(autouse=True)
def quick_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate that MFU divides by is measured for 0.2 seconds: here not at all."""
    monkeypatch.setattr(log, "MEASURED", 1e-9)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """What a configuration file holds; tests change it."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return {
        "model": "models/gpt/small.yaml",
        "overrides": {**NARROW, "vocab_size": LETTERS, "context_length": 32},
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "compute_dtype": "float32",
        "data": {
            "train": str(tmp_path / "text.txt"),
            "validation": {"fraction": 0.1},
            "tokenizer": "characters",
            "sequence_length": 16,
            "batch_size": 4,
        },
        "optimizer": {"learning_rate": 1.0e-2},
        "schedule": {"steps": 6},
        "log": {"every": 1},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a configuration file and gives its path."""

    def written(values: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return written


def records(output: str | Path) -> list[dict[str, Any]]:
    """The log, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("tokens_per_second", "mfu")} for line in lines]
