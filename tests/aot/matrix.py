"""Compiles the real launchers' kernels for one GPU architecture, without that GPU, and reads what came out.

    python -m tests.aot.matrix sm_90 [--kernel rms_norm] [--override BLOCK_N=256 ...] [--rows] [--verbose]

A process of its own, as it cannot share one with the interpreter: Triton gets a stand-in driver, launchers run on meta
tensors, and `launch` calls `warmup`, so what is compiled is what would be launched, specialisation and all. Files
beside this one, each named after an operation, say which calls (`CASES`). A row of a table that no call takes fails.
With `--rows` a case is left out where those before it took each of its rows, started each of its kernels, and asserted
as much of them, at its width of data type.
Prints one JSON object: {"kernels": [...], "failures": [...]}.
"""

import argparse
import gc
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes that one program may have


@dataclass(frozen=True)
class Case:
    """One call of a launcher on meta tensors, and what must be in the code that it compiles."""

    name: str
    call: Callable[[], object]
    wgmma: bool = False  # Hopper's warp-group matrix instruction, where the architecture has it
    wide: bool = False  # loads of 16 bytes a thread, asynchronous and bulk copies included: some, not each
    bulk: bool = False  # tiles by the copy engine (TMA), where the architecture has it
    dependent: bool = False  # starts before the kernel in front has ended, and waits for it, where the architecture can
    only: tuple[str, ...] = field(default_factory=lambda: tuple(TARGETS))  # architectures it is compiled for


