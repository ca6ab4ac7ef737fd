"""Every way to get at Tritium: a wheel, an uninstalled checkout, without Triton, and beside another `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tritium", "kernels", "runtime", "models", "benchmarks")

# Builds a tiny Qwen3 from the YAML of a real one, in code that every place below runs.
TINY = """
import torch, tritium
spec = tritium.load_config("models/qwen3/0.6B.yaml")
assert (spec.num_layers, spec.embedding_dim) == (28, 1024)
layers = {"rope_layers": True, "qk_norm_layers": True, "windows": None, "num_layers": 2}
spec = spec.replace(**layers, vocab_size=50, embedding_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=24)
model = tritium.load_model(spec, "qwen3", device="cpu")
tokens = model.generate(torch.tensor([[1, 2, 3]]), 3, temperature=0)
assert tokens.shape == (1, 6) and tokens[0, :3].tolist() == [1, 2, 3]
assert 0 <= int(tokens.min()) and int(tokens.max()) < 50
"""
# An exit handler sees what a program's imports look like once it has run.
AT_EXIT = """
import atexit
def look():
    import importlib.util, sys, kernels, tritium
    ours = importlib.util.find_spec("tritium.kernels").origin  # imported so late, torch would stumble at the end
    print("kernels", kernels.__version__, "ours", ours, file=sys.stderr)
    found = [name for name in ("runtime", "models", "benchmarks") if importlib.util.find_spec(name)]
    print("found", found, file=sys.stderr)
atexit.register(look)
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees only `path` besides its own packages."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def output(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    done = python(*arguments, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has or would add, in a folder with another name, a space and an accent."""
    copy = tmp_path_factory.mktemp("install") / "my chéckout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    target = tree.parent / "wheel"
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    output(*build, "-q", "-w", str(target), ".", cwd=Path(shutil.copytree(tree, tree.parent / "to build")))
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "unpacked")
    return wheel.parent / "unpacked"


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution named `kernels`, as `transformers` would import it."""
    site = tmp_path_factory.mktemp("site")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text('__version__ = "9.9"\n')
    (site / "kernels" / "layer.py").write_text("WHOSE = 'theirs'\n")
    (site / "kernels-9.9.dist-info").mkdir()
    (site / "kernels-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    (site / "sitecustomize.py").write_text("")
    return site


def test_the_wheel_holds_all_and_nothing_else(tree: Path, wheel: Path) -> None:
    """Would break: an installation without its YAML files or its bundled model, or one that claims `kernels`."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        entry_points = archive.read("tritium-0.1.0.dist-info/entry_points.txt").decode()
    python_files = [path for package in PACKAGES for path in (tree / package).rglob("*.py")]
    sizes = list((tree / "models").rglob("*.yaml"))
    bundled = [path for path in (tree / "models" / "mobilellm" / "shakespeare").rglob("*") if path.is_file()]
    tuning = [*(tree / "kernels").rglob("*.yaml"), *(tree / "benchmarks").rglob("*.yaml")]
    assert len(python_files) > 30
    assert len(sizes) > 11
    wanted = set()
    for path in (*python_files, *sizes, *bundled, *tuning):
        relative = path.relative_to(tree).as_posix()
        wanted.add(relative if relative.startswith("tritium/") else f"tritium/{relative}")
    assert wanted - inside == set()
    assert {name.partition("/")[0] for name in inside} == {"tritium", "tritium-0.1.0.dist-info"}
    assert [name for name in inside if "tests/" in name or name.endswith((".pyc", "setup.py", "main.py"))] == []
    assert "tritium = tritium.runtime.cli:main" in entry_points


def test_the_wheel_runs(unpacked: Path, tmp_path: Path) -> None:
    script = f"""{TINY}
import importlib.util, sys, tritium.kernels, tritium.models.attention, tritium.runtime.cli
places = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "tritium"]
assert all(place.startswith({str(unpacked)!r}) for place in places if place), places
for name in ("kernels", "runtime", "models"):
    spec = importlib.util.find_spec(name)
    assert spec is None or {str(unpacked)!r} not in str(spec.origin)
assert tritium.runtime.cli.main(["models"]) == 0
"""
    shown = output("-c", script, cwd=tmp_path, path=unpacked)
    assert "596,049,920" in shown


def test_a_checkout_runs_uninstalled(tree: Path) -> None:
    """From its root, in a folder whose name is no import name."""
    script = f"""{TINY}
import sys, tritium.kernels.rms_norm, tritium.models.transformer
assert sys.modules["tritium.kernels.rms_norm"].__file__ == {str(tree / "kernels" / "rms_norm.py")!r}
from tritium.models import MobileLLM, MobileLLMConfig
config = MobileLLMConfig(num_layers=1, num_heads=2, num_kv_heads=1, embed_dim=16, hidden_dim=24, vocab_size=50)
assert MobileLLM(config)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 50)
print("done")
"""
    assert output("-c", script, cwd=tree) == "done"


