"""docs/ says what is true today: its links lead somewhere, its tables are the data's, its code runs.

Code runs as a reader would run it, but offline: where it asks the hub for a checkpoint it gets a tiny one of the same
family, with random weights, a tokenizer and a chat template.
"""

import functools
import importlib.util
import inspect
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from tritium.runtime import cli, loading, registry, summary, text
from tritium.runtime.registry import families

import tritium
from tests import tiny
from tests.test_structure import OPERATIONS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    "README.md",
    *(f"architecture/{name}.md" for name in ("attention", "decoding", "ffn", "kernels", "numerics")),
    "architecture/serving.md",
    *(f"architecture/{name}.md" for name in ("positional-encoding", "quantisation", "weight-mapping")),
    *(f"development/{name}.md" for name in ("adding-models", "benchmarking", "configuration", "fine-tuning", "guide")),
    *(f"development/{name}.md" for name in ("model-registry", "parallel", "testing", "training", "tuning")),
    *(f"models/{name}.md" for name in ("GPT", "MobileLLM", "Qwen1", "Qwen3", "template")),
    *(f"usage/{name}.md" for name in ("accelerate", "attention-interface", "conversion", "evaluation", "kernels")),
    *(f"usage/{name}.md" for name in ("log-probabilities", "serving")),
]
MODEL_PAGES = [page for page in PAGES if page.startswith("models/")]
FOLLOWED = "development/adding-models.md"  # whose code needs the files that it tells to write
SECTIONS = (
    "overview", "architecture", "key components", "attention", "feed-forward", "positional encoding",
    "model specifications", "available configurations", "configuration parameters",
    "usage examples", "basic", "advanced", "command line",
    "technical details", "implementation", "weight mapping",
    "performance characteristics", "memory usage", "speed",
    "architecture advantages", "key benefits", "use cases",
    "development notes", "repository patterns", "configuration files", "implementation files",
    "related documentation",
)  # fmt: skip
DIAGRAMS = ("flowchart", "graph", "sequenceDiagram", "classDiagram", "stateDiagram-v2", "erDiagram", "block-beta")
NEEDS_A_GPU = "# needs a GPU"
VOCABULARY = 352
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WITHOUT_TEMPLATE = ("gpt", "mobilellm1")  # published as base models only


@functools.cache
def tables() -> ModuleType:
    """docs/tables.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its text, and the line of the page that it begins behind."""

    language: str
    text: str
    line: int

    @property
    def path(self) -> str | None:
        """The file that the block is, where its first line is a comment that says so."""
        found = re.match(r"# ([\w./-]+/[\w.-]+\.\w+)\n", self.text)
        return found[1] if found else None


@dataclass(frozen=True)
class Page:
    """A Markdown file taken apart."""

    path: Path
    prose: str  # without what is fenced
    fences: tuple[Fence, ...]

    @classmethod
    @functools.cache
    def read(cls, path: Path) -> "Page":
        prose, fences, lines = [], [], path.read_text(encoding="utf-8").splitlines()
        mark, language, start = "", "", 0
        for number, line in enumerate(lines, 1):
            found = re.match(r" *(`{3,}|~{3,})([^`]*)$", line)
            if found and not mark:
                mark, language, start = found[1], found[2].strip(), number
            elif found and found[1].startswith(mark) and not found[2].strip():
                fences.append(Fence(language, textwrap.dedent("\n".join(lines[start : number - 1])) + "\n", start))
                mark = ""
            elif not mark:
                prose.append(line)
        assert not mark, f"{path}: the fence of line {start} is not closed"
        return cls(path, "\n".join(prose), tuple(fences))

    def of(self, *languages: str) -> list[Fence]:
        return [fence for fence in self.fences if fence.language in languages]

    @property
    def headings(self) -> list[str]:
        return re.findall(r"^#{1,6} +(.+?) *$", self.prose, re.MULTILINE)

    @property
    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        seen: dict[str, int] = {}
        found = set()
        for heading in self.headings:
            words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
            seen[slug] = seen.get(slug, 0) + 1
        return found

    @property
    def links(self) -> list[str]:
        """The targets of links and pictures, those in `code` left out."""
        text = re.sub(r"(`+).+?\1", "", self.prose, flags=re.DOTALL)
        return re.findall(r"\]\(([^()\s]+(?:\([^()]*\))?)\)", text)


def page(name: str) -> Page:
    return Page.read(DOCS / name)


def normal(heading: str) -> str:
    """`#### 2. Feed Forward` and `Feed-forward` are the same section."""
    return re.sub(r"^\d+\. ", "", heading.replace("`", "")).lower().replace("feed forward", "feed-forward")