class Driver:
    """What Triton asks a driver for when it compiles: nothing is ever launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, type_name: str) -> str:
        return "void*"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with a shape and no values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def inspect(compiled: Any, arch: str) -> dict[str, Any]:
    """Registers, spilled or stacked bytes, shared memory, and the instructions that matter."""
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def count(name: str) -> int:
            return max((int(value) for value in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

        return {
            "registers": count("vgpr_count"),
            "stack": count("vgpr_spill_count") + count("sgpr_spill_count") + count("private_segment_fixed_size"),
            "shared": shared,
            "wgmma": False,
            "wide": bool(re.search(r"(global|buffer)_load_(dwordx4|b128)", text)),
            "bulk": False,
            "dependent": False,
            "tf32": "xf32" in text,
            "stores": bool(re.search(r"(global|buffer)_(store|atomic)", text)),
        }
    usage = _resource_usage(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),  # type: ignore[index]
        "shared": shared,
        "wgmma": "wgmma.mma_async" in text,
        "wide": bool(
            re.search(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|ld\.global[\w.:]*\.v8\.b32", text)
            or re.search(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10|cp\.async\.bulk\.tensor", text)
        ),
        "bulk": "cp.async.bulk.tensor" in text,
        "dependent": all(f"griddepcontrol.{name}" in text for name in ("wait", "launch_dependents")),
        "tf32": ".tf32" in text,
        "stores": bool(re.search(r"st\.global|st\.async|cp\.async\.bulk\.tensor\.\dd\.global|atom\.|red\.", text)),
    }


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def failures_of(case: Case, arch: str, found: dict[str, Any], float32: bool) -> list[str]:
    """What is wrong with one compiled kernel, in words."""
    wrong = []
    if found["stack"]:
        wrong.append(f"spills {found['stack']} bytes ({found['registers']} registers)")
    if found["shared"] > SHARED[arch]:
        wrong.append(f"needs {found['shared']} bytes of shared memory of {SHARED[arch]}")
    if case.wgmma and arch == "sm_90" and not float32 and not found["wgmma"]:
        wrong.append("has no wgmma")
    if case.wide and not found["wide"]:
        wrong.append("has no 128-bit loads")
    if case.bulk and arch in ("sm_90", "sm_100") and not found["bulk"]:
        wrong.append("has no bulk copies")
    if case.dependent and arch in ("sm_90", "sm_100") and not found["dependent"]:
        wrong.append("does not start before the kernel in front has ended")
    if float32 and found["tf32"]:
        wrong.append("uses tf32 for float32")
    if not found["stores"]:
        wrong.append("stores nothing: its body is empty")
    return wrong


def shows(case: Case, rows: set[tuple[str, str, int]], kernels: list[str]) -> set[tuple[Any, ...]]:
    """What a case that takes these rows and launches these kernels shows: each of them, for float32 or for half of its
    bits, and each of what it asserts of each kernel."""
    width = "float32" if "float32" in case.name else "half"
    asserted = [name for name in ("wgmma", "wide", "bulk", "dependent") if getattr(case, name)]
    return {(*row, width) for row in rows} | {(kernel, each) for kernel in kernels for each in (width, *asserted)}


def run(
    arch: str,
    operations: list[str],
    overrides: dict[str, int],
    only: str | None = None,
    rows: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Compiles the cases of the operations (all, or the one named) for `arch`; `overrides` replace table entries."""
    from tritium.kernels import tuning

    triton.runtime.driver.set_active(Driver(TARGETS[arch]))
    compiled: list[tuple[JITFunction[Any], Any]] = []
    warmup = JITFunction.warmup
    compiles = True

    def recorded(self: JITFunction[Any], *args: Any, **kwargs: Any) -> Any:
        kernel = warmup(self, *args, **kwargs) if compiles else None
        compiled.append((self, kernel))
        return kernel

    JITFunction.warmup = recorded  # type: ignore[method-assign]
    took: set[tuple[str, str, int]] = set()  # by the case at hand
    find = tuning.find

    def recording(arch: str, kernel: str, table: str, key: Any) -> int:
        index = find(arch, kernel, table, key)
        took.add((kernel, table, index))
        return index

    tuning.find = recording
    config = tuning.config
    tuning.config = lambda *args, **key: {**config(*args, **key), **overrides}
    report: dict[str, Any] = {"arch": arch, "triton": triton.__version__, "kernels": [], "failures": []}
    taken: set[tuple[str, str, int]] = set()
    shown: set[tuple[Any, ...]] = set()  # by the cases so far: see `shows`
    inspected: dict[int, dict[str, Any]] = {}
    for operation in operations:
        module = importlib.import_module(f"tests.aot.{operation}")
        for case in module.CASES:
            if arch not in case.only or only not in (None, case.name):
                continue
            where = f"{operation} {case.name} [{arch}, triton {triton.__version__}]"
            start = time.perf_counter()
            compiled.clear()
            took.clear()
            try:
                if rows:
                    compiles = False
                    case.call()
                    new = shows(case, took, [function.fn.__name__ for function, _ in compiled])
                    if new <= shown:
                        continue
                    shown |= new
                    compiles = True
                    compiled.clear()
                case.call()
            except Exception as error:
                report["failures"].append(f"{where}: {type(error).__name__}: {str(error)[-400:]}")
                continue
            taken |= took
            if not compiled:
                report["failures"].append(f"{where}: launched nothing")
            for function, kernel in compiled:
                if id(kernel) not in inspected:  # Triton keeps what it compiled, and gives it again
                    inspected[id(kernel)] = inspect(kernel, arch)
                found = inspected[id(kernel)]
                name = f"{where} {function.fn.__name__}"
                float32 = "float32" in case.name
                report["kernels"].append({"name": name, **found, "seconds": round(time.perf_counter() - start, 2)})
                report["failures"] += [f"{name}: {wrong}" for wrong in failures_of(case, arch, found, float32)]
                if verbose:
                    print(report["kernels"][-1], file=sys.stderr, flush=True)
        for name in getattr(module, "KERNELS", [operation]):
            for table in tuning.TABLES:
                for index, row in enumerate(tuning.load(arch)[name].get(table) or []):
                    bound = row.get("triton", ">=0")
                    current = tuning.holds(bound, tuning._version(triton.__version__))
                    if current and (name, table, index) not in taken:
                        report["failures"].append(f"{name}.{table} row {index} of {arch}.yaml: no case takes it: {row}")
    return report


def operations() -> list[str]:
    """The operations that have cases."""
    found = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(name for name in found if name not in ("__init__", "matrix", "test_matrix"))


if __name__ == "__main__":
    gc.disable()  # a tenth of the time, and nothing here is worth collecting
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=TARGETS)
    parser.add_argument("--kernel", action="append", choices=operations())
    parser.add_argument("--override", action="append", default=[], metavar="NAME=NUMBER", help="a launch argument")
    parser.add_argument("--only", metavar="CASE", help="the one case of this name")
    parser.add_argument("--rows", action="store_true", help="leave out cases that show nothing new")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    changed = {name: int(value) for name, _, value in (text.partition("=") for text in options.override)}
    result = run(options.arch, options.kernel or operations(), changed, options.only, options.rows, options.verbose)
    print(json.dumps(result))
    sys.exit(bool(result["failures"]))
