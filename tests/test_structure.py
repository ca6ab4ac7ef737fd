"""The tree's own rules: the mirror of kernels and tests, the floors between packages, no circles, no overlong file."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tritium.kernels import tuning
from tritium.runtime.operations import Operations

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "runtime", "models", "benchmarks", "tests", "tritium")
SUPPORT = (  # not operations: what launchers stand on
    "__init__.py", "functional.py", "launch.py", "linear_phase.py", "overlap.py", "step_kernel.py", "step_tables.py",
)  # fmt: skip
COMPOSED = ("linear_cross_entropy.py", "dense_attention.py")  # of others' kernels: it has no kernel or table of its own
LAUNCHERS = {  # of a file that is not named like its own
    "sampling.py": {"sample"},
    "decode_linear.py": {"norm_linear", "norm_linear_swiglu", "decode_linear_residual", "norm_head"},
    "routing.py": {"route", "group"},
    "routing_backward.py": {"route_backward"},
    "grouped_linear_backward.py": {"grouped_linear_dx", "grouped_linear_dweight"},
}
OPERATIONS = sorted(path for path in (ROOT / "kernels").glob("*.py") if path.name not in SUPPORT)
KERNELS = [path for path in OPERATIONS if path.name not in COMPOSED]
LONGEST = 500  # lines of one file


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not {"build", "__pycache__"} & set(path.relative_to(ROOT).parts))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> list[str]:
    """`runtime/cli.py` -> ["tritium", "runtime"]."""
    parts = path.relative_to(ROOT).parts[:-1]
    return list(parts) if parts[:1] in ((), ("tritium",)) else ["tritium", *parts]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(tree: ast.Module, top_level: bool) -> Iterator[ast.AST]:
    """Every node, or those that run when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if top_level and (is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            continue
        waiting.extend(ast.iter_child_nodes(node))


def imports(path: Path, top_level: bool = False) -> set[str]:
    """What a file imports, as absolute dotted names; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = package_of(path)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], package: str) -> set[str]:
    return {entry for entry in names if entry == package or entry.startswith(f"{package}.")}


def test_the_helpers_see_relative_imports() -> None:
    """Without this, the rules below could hold because nothing was found."""
    assert within(imports(ROOT / "runtime" / "loading.py"), "tritium.runtime.spec") >= {"tritium.runtime.spec.DTYPES"}
    assert "tritium.kernels.sampling" in imports(ROOT / "runtime" / "generation.py")
    lazy = "tritium.runtime.decoder"
    assert lazy in imports(ROOT / "runtime" / "generation.py")
    assert lazy not in imports(ROOT / "runtime" / "generation.py", top_level=True)
    assert len(OPERATIONS) >= 8


@pytest.mark.parametrize("operation", OPERATIONS, ids=name)
def test_every_operation_has_its_test(operation: Path) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{operation.name}").is_file()


@pytest.mark.parametrize("operation", KERNELS, ids=name)
def test_every_kernel_has_its_tests_its_compilation_and_its_benchmark(operation: Path) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{operation.stem}_kernel.py").is_file()
    assert (ROOT / "tests" / "aot" / operation.name).is_file()
    assert (ROOT / "benchmarks" / "kernels" / operation.name).is_file()


@pytest.mark.parametrize("operation", KERNELS, ids=name)
def test_every_kernel_has_a_launcher_and_is_registered(operation: Path) -> None:
    """A definition `<name>_reference` beside each launcher `<name>`, and `register` for every launcher."""
    tree = ast.parse(operation.read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [getattr(call.func, "id", "") for call in calls]
    assert LAUNCHERS.get(operation.name, {operation.stem}) - functions == set()
    assert "launch" in named
    registered = [call.args[0] for call in calls if getattr(call.func, "id", "") == "register"]
    texts = [ast.unparse(schema).lstrip("f").strip("\"'").partition("(")[0] for schema in registered]
    named_so = {entry.name for entry in dataclasses.fields(Operations)} | {operation.stem}
    own = LAUNCHERS.get(operation.name, set())
    launchers = functions & (named_so | own | {f"{name}_backward" for name in named_so})
    assert len(launchers) > 0
    assert launchers - set(texts) == set()
    assert {f"{launcher}_reference" for launcher in launchers - {"qk_norm_rope"}} - functions == set()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_order_of_summation_does_not_depend_on_the_batch(arch: str) -> None:
    """The batch-invariant mode, held in the tables: rows of `order` may not be keyed by how much there is."""
    tables = tuning.load(arch)
    assert set(tables) == set(tuning.load("sm_90"))
    conditions = {
        (kernel, key)
        for kernel, rows in tables.items()
        for row in rows.get("order") or []
        for key in row.get("when", {})
    }
    assert {(kernel, key) for kernel, key in conditions if key in tuning.BATCH_KEYS} == set()
    assert set(tables) >= {path.stem for path in KERNELS}


def test_every_kernel_benchmark_has_its_operation() -> None:
    """Would break: a renamed operation leaves its benchmark behind."""
    benches = {path.stem for path in (ROOT / "benchmarks" / "kernels").glob("*.py")} - {"__init__"}
    assert benches - {path.stem for path in OPERATIONS} == set()


@pytest.mark.parametrize("operation", OPERATIONS, ids=name)
def test_every_operation_states_its_contract(operation: Path) -> None:
    """The docstring's four parts, and the definition in plain PyTorch."""
    tree = ast.parse(operation.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    assert [word for word in ("Shapes:", "Rounding:", "Floor:") if word not in docstring] == []
    references = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.endswith("_reference")]
    assert references
    assert [node.name for node in references if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("path", sources("kernels"), ids=name)
def test_kernels_stand_on_nothing_of_ours(path: Path) -> None:
    ours = within(imports(path), "tritium")
    assert ours - within(ours, "tritium.kernels") == set()
    assert imports(path) & set(PACKAGES) == set()


@pytest.mark.parametrize("path", sources("runtime"), ids=name)
def test_runtime_stands_on_kernels_and_models(path: Path) -> None:
    ours = within(imports(path), "tritium")
    allowed = within(ours, "tritium.kernels") | within(ours, "tritium.runtime") | within(ours, "tritium.models")
    if path.name == "cli.py":  # the command line stands above everything: `tritium tune` is a benchmark
        allowed |= within(ours, "tritium.benchmarks")
    assert ours - allowed == set()
    assert imports(path) & set(PACKAGES) == set()


@pytest.mark.parametrize("path", sources("kernels", "runtime", "models", "tritium"), ids=name)
def test_development_packages_are_not_needed(path: Path) -> None:
    """Would break: an installed Tritium needs what only `.[dev]` brings, or its tests."""
    roots = {entry.partition(".")[0] for entry in imports(path)}
    assert roots & {"pytest", "hypothesis", "transformers", "tiktoken", "matplotlib", "tests", "setuptools"} == set()
    assert within(imports(path), "tritium.tests") == set()


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=name)
def test_models_are_data_and_names(path: Path) -> None:
    """Only re-exports, and in __init__.py the lazy look-up of public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    statements = {type(node) for node in tree.body}
    assert statements <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef}
    if path.name == "__init__.py":
        assert set(defined) == {"__getattr__", "__dir__"}
        assert within(imports(path, top_level=True), "tritium") == set()
    else:
        assert defined == []
        exported = {entry.rpartition(".")[2] for entry in imports(path) if entry.count(".") > 2}
        assert exported == set(ast.literal_eval(next(n.value for n in tree.body if isinstance(n, ast.Assign))))


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import circle, or none."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        found = next((way for other in sorted(graph[module]) if (way := visit(other, [*trail, module]))), [])
        done.add(module)
        return found

    return next((way for module in sorted(graph) if (way := visit(module, []))), [])


def test_no_circles() -> None:
    """Would break: what can be imported depends on what was imported before."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    modules = {
        ".".join([*package_of(path), *([] if path.stem == "__init__" else [path.stem])]): path
        for path in sources("kernels", "runtime", "models")
    }
    # `from . import plan` names the package too, of whose own names it needs none.
    packages = {"tritium.kernels", "tritium.runtime", "tritium.models"}
    graph = {module: (imports(path, True) & set(modules)) - packages - {module} for module, path in modules.items()}
    assert {package: graph[package] for package in packages if graph[package]} == {
        "tritium.kernels": {"tritium.kernels.functional"}  # the operations as functions, by their files' names
    }
    assert sum(map(len, graph.values())) > 40
    assert circle(graph) == []


def test_no_file_is_overlong() -> None:
    files = [ROOT / "main.py", ROOT / "setup.py", *sources(*PACKAGES)]
    lines = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def test_the_public_names_are_there() -> None:
    """The table in tritium/__init__.py points at modules by name: a rename would show only at first use."""
    text = (ROOT / "tritium" / "__init__.py").read_text(encoding="utf-8")
    table = dict(re.findall(r'^    "(\w+)": "([\w.]+)",$', text, re.MULTILINE))
    assert len(table) >= 10
    for public, module in table.items():
        tree = ast.parse((ROOT / "runtime" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert public in {getattr(node, "name", None) for node in tree.body}, public