# What the pages are


def test_the_pages_are_the_agreed_ones() -> None:
    assert sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")) == sorted(PAGES)
    others = {path.name for path in DOCS.rglob("*") if path.is_file() and path.suffix not in (".md", ".pyc")}
    assert others == {"tables.py"}


def test_a_page_is_taken_apart(tmp_path: Path) -> None:
    """Without this the tests below could hold because nothing was found."""
    text = (
        "# One [two](x.md) `a_b`: c!\n## A\n## A\n[l](y.md#z) `[no](n.md)` ![p](p.png)\n````text\n```python\n1\n```\n"
    )
    text += "````\n- x\n\n  ```python\n  # tests/a/b.py\n  if 1:\n      2\n  ```\n"
    (tmp_path / "p.md").write_text(text)
    found = Page.read(tmp_path / "p.md")
    assert found.anchors == {"one-two-a_b-c", "a", "a-1"}
    assert found.links == ["x.md", "y.md#z", "p.png"]
    assert [fence.language for fence in found.fences] == ["text", "python"]
    assert found.fences[0].text == "```python\n1\n```\n"
    assert found.fences[1] == Fence("python", "# tests/a/b.py\nif 1:\n    2\n", 12)
    assert found.fences[1].path == "tests/a/b.py"
    assert normal("2. Feed Forward") == normal("Feed-forward")


@pytest.mark.parametrize("name", [*PAGES, "../README.md"])
def test_every_link_leads_somewhere(name: str) -> None:
    here = page(name)
    for link in here.links:
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (here.path.parent / target).resolve() if target else here.path
        assert path.exists(), f"{name}: {link} is not there"
        assert path.is_relative_to(ROOT), f"{name}: {link} leads out of the repository"
        if anchor and path.suffix == ".md":
            assert anchor in Page.read(path).anchors, f"{name}: {link}: no such heading"


def test_the_overview_links_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in page("README.md").links}
    assert set(PAGES) - {"README.md"} - linked == set()


@pytest.mark.parametrize("name", MODEL_PAGES)
def test_a_model_page_has_the_sections_of_the_template(name: str) -> None:
    found = set(map(normal, page(name).headings))
    assert [section for section in SECTIONS if section not in found] == []
    assert page(name).of("mermaid")


def test_every_operation_has_its_section() -> None:
    operations = {path.stem for path in OPERATIONS}
    sections = re.findall(r"^## (.+?) *$", page("architecture/kernels.md").prose, re.MULTILINE)
    assert len(operations) > 8
    assert operations - {section.replace("`", "") for section in sections} == set()


@pytest.mark.parametrize("name", PAGES)
def test_diagrams_and_data_have_a_form(name: str) -> None:
    assert [fence.line for fence in page(name).fences if not fence.language] == []
    for fence in page(name).of("mermaid"):
        assert fence.text.split()[0] in DIAGRAMS, f"{name}, line {fence.line}"
        assert len(fence.text.splitlines()) > 2, f"{name}, line {fence.line}"
        assert fence.text.count("[") == fence.text.count("]"), f"{name}, line {fence.line}"
    for fence in page(name).of("yaml"):
        assert yaml.safe_load(fence.text), f"{name}, line {fence.line}"
    for fence in page(name).of("json"):
        assert json.loads(fence.text), f"{name}, line {fence.line}"


# Tables


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_current(name: str) -> None:
    assert tables().stale(DOCS / name) == [], "python docs/tables.py"


def test_stale_tables_are_told_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables(), "DOCS", tmp_path)
    monkeypatch.setattr(tables(), "ROOT", tmp_path)
    monkeypatch.setattr(tables(), "specs", lambda family: {})  # not a matter of this test
    inside = "<!-- table spec qwen3 0.6B -->\n<!-- /table -->\n"
    (tmp_path / "p.md").write_text(f"a\n\n````text\n{inside}````\n<!-- table compare -->\nold\n<!-- /table -->\n\nb\n")
    assert tables().main(["--check"]) == 1
    assert capsys.readouterr().out == "p.md: compare: stale\n"
    assert tables().main([]) == 0
    text = (tmp_path / "p.md").read_text()
    assert text.startswith(f"a\n\n````text\n{inside}````\n<!-- table compare -->\n| Model |")
    assert text.endswith("|\n<!-- /table -->\n\nb\n")
    assert tables().main(["--check"]) == 0
    assert tables().main(["--chek"]) == 2
    (tmp_path / "p.md").write_text(text.replace("Model", "Modell"))
    assert tables().main(["--check"]) == 1
    for wrong, said in {
        "<!-- table sizs gpt -->\n<!-- /table -->\n": "sizes",
        "<!-- table sizes -->\n<!-- /table -->\n": "FAMILY",
        "<!-- table sizes qwen4 -->\n<!-- /table -->\n": "qwen3",
        "<!-- table compare -->\n": "has no",
    }.items():
        (tmp_path / "p.md").write_text(wrong)
        capsys.readouterr()
        assert tables().main([]) == 2
        assert said in capsys.readouterr().err