def test_main_py_of_a_checkout_runs_from_anywhere(tree: Path, tmp_path: Path) -> None:
    done = python(str(tree / "main.py"), "--model", "qwen3", "--size", "5B", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("tritium: error: qwen3: unknown size '5B'")
    assert done.stderr.count("\n") == 1


def test_another_kernels_is_not_shadowed(stand_in: Path) -> None:
    """Would break: `transformers` gets our folder when it asks for the package `kernels`."""
    script = (
        'import kernels, kernels.layer; print(kernels.__version__, kernels.layer.WHOSE, hasattr(kernels, "rms_norm"))'
    )
    assert output("-c", script, cwd=ROOT, path=stand_in) == "9.9 theirs False"


def test_both_kernels_live_side_by_side(stand_in: Path) -> None:
    script = """
import sys, tritium.kernels.rms_norm, kernels as theirs, tritium.kernels
ours = sys.modules["tritium.kernels.rms_norm"]
public = tritium.kernels.rms_norm is tritium.kernels.functional.rms_norm
print(theirs.__version__, ours.__file__, public, tritium.kernels is theirs)
"""
    assert output("-c", script, cwd=ROOT, path=stand_in) == f"9.9 {ROOT / 'kernels' / 'rms_norm.py'} True False"


@pytest.mark.parametrize("arguments", [["--help"], ["--model", "qwen3", "--size", "5B", "--prompt", "a"]])
def test_main_py_leaves_kernels_to_others(stand_in: Path, tmp_path: Path, arguments: list[str]) -> None:
    """Would break: the script's own folder, first on sys.path, gives `kernels`, `runtime` and `models` to everyone."""
    site = Path(shutil.copytree(stand_in, tmp_path / "site"))
    (site / "sitecustomize.py").write_text(AT_EXIT)
    done = python("main.py", *arguments, cwd=ROOT, path=site)
    seen = done.stderr.splitlines()[-2:]
    assert seen == [f"kernels 9.9 ours {ROOT / 'kernels' / '__init__.py'}", "found []"]


def test_without_another_kernels_ours_stays_hidden() -> None:
    """A plain `import kernels` at the root finds what an empty folder would be: nothing of ours."""
    script = """
try:
    import kernels
except ImportError:
    print("None False")
else:
    print(getattr(kernels, "__file__", None), hasattr(kernels, "rms_norm"))
"""
    assert output("-S", "-c", script, cwd=ROOT) == "None False"


def test_transformers_works_from_the_root() -> None:
    """`transformers` decides by find_spec and metadata whether `kernels` is there, and imports names from it if so."""
    script = """
import importlib.metadata
from transformers.integrations import hub_kernels
from transformers.utils import is_kernels_available
try:
    installed = bool(importlib.metadata.version("kernels"))
except importlib.metadata.PackageNotFoundError:
    installed = False
print(bool(is_kernels_available()) == installed, hub_kernels.__name__)
"""
    assert output("-c", script, cwd=ROOT) == "True transformers.integrations.hub_kernels"


def test_without_triton() -> None:
    """macOS and Windows: the package imports and the reference path generates where Triton cannot be imported."""
    script = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("no triton here")
sys.meta_path.insert(0, Blocked())
try:
    import triton
except ImportError:
    pass
else:
    raise AssertionError("the block does not work")
{TINY}
try:
    model.use_backend("triton")
except tritium.TritiumError as error:
    print(error)
"""
    assert output("-c", script, cwd=ROOT).startswith("backend 'triton' cannot run here")


def test_imports_stay_light() -> None:
    """Would break: the start of every command. Triton comes with the kernels; torch itself may import any of these."""
    script = """
import sys, torch, importlib, pathlib
heavy = {"transformers", "matplotlib", "huggingface_hub"}
before = heavy & set(sys.modules)
import tritium
for path in pathlib.Path("kernels").glob("*.py"):
    importlib.import_module("tritium.kernels" if path.stem == "__init__" else f"tritium.kernels.{path.stem}")
import tritium.runtime.decoder, tritium.runtime.loading, tritium.models.attention
print(sorted(heavy & set(sys.modules) - before))
"""
    assert output("-c", script, cwd=ROOT) == "[]"


def test_torch_waits_until_it_is_needed() -> None:
    """Would break: `tritium --help` and a mistyped option cost the seconds that torch takes to import."""
    script = """
import sys, tritium, tritium.models
from tritium.runtime.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""
    assert output("-c", script, cwd=ROOT).splitlines()[-1] == "0 False"
