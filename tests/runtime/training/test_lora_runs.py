"""Runs that train adapters: what is trained, what is written, and that it goes on to the bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tritium.runtime import cli
from tritium.runtime.training import config, trainer
from tritium.runtime.training.model import build_model

import tritium

from .conftest import records

Values = dict[str, Any]


@pytest.fixture
def tuning(values: Values, write: Callable[[Values], Path], tmp_path: Path) -> Values:
    """A configuration that trains adapters on what another run has left."""
    values["schedule"]["steps"] = 30
    assert trainer.train(write(values)) == 0
    del values["overrides"], values["data"]["tokenizer"]
    return {
        **values,
        "model": str(tmp_path / "run" / "last"),
        "output": str(tmp_path / "tuned"),
        "lora": {"rank": 4, "alpha": 32, "targets": ["c_attn", "c_fc"], "dropout": 0.1},
        "optimizer": {"learning_rate": 2.0e-2, "weight_decay": 0.0},
        "schedule": {"steps": 12},
        "checkpoint": {"every": 4, "keep": 9},
    }


def test_a_run_of_adapters(tuning: Values, write: Callable[[Values], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The loss goes down, the weights stay, and the folder holds the adapter and the merged model."""
    tuning["schedule"] = {"steps": 40}
    assert trainer.train(write(tuning)) == 0
    output = Path(tuning["output"])
    before, after = (records(run)[-1]["validation_loss"] for run in (output.parent / "run", output))
    assert after < before - 0.04
    state = load_file(output / "last" / "training" / "state.safetensors")
    trained = {name.removeprefix("parameter.") for name in state if name.startswith("parameter.")}
    layers = ("stack.layers.0.attention.qkv", "stack.layers.0.mlp.up")
    assert trained == {f"{layer}.adapter.{matrix}" for layer in layers for matrix in "ab"}

    base, tuned = load_file(Path(tuning["model"]) / "model.safetensors"), load_file(output / "last/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {"h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"}
    merged = tritium.load(output / "last", device="cpu", progress=False)[0]
    adapted = tritium.load(tuning["model"], device="cpu", progress=False)[0]
    tritium.load_adapter(adapted, output / "last" / "adapter")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens).logits, merged(tokens).logits, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert (
        cli.main(["generate", "--checkpoint", str(output / "last"), "--prompt", "7 green", "--max-new-tokens", "4"])
        == 0
    )
    assert capsys.readouterr().out.startswith("7 green")


def test_going_on_is_the_same_run(tuning: Values, write: Callable[[Values], Path], tmp_path: Path) -> None:
    assert trainer.train(write(tuning)) == 0
    whole = Path(tuning["output"])
    for step in ("step-00000008", "step-00000012"):
        shutil.copytree(whole / step, tmp_path / "kept" / step)
        shutil.rmtree(whole / step)
    assert trainer.train(write(tuning), resume=True) == 0
    for name in ("training/state.safetensors", "adapter/adapter_model.safetensors", "model.safetensors"):
        first, second = (load_file(root / "step-00000012" / name) for root in (tmp_path / "kept", whole))
        assert set(first) == set(second)
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], name
    tuning["lora"]["rank"] = 8
    with pytest.raises(tritium.TritiumError, match=r"--resume: lora\.rank was 4"):
        trainer.train(write(tuning), resume=True)


def test_without_merging_only_the_adapter_is_written(tuning: Values, write: Callable[[Values], Path]) -> None:
    tuning["lora"]["merge"] = False
    tuning["schedule"] = {"steps": 1}
    assert trainer.train(write(tuning)) == 0
    last = Path(tuning["output"]) / "last"
    assert not (last / "model.safetensors").exists()
    assert json.loads((last / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["c_attn", "c_fc"]


def test_the_frozen_weights_keep_their_dtype(tuning: Values, write: Callable[[Values], Path], tmp_path: Path) -> None:
    """A bfloat16 checkpoint stays so under float32 adapters; `freeze` leaves some of these as they are."""
    model = tritium.load(tuning["model"], device="cpu", progress=False)[0]
    tritium.save_pretrained(model, tmp_path / "half", "bfloat16")
    found = build_model(config.parse({**tuning, "model": str(tmp_path / "half"), "freeze": "*.adapter.a"}, "x"))[0]
    assert found.dtype == torch.bfloat16
    trained = {name: value.dtype for name, value in found.named_parameters() if value.requires_grad}
    assert trained == {
        "stack.layers.0.attention.qkv.adapter.b": torch.float32,
        "stack.layers.0.mlp.up.adapter.b": torch.float32,
    }
    again = build_model(config.parse({**tuning, "seed": 2}, "x"))[0]
    other = build_model(config.parse(tuning, "x"))[0]
    name = "stack.layers.0.mlp.up.adapter.a"
    assert not torch.equal(again.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "test: lora: rank: must be a whole number above 0"),
        ({"lora": {"ranks": 4}}, "test: lora: unknown key 'ranks'; did you mean rank"),
        ({"lora": {"targets": ["c_atn"]}}, "targets: no layer is called 'c_atn'; did you mean c_attn"),
        ({"parallel": {"shard": 2}}, "test: lora: is for whole replicas"),
        ({"parallel": {"tensor": 2}}, "test: lora: is for whole replicas"),
        ({"initialise": {}}, "lora: is for a checkpoint's weights"),
        ({"model": "models/gpt/small.yaml"}, "lora: is for a checkpoint's weights"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(tuning: Values, changes: Values, message: str) -> None:
    with pytest.raises(tritium.TritiumError, match=message):
        build_model(config.parse({**tuning, **changes}, "test"))
