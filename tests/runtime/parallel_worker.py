"""What tests/runtime/test_parallel.py runs under torchrun: command lines, one after another in the same processes.

Each job of the JSON file that is given is the arguments of one command, with what this process is to do besides. What
they return and print goes into that file's folder.
"""

import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tritium.runtime import cli
from tritium.runtime.loading import load
from tritium.runtime.parallel.mesh import started
from tritium.runtime.parallel.tensor import split_model
from tritium.runtime.training import trainer


def crash_in(step: int) -> None:
    """From now on this process is killed when it comes to a step."""
    train_step = trainer.train_step

    def step_or_crash(run: trainer.Run, at: int) -> trainer.Step:
        if at == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(run, at)

    trainer.train_step = step_or_crash  # type: ignore[assignment]


def generate(folder: str, **options: Any) -> list[int]:
    """Tokens from a model that all processes share."""
    with started({"tensor": int(os.environ["WORLD_SIZE"])}, "cpu") as mesh:
        assert mesh is not None
        model, _, _ = load(folder, device="cpu", progress=False)
        split_model(model, mesh.index("tensor"), mesh.size("tensor"), mesh.group("tensor"))
        found: list[int] = model.generate(torch.tensor([[1, 2, 3]]), **options)[0].tolist()
        return found


def main(jobs: Path) -> None:
    rank = int(os.environ["RANK"])
    results: list[Any] = []
    dist.init_process_group("gloo")  # once for all jobs
    for job in json.loads(jobs.read_text()):
        if job.get("crash") and job["crash"]["rank"] == rank:
            crash_in(job["crash"]["step"])
        if "generate" in job:
            results.append(generate(**job["generate"]))
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = cli.main(job["arguments"])
        if code:
            sys.exit(code)
        results.append(out.getvalue())
    jobs.with_name(f"{jobs.stem}.{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
