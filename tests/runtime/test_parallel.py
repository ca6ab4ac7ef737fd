"""Several processes do what one does: data-parallel, sharded and tensor-parallel runs over gloo, under torchrun.

A start of torchrun costs seconds, so that a few starts do the work of all tests. Every parameter of the models is
redrawn: biases of zero and norms of one would hide that they are added twice or summed wrongly. Two processes sum in
another order than one, nothing else: what a step gives agrees to a few roundings of float32, 1e-5 of its size. AdamW
divides a gradient by its own size, down to `eps`: with the usual one, where a gradient is nothing but rounding (that of
a key's bias, which softmax takes out again) the weights would move by what is different, so here it is larger.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tritium.runtime import cli, errors
from tritium.runtime.batch import Batch
from tritium.runtime.checkpoint import save_pretrained
from tritium.runtime.errors import TritiumError
from tritium.runtime.loading import load_config, load_model
from tritium.runtime.parallel import mesh
from tritium.runtime.parallel.exchange import Exchange
from tritium.runtime.parallel.tensor import Split, local_spec, splits
from tritium.runtime.spec import ModelSpec
from tritium.runtime.training import state

from tests.rule import DEVICE

WORKER = Path(__file__).with_name("parallel_worker.py")
TEXT = "".join(f"{number} green bottles hanging on the wall,\n" for number in range(120))
SIZES = {
    **{"num_layers": 2, "embedding_dim": 24, "hidden_dim": 40, "num_heads": 4, "head_dim": 8, "context_length": 32},
    **{"vocab_size": len(set(TEXT)), "dropout": 0.2},
}
MODELS = {  # family: (a size of it, how it is made small)
    "qwen3": ("models/qwen3/0.6B.yaml", {"num_kv_heads": 2, "tie_embeddings": True, "layer_repeat": 2}),
    "gpt": ("models/gpt/small.yaml", {"num_kv_heads": 4, "residual": "post_norm"}),
    "mixture": (
        "models/qwen3/30B-A3B.yaml",
        {"num_kv_heads": 2, "num_experts": 5, "experts_per_token": 2, "expert_dim": 12},
    ),
}
TWO = ("data", "shard", "tensor")
FOUR = {"data_tensor": {"data": 2, "tensor": 2}, "shard_tensor": {"shard": 2, "tensor": 2}, "data_shard": {"shard": 2}}
STEPS, SAVED = 5, 3
WAIT = 600  # seconds for what takes a few on a machine that does nothing else


def small_spec(family: str) -> ModelSpec:
    path, changes = MODELS[family]
    return load_config(path).replace(**{**SIZES, **changes})


def write_model(folder: Path, family: str) -> None:
    model = load_model(small_spec(family), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_pretrained(model, folder, layout="tritium")


def write_config(folder: Path, family: str, name: str, **changes: Any) -> Path:
    """The file of a run that is to be called `name`."""
    values = {
        "model": str(folder / family),
        "output": str(folder / f"{family}.{name}"),
        "device": "cpu",
        "compute_dtype": "float32",
        "data": {
            "train": str(folder / "text.txt"),
            "validation": {"fraction": 0.03},  # an odd number of micro-batches
            "tokenizer": "characters",
            "sequence_length": 16,
            "batch_size": 2,
            "accumulation": 4,
        },
        "optimizer": {"learning_rate": 3.0e-3, "clip": 0.5, "average": 4, "eps": 1.0e-5},
        "schedule": {"steps": STEPS, "decay": "constant"},
        "checkpoint": {"every": SAVED, "dtype": "float32"},
        "evaluation": {"every": SAVED},
        "log": {"every": 1},
    }
    path = folder / f"{family}.{name}.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return path


def launch(folder: Path, name: str, jobs: list[dict[str, Any]], processes: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / f"{name}.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    how = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *how, str(WORKER), str(folder / f"{name}.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            out, err = process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # and it ends those that it started
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def answers(folder: Path, name: str, rank: int) -> list[Any]:
    found: list[Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def train(path: Path, *options: str) -> dict[str, Any]:
    return {"arguments": ["train", str(path), *options]}


def cut_short(folder: Path, family: str, name: str, copy: str) -> Path:
    """A copy of a run that ended after the checkpoint of step SAVED, and its configuration."""
    output = folder / f"{family}.{copy}"
    shutil.copytree(folder / f"{family}.{name}", output, symlinks=True)
    shutil.rmtree(state.folder_of(output, STEPS))
    return write_config(folder, family, copy)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs. Where pytest itself has several processes, the first to come makes it for all."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make_runs(base / "parallel")
    shared, ready = base.parent / "parallel", base.parent / "parallel.ready"
    if claim(base.parent / "parallel.claimed"):
        make_runs(shared)
        ready.touch()
    deadline = time.monotonic() + WAIT
    while not ready.exists():
        assert time.monotonic() < deadline, "the process that was to make the runs did not"
        time.sleep(0.2)
    return shared


def claim(path: Path) -> bool:
    """Whether this process is the first that claims a name."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def make_runs(folder: Path) -> Path:
    """Each family alone and in two processes, each way; one run that is killed; some that are resumed."""
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for family in MODELS:
        write_model(folder / family, family)
        assert cli.main(["train", str(write_config(folder, family, "alone"))]) == 0
    jobs = [train(write_config(folder, family, way, parallel={way: 2})) for family in MODELS for way in TWO]
    # All but the last as they should be; in the last, one process is killed when the first save is behind.
    killed = write_config(folder, "qwen3", "killed", parallel={"shard": 2})
    jobs.append({**train(killed), "crash": {"rank": 1, "step": SAVED}})
    ended = launch(folder, "first", jobs)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert state.saved_steps(folder / "qwen3.killed") == [SAVED], ended.stderr[-3000:]

    prompt = ["--prompt", "12 green", "--device", "cpu", "--max-new-tokens", "16", "--tensor-parallel", "2"]
    text = [
        {"arguments": ["generate", "--checkpoint", str(folder / f"{family}.alone" / "last"), *prompt, *how]}
        for family in MODELS
        for how in (["--temperature", "0"], ["--seed", "7"])
    ]
    unseeded = {"folder": str(folder / "qwen3"), "max_new_tokens": 16, "temperature": 2.0}
    jobs = [
        train(killed, "--resume"),
        train(cut_short(folder, "gpt", "alone", "taken_up"), "--resume", "--set", "parallel.tensor=2"),
        train(cut_short(folder, "mixture", "alone", "taken_up"), "--resume", "--set", "parallel.shard=2"),
        *text,
        {"generate": unseeded},
    ]
    ended = launch(folder, "second", jobs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def state_of(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(state.folder_of(output, step) / "training/state.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Step by step the same losses and gradients, and the same weights, moments, averages and model in the end."""
    ours, theirs = records(found), records(expected)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3, 3, 4, 5, 5]
    for one, two in zip(ours, theirs, strict=True):
        assert set(one) == set(two)
        for name in set(one) - {"tokens_per_second", "mfu"}:
            assert one[name] == pytest.approx(two[name], rel=1e-5), (one["step"], name)
    assert_same_tensors(state_of(found), state_of(expected))
    models = [load_file(state.folder_of(output, STEPS) / "model.safetensors") for output in (found, expected)]
    assert_same_tensors(*models)


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of each tensor's largest entry."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if ".qkv.bias" in name:  # a key's bias changes nothing: its gradient is rounding alone, about 1e-9
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
        else:
            assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("way", TWO)
@pytest.mark.parametrize("family", MODELS)
def test_two_processes_are_one(runs: Path, family: str, way: str) -> None:
    """With dropout, accumulation, clipping and averages, on models whose every parameter counts."""
    assert_same_run(runs / f"{family}.{way}", runs / f"{family}.alone")


def test_the_runs_train(runs: Path) -> None:
    """Else the comparisons would compare little: every parameter moved in every run, and clipping was at work."""
    for family in MODELS:
        before, after = state_of(runs / f"{family}.alone", SAVED), state_of(runs / f"{family}.alone")
        moved = [name for name in after if name.startswith("parameter.") and not torch.equal(after[name], before[name])]
        assert len(moved) == sum(name.startswith("parameter.") for name in after)
        assert all(line["gradient_norm"] > 0.5 for line in records(runs / f"{family}.alone") if "loss" in line)


def test_a_killed_process_ends_the_run_and_a_resumed_one_is_the_uninterrupted(runs: Path) -> None:
    """Bit for bit, in the same number of processes."""
    found, expected = state_of(runs / "qwen3.killed"), state_of(runs / "qwen3.shard")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    timeless = ("step", "loss", "gradient_norm", "validation_loss", "tokens")
    ours, theirs = (
        [[line.get(name) for name in timeless] for line in records(runs / run)]
        for run in ("qwen3.killed", "qwen3.shard")
    )
    assert ours == theirs


@pytest.mark.parametrize("family", ["gpt", "mixture"])
def test_two_processes_take_up_the_run_of_one(runs: Path, family: str) -> None:
    assert_same_run(runs / f"{family}.taken_up", runs / f"{family}.alone")


@pytest.mark.parametrize(("family", "way"), [("qwen3", "tensor"), ("mixture", "tensor"), ("gpt", "shard")])
def test_one_process_takes_up_the_run_of_two(runs: Path, family: str, way: str) -> None:
    path = cut_short(runs, family, way, f"{way}_to_one")
    assert cli.main(["train", str(path), "--resume"]) == 0
    assert_same_run(runs / f"{family}.{way}_to_one", runs / f"{family}.alone")


def test_two_processes_generate_what_one_does(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy and sampled, the tokens of one; the second process is silent."""
    first, second = (answers(runs, "second", rank)[3:9] for rank in (0, 1))
    asked = [job["arguments"] for job in json.loads((runs / "second.json").read_text())[3:9]]
    expected = []
    for arguments in asked:
        at = arguments.index("--tensor-parallel")
        assert cli.main(arguments[:at] + arguments[at + 2 :]) == 0
        expected.append(capsys.readouterr().out)
    assert len(set(expected)) == 6
    assert first == expected
    assert second == [""] * 6


def test_without_a_seed_all_processes_draw_the_same(runs: Path) -> None:
    first, second = (answers(runs, "second", rank)[-1] for rank in (0, 1))
    assert first == second
    assert len(first) == 19
    assert len(set(first[3:])) > 4


def test_four_processes_in_two_ways_at_once(runs: Path) -> None:
    """With layers that are computed again in the backward. Would break: another order of the mesh's axes, a sum over
    the wrong one, a sum into what checkpointing has kept.
    """
    again = {"gradient_checkpointing": "products"}
    jobs = [train(write_config(runs, "qwen3", name, parallel=sizes, **again)) for name, sizes in FOUR.items()]
    ended = launch(runs, "four", jobs, processes=4)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for name in FOUR:
        assert_same_run(runs / f"qwen3.{name}", runs / "qwen3.alone")


def test_a_mistake_is_said_once(runs: Path) -> None:
    path = write_config(runs, "qwen3", "mistaken", parallel={"data": 3})
    ended = launch(runs, "mistaken", [train(path)])
    said = [line for line in ended.stderr.splitlines() if line.startswith("tritium:")]
    assert said == [
        "tritium: error: parallel: data 3 x shard 1 x tensor 1 takes 3 processes, and there are 2: start that many "
        "with torchrun --nproc-per-node 3"
    ]
    assert ended.returncode != 0
    assert not (runs / "qwen3.mistaken").exists()


# Without processes


def test_the_processes_that_are_left_are_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in mesh.LAUNCHED:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert mesh.shape_of({}) == (8, 1, 1)
    assert mesh.shape_of({"tensor": 2}) == (4, 1, 2)
    assert mesh.shape_of({"data": 1, "shard": 4, "tensor": 2}) == (1, 4, 2)
    for sizes in ({"tensor": 3}, {"data": 4}, {"data": 1, "shard": 16}):
        with pytest.raises(TritiumError, match=r"parallel: data \d+ x .* and there are 8"):
            mesh.shape_of(sizes)


def test_several_processes_need_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert mesh.shape_of({"data": None, "shard": 1, "tensor": 1}) == (1, 1, 1)
    with pytest.raises(TritiumError, match=r"takes 2 processes, and there is 1: start .* torchrun --nproc-per-node 2"):
        mesh.shape_of({"shard": 2})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 6, "num_kv_heads": 3}, "num_kv_heads is 3"),
        ({"num_kv_heads": 2, "hidden_dim": 41}, "hidden_dim is 41"),
    ],
)
def test_a_model_that_cannot_be_cut_is_named(changes: dict[str, int], said: str) -> None:
    with pytest.raises(TritiumError, match=f"over 2 processes: the model's {said}, which must be a multiple of 2"):
        local_spec(small_spec("qwen3").replace(**changes), 2)


def test_experts_are_cut_by_width() -> None:
    spec = small_spec("mixture")
    local = local_spec(spec, 2)
    assert (local.expert_dim, local.num_experts, local.num_kv_heads, local.num_heads) == (6, 5, 1, 2)
    assert local.hidden_dim == spec.hidden_dim
    with pytest.raises(TritiumError, match="expert_dim is 12"):
        local_spec(dataclasses.replace(spec, num_heads=16, num_kv_heads=8), 8)


@pytest.mark.parametrize("family", MODELS)
def test_every_large_matrix_is_cut_and_the_parts_are_the_model(family: str) -> None:
    """Also that a cut keeps the heads of Q, K and V, and gate and up, apart."""
    model = load_model(small_spec(family), device="cpu", dtype=torch.float32)
    cuts = splits(model.config)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    whole = [name for name, value in named.items() if value.dim() > 1 and name not in cuts]
    assert all("embedding" in name or "head" in name or "router" in name for name in whole)
    for name, cut in cuts.items():
        if name not in named:  # a bias that this family does not have
            continue
        pieces = [cut.take(named[name], index, 2) for index in (0, 1)]
        assert pieces[0].shape == pieces[1].shape
        assert pieces[0].numel() * 2 == named[name].numel()
        assert cut.shape(pieces[0]) == tuple(named[name].shape)
        parts = zip(*(piece.split([part // 2 for part in cut.parts], cut.dim) for piece in pieces), strict=True)
        assert torch.equal(torch.cat([half for part in parts for half in part], cut.dim), named[name])


def test_a_packed_parameter_is_cut_part_by_part() -> None:
    rows = torch.arange(12).view(12, 1)
    qkv = Split(0, (8, 2, 2))
    assert qkv.take(rows, 0, 2).flatten().tolist() == [0, 1, 2, 3, 8, 10]
    assert qkv.take(rows, 1, 2).flatten().tolist() == [4, 5, 6, 7, 9, 11]


def test_whoever_is_not_first_speaks_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "no-such-file.yaml"]) == 2
        assert capsys.readouterr().err.startswith("tritium: error: no-such-file.yaml")
    assert waited == [errors.PATIENCE]


class Alone(Exchange):
    """Of a process that has all of every layer."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, summand: torch.Tensor) -> torch.Tensor:
        return summand


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", MODELS)
def test_a_layer_that_is_shared_has_the_same_phases(family: str, backend: str) -> None:
    """On the Triton path, too: what an exchange sits between is what the fused phases give, with its gradients."""
    spec = small_spec(family).replace(dropout=0.0, num_layers=1, layer_repeat=1)
    tokens = torch.arange(1, 6, device=DEVICE)
    found = []
    for exchange in (None, Alone(None)):
        model = load_model(spec, device=DEVICE, dtype=torch.float32).use_backend(backend)
        generator = torch.Generator(DEVICE).manual_seed(2)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, device=DEVICE)
        for block in model.stack.blocks:
            block.exchange = exchange
        loss = model.train().loss(tokens, tokens.roll(-1), Batch.fresh([3, 2], tokens.device))
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, two in zip(*found, strict=True):
        assert one is not None
        assert two is not None
        assert one.abs().max() > 0
        torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)