def test_tables_say_what_the_specs_say() -> None:
    """A few cells, worked out elsewhere (tests/models/test_sizes.py) or by hand."""
    made, here = tables(), DOCS / "README.md"
    row = next(row for row in made.sizes_table(here, "qwen3").splitlines() if row.startswith("| 30B-A3B |"))
    assert row.split(" | ")[1:3] == ["30,532,122,624", "3,353,032,704"]
    assert row.endswith("| 128 x 768 | 40,960 | 56.87 GiB | 96 KiB |")
    assert "Active" not in made.sizes_table(here, "gpt")
    compared = made.compare_table(here)
    assert re.search(r"Qwen3\W.*\| GQA \| 40,960 to 262,144 \| weighted, before RoPE \|", compared)
    assert re.search(r"MobileLLM\W.*\| MQA, GQA \| 512 to 32,768 \| unweighted, after RoPE; no \|", compared)
    assert re.search(r"GPT\W.* \| layer norm, learned positions, plain feed-forward \| MHA \|", compared)
    groups = {row.split(" | ")[0].strip("| "): row for row in made.bysize_table(here).splitlines()}
    assert "30B-A3B" in groups["mixture of experts"]
    assert "30B-A3B" not in groups["> 10B"]
    assert " 14B, 32B" in groups["> 10B"]
    weights = made.weights_table(here, "mobilellm")
    assert "cat (permute_rope over num_heads (`model.layers.{layer}.self_attn.q_proj.weight`); " in weights
    assert "| `windows` | whole number or null, per layer | per layer: how many last" in made.traits_table(here)
    assert "| `950m` | reasoning" not in made.hub_table(here, "mobilellm")
    assert "| 950m | instruct, reasoning, chat | `facebook/MobileLLM-R1-950M` |" in made.hub_table(here, "mobilellm")
    kernels = made.kernels_table(here)
    assert "| [`swiglu`](../kernels/swiglu.py) | The gated feed-forward's activation, over the packed" in kernels
    assert r"| 3 \* numel(y) \* itemsize bytes moved; about 5 operations an element. |" in kernels
    assert made.nbytes(1536) == "1.5 KiB"
    assert [made.nbytes(n) for n in (7, 1024, 2**20 - 2**10, 2**40)] == ["7 bytes", "1 KiB", "1,023 KiB", "1,024 GiB"]


# Code


@functools.cache
def repositories() -> dict[str, tuple[str, str]]:
    """Hub repository -> (folder, size)."""
    return {
        repository: (family.name, size)
        for family in families().values()
        for size in family.sizes
        for repository in family.repositories(size).values()
    }


