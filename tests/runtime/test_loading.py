"""Finding checkpoints, and the memory that loading them takes."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tritium.runtime import loading
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.registry import get_family

import tritium

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = (
        get_family("qwen3")
        .spec("0.6B")
        .replace(vocab_size=4000, num_layers=8, embedding_dim=512, hidden_dim=1536, num_heads=4, num_kv_heads=2)
    )
    directory = tmp_path_factory.mktemp("checkpoint")
    tritium.save_pretrained(Decoder(spec).initialise(), directory, torch.float32, shard_bytes=30_000_000)
    return directory


def test_names(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """A folder, a hub id, family:size and family alone each find their checkpoint."""
    asked: list[str] = []

    def snapshot(repository: str, **options: object) -> str:
        asked.append(repository)
        assert options["allow_patterns"] == [
            "*.json",
            "*.safetensors",
            "*.jinja",
            "*.tiktoken",
        ]  # never code, never pickles
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert loading.resolve_checkpoint(str(checkpoint)) == checkpoint
    for name, variant in (
        ("someone/Some-Model_1.5", None),
        ("qwen3:0.6b", None),
        ("qwen3:8B", "base"),
        ("qwen3", None),
        ("mobilellm", None),
        ("mobilellm:140m", "base"),
    ):
        assert loading.resolve_checkpoint(name, variant) == checkpoint
    assert asked == [
        "someone/Some-Model_1.5",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B-Base",
        "Qwen/Qwen3-0.6B",
        "facebook/MobileLLM-R1-950M",
        "facebook/MobileLLM-R1-140M-base",
    ]
    model, _, spec = tritium.load_qwen3(size="0.6B", variant="instruct", device="cpu")
    assert spec == model.config
    assert asked[-1] == "Qwen/Qwen3-0.6B"


def test_a_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, **options: object) -> str:
        raise OSError("401 Client Error\nlong explanation\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(TritiumError) as error:
        tritium.load("owner/missing")
    assert "\n" not in str(error.value)
    assert "owner/missing" in str(error.value)
    assert "401 Client Error" in str(error.value)


# Loads a checkpoint onto a device that keeps no memory of its own (each parameter's bytes are dropped as they come),
# and prints the peak of the process's anonymous memory above what it had before.
MEMORY = """
import resource, sys, threading, torch, tritium
from tritium.runtime import checkpoint
from tritium.runtime.decoder import Decoder
from tritium.runtime.weight_map import Piece

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

spec = checkpoint.read_spec(checkpoint.Path(sys.argv[1]))
with torch.device("meta"):
    model = Decoder(spec)
peak = 0
def fill(piece, parameter, tensor):
    global peak
    moved = tensor.to(torch.bfloat16)
    for transform in piece.load:
        moved = transform(moved)
    peak = max(peak, anonymous())
Piece.fill = fill
checkpoint.allocate = lambda model, device: None
before = anonymous()
checkpoint.load_weights(model, checkpoint.Path(sys.argv[1]), progress=False)
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_holds_one_tensor_at_a_time(checkpoint: Path) -> None:
    """Beside the model itself, loading takes about the largest tensor, not the checkpoint."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    total = index["metadata"]["total_size"]
    largest = 4000 * 512 * 4
    assert total > 8 * largest
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(checkpoint)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2.5 * largest


def test_out_of_memory_says_what_was_needed(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def fail(self: Decoder, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(Decoder, "to_empty", fail)
    with pytest.raises(TritiumError, match=r"out of memory: the weights need 0\.\d GiB on cpu"):
        tritium.load(checkpoint, device="cpu")


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives(checkpoint: Path) -> None:
    """The torch path on a GPU: float32 logits and greedy tokens."""
    cpu, _, _ = tritium.load(checkpoint, device="cpu", backend="torch")
    gpu, _, _ = tritium.load(checkpoint, device="cuda", dtype="float32", backend="torch")
    x = torch.randint(0, 4000, (2, 20))
    torch.testing.assert_close(gpu(x.cuda()).logits.cpu(), cpu(x).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(gpu.generate(x.cuda(), 20, temperature=0).cpu(), cpu.generate(x, 20, temperature=0))
