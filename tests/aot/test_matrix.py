"""Every launch configuration compiles for every architecture under both versions of Triton, within its budgets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .matrix import Case, failures_of, shows

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
OLDER = Path(os.environ.get("VENV", ROOT / ".venv")).resolve() / "triton-3.6.0"  # `make test` puts it there
VERSIONS = {"3.7.1": None, "3.6.0": OLDER}


def compiled(arch: str, version: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """The report of one run of the matrix, in a process of its own."""
    path, env = VERSIONS[version], {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    if path is not None and not path.is_dir():
        assert "CI" not in os.environ, f"{path} is not there: `make test` installs it"
        pytest.skip(f"{path} is not there: `make test` installs it")
    env.pop("TRITON_INTERPRET", None)
    env["PYTHONPATH"] = os.pathsep.join([str(part) for part in (path, ROOT) if part is not None])
    command = [sys.executable, "-m", "tests.aot.matrix", arch, *options]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.stdout, run.stderr[-3000:]
    report: dict[str, Any] = json.loads(run.stdout)
    assert report["triton"] == version
    assert run.returncode == bool(report["failures"])
    return report


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_row_of_every_table(arch: str, version: str, tmp_path: Path) -> None:
    """Every case under the newer Triton; every row, kernel and assertion under the older, without further variants."""
    report = compiled(arch, version, tmp_path, *(["--rows"] if version == "3.6.0" else []))
    assert report["failures"] == []
    assert len(report["kernels"]) > 60


@pytest.mark.parametrize(("arch", "override"), [("sm_90", "ROWS=8"), ("gfx942", "ROWS=32")])
def test_a_row_that_spills_is_caught(arch: str, override: str, tmp_path: Path) -> None:
    """Too many elements a thread: without this, a blind matrix would look green."""
    options = ("--kernel", "rms_norm", "--only", "4096 bfloat16", "--override", override)
    report = compiled(arch, "3.7.1", tmp_path, *options)
    assert [line for line in report["failures"] if "4096 bfloat16" in line and "spills" in line]


RIGHT = {"registers": 32, "stack": 0, "shared": 0, "wgmma": True, "wide": True, "bulk": True, "dependent": True}
RIGHT |= {"tf32": False, "stores": True}


@pytest.mark.parametrize(
    ("change", "float32", "message"),
    [
        ({"stack": 8}, False, "spills 8 bytes"),
        ({"shared": 232_449}, False, "bytes of shared memory"),
        ({"wgmma": False}, False, "has no wgmma"),
        ({"wide": False}, False, "has no 128-bit loads"),
        ({"bulk": False}, False, "has no bulk copies"),
        ({"dependent": False}, False, "before the kernel in front"),
        ({"tf32": True}, True, "uses tf32"),
        ({"stores": False}, False, "stores nothing"),
    ],
)
def test_every_budget_can_fail(change: dict[str, Any], float32: bool, message: str) -> None:
    case = Case("any", lambda: None, wgmma=True, wide=True, bulk=True, dependent=True)
    assert failures_of(case, "sm_90", RIGHT, float32) == []
    (found,) = failures_of(case, "sm_90", {**RIGHT, **change}, float32)
    assert message in found


def test_a_row_that_no_case_takes_is_caught(tmp_path: Path) -> None:
    report = compiled("sm_90", "3.7.1", tmp_path, "--kernel", "rms_norm", "--only", "4096 bfloat16")
    assert [line for line in report["failures"] if "no case takes it" in line]


@pytest.mark.parametrize(
    ("name", "row", "kernel", "wide"),
    [
        ("other float16", 1, "_kernel", False),
        ("other float32", 0, "_kernel", False),
        ("other bfloat16", 0, "_another_kernel", False),
        ("other bfloat16", 0, "_kernel", True),
    ],
)
def test_a_case_that_shows_something_new_is_not_left_out(name: str, row: int, kernel: str, wide: bool) -> None:
    """Another row, another width, another kernel, another assertion; another half type alone is nothing new."""
    shown = shows(Case("one bfloat16", lambda: None), {("swiglu", "order", 0)}, ["_kernel"])
    assert not shows(Case(name, lambda: None, wide=wide), {("swiglu", "order", row)}, [kernel]) <= shown
    assert shows(Case("two float16", lambda: None), {("swiglu", "order", 0)}, ["_kernel"]) <= shown