def stand_in(repository: str, folder: Path) -> Path:
    """A tiny checkpoint with the traits and the context of the repository's."""
    assert repository in repositories(), f"no size in models/ names {repository}"
    name, size = repositories()[repository]
    spec = families()[name].spec(size)
    ratio = min(4, spec.num_heads // spec.num_kv_heads)
    experts = {"num_experts": 4, "experts_per_token": 2, "expert_dim": 24} if any(spec.expert_layers) else {}
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 4 // ratio, "head_dim": 8, "hidden_dim": 48, **experts}
    few = spec.replace(vocab_size=VOCABULARY, embedding_dim=32, **sizes)
    tritium.save_pretrained(tritium.load_model(few, device="cpu").initialise(std=0.3), folder)
    tiny.byte_level().save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", **({} if few.family in WITHOUT_TEMPLATE else {"chat_template": TEMPLATE})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "top_k": 20, "temperature": 0.7}))
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def made(repository: str) -> Path:
        return stand_in(repository, tmp_path_factory.mktemp("checkpoint") / repository.replace("/", "--"))

    return lambda repository, progress=True: made(repository)


@pytest.fixture
def offline(stand_ins: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of its own, the CPU, nothing on standard input, and stand-ins for what the hub has."""
    pick_device = loading.pick_device
    for module in (loading, text):
        monkeypatch.setattr(module, "pick_device", lambda device: pick_device(device or "cpu"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "download", stand_ins)
    monkeypatch.setattr(summary, "parameter_count", tables().parameters)  # the same, once for each spec
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


def execute(fence: Fence, namespace: dict[str, Any], where: str) -> str:
    """Runs a block, with the page's line numbers in a traceback; gives its source."""
    source = "\n" * fence.line + fence.text
    exec(compile(source, where, "exec"), namespace)
    return source


def assert_printed(fence: Fence, printed: str, where: str) -> None:
    """Each `# prints ...` comment begins with a line that was printed; words may follow it."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    for promised in re.findall(r"# prints (.+)$", fence.text, re.MULTILINE):
        kept = [line for line in lines if promised == line or promised.startswith((f"{line}:", f"{line},", f"{line} "))]
        assert kept, f"{where}, line {fence.line}: prints {lines}, not {promised!r}"


def with_fences(*languages: str) -> list[str]:
    """The pages that have such fences; a page that is not there yet fails in a test of its own."""
    return [name for name in PAGES if (DOCS / name).is_file() and page(name).of(*languages)]


@pytest.mark.parametrize("name", [name for name in with_fences("python") if name != FOLLOWED])
@pytest.mark.usefixtures("offline")
def test_python_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for fence in page(name).of("python"):
        execute(fence, namespace, name)
        assert_printed(fence, capsys.readouterr().out, name)


def commands(name: str) -> Iterator[tuple[str, list[str]]]:
    """(line, words without the comment) of the shell lines of a page."""
    for fence in page(name).of("bash"):
        for line in fence.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield line, words


@pytest.mark.parametrize("name", with_fences("bash"))
@pytest.mark.usefixtures("offline")
def test_shell_lines_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Our own commands run; of those that need a GPU the options must exist, of others the files and make's targets."""
    written = {fence.path for fence in page(name).fences}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line, words in commands(name):
        for word in words:
            path = word.partition("::")[0]
            if re.match(r"(tests|docs|kernels|runtime|models|benchmarks)/", path) and path not in written:
                assert (ROOT / path).exists(), f"{name}: {line}"
        if words[0] == "make":
            for target in (word for word in words[1:] if "=" not in word):
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{name}: {line}"
        if words[0] != "tritium" and words[:2] != ["python", "main.py"]:
            continue
        if NEEDS_A_GPU in line:
            with pytest.raises(SystemExit):
                cli.main([words[1], "--help"])
            usage = capsys.readouterr().out
            assert [word for word in words if word.startswith("--") and word not in usage] == [], f"{name}: {line}"
            continue
        code = cli.main(words[1:]) if words[0] == "tritium" else run_main(words[2:], monkeypatch)
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), f"{name}: {line}"
        assert out.strip() or "chat" in line, f"{name}: {line}"


def run_main(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """main.py in this process; it may change the search path."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(sys, "argv", [str(ROOT / "main.py"), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """models/ as a copy that may be written to."""
    models = tmp_path / "checkout" / "models"
    for path in [*registry.MODELS.glob("*/*.yaml")]:
        (models / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, models / path.parent.name)
    monkeypatch.setattr(registry, "MODELS", models)
    monkeypatch.setattr(loading, "MODELS", models)
    registry.families.cache_clear()
    yield models
    registry.families.cache_clear()


@pytest.mark.usefixtures("offline")
def test_the_way_to_a_new_family_can_be_followed(
    own_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file that the page shows is written where it says; its code runs in between, its tests at their place."""
    here, ran = page(FOLLOWED), []
    namespace: dict[str, Any] = {"__name__": "page"}
    before = set(families())
    for fence in here.of("python", "yaml"):
        if fence.language == "yaml" and fence.path is not None:
            path = own_models.parent / fence.path
            assert not (ROOT / fence.path).exists(), f"{fence.path} is there already: the page needs another example"
            assert path.is_relative_to(own_models)
            path.parent.mkdir(exist_ok=True)
            path.write_text(fence.text, encoding="utf-8")
            registry.families.cache_clear()
            ran.append(path.name)
        elif fence.language == "python" and fence.path is not None:
            module: dict[str, Any] = {"__name__": "page"}
            execute(fence, module, FOLLOWED)
            for name, test in module.items():
                if name.startswith("test_"):
                    (tmp_path / name).mkdir()
                    test(**({"tmp_path": tmp_path / name} if "tmp_path" in inspect.signature(test).parameters else {}))
                    ran.append(name)
        elif fence.language == "python":
            execute(fence, namespace, FOLLOWED)
            assert_printed(fence, capsys.readouterr().out, FOLLOWED)
    assert len(set(families()) - before) == 1
    assert "family.yaml" in ran
    assert len([name for name in ran if name.endswith(".yaml")]) == 2
    assert len([name for name in ran if name.startswith("test_")]) >= 3
