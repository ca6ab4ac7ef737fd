"""The tables of docs/ that come from data: `python docs/tables.py` writes them anew, `--check` names the stale ones.

A page holds a table between two marker lines:

    <!-- table NAME ARGUMENTS -->
    <!-- /table -->

NAME is one of TABLES below. What lies between the markers belongs to this script; markers inside a fence are text.
"""

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not docs/, and nothing called `kernels` or `models` is imported by that name

from tritium.benchmarks import alone, record  # noqa: E402
from tritium.runtime.errors import TritiumError, nearest  # noqa: E402
from tritium.runtime.files import read_json, read_text  # noqa: E402
from tritium.runtime.registry import Family, families, get_family  # noqa: E402
from tritium.runtime.spec import ModelSpec  # noqa: E402
from tritium.runtime.summary import active_parameters, cache_bytes_per_token, parameter_count  # noqa: E402

OPENING = re.compile(r"<!-- table (\w+)((?: \S+)*) -->")
CLOSING = "<!-- /table -->"
FENCE = re.compile(r" *(`{3,}|~{3,})")
NAMES = {"gpt": "GPT", "llama": "Llama", "mobilellm": "MobileLLM", "qwen1": "Qwen1", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TYPES = {"int": "whole number", "float": "number", "bool": "truth value", "str": "text", "None": "null"}


@cache
def parameters(spec: ModelSpec) -> int:
    """`parameter_count`, once for each spec."""
    return parameter_count(spec)


def grid(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table, the first row its heading; columns in `right` are aligned to the right."""
    rule = ["---:" if column in right else "---" for column in range(len(rows[0]))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


def nbytes(count: float) -> str:
    """`1.5 KiB`, `267.5 MiB`, `1.11 GiB`."""
    unit = "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if count >= 1024:
            count, unit = count / 1024, larger
    return f"{count:,.2f}".rstrip("0").rstrip(".") + f" {unit}"


def plain(text: str) -> str:
    """A text as a table's cell: one line, nothing of it read as Markdown."""
    return re.sub(r"([*|<])", r"\\\1", " ".join(text.split()))


def specs(family: Family) -> dict[str, ModelSpec]:
    return {size: family.spec(size) for size in family.sizes}


def sizes_table(page: Path, family: str) -> str:
    """The configurations of one folder, smallest first."""
    found = specs(get_family(family))
    experts = any(any(spec.expert_layers) for spec in found.values())
    heading = ["Model", "Parameters", *(["Active"] if experts else []), "Embedding dim", "Layers", "Heads", "KV heads"]
    rows = [[*heading, "Head dim", "Hidden dim", "Context", "Weights", "Cache per token"]]
    for size, spec in found.items():
        count = parameters(spec)
        # A model all of whose layers have experts has no other feed-forward.
        hidden = f"{spec.num_experts} x {spec.expert_dim:,}" if all(spec.expert_layers) else f"{spec.hidden_dim:,}"
        layers = str(spec.num_layers) if spec.layer_repeat == 1 else f"{spec.num_layers} x {spec.layer_repeat}"
        numbers = (f"{spec.embedding_dim:,}", layers, str(spec.num_heads), str(spec.num_kv_heads), str(spec.head_dim))
        active = [f"{active_parameters(spec, count):,}"] if experts else []
        memory = (nbytes(count * spec.torch_dtype.itemsize), nbytes(cache_bytes_per_token(spec)))
        rows.append([size, f"{count:,}", *active, *numbers, hidden, f"{spec.context_length:,}", *memory])
    return grid(rows, range(1, len(rows[0])))


def spec_table(page: Path, family: str, size: str) -> str:
    """One size's YAML as it is."""
    chosen = get_family(family)
    path = chosen.folder / f"{chosen.size_name(size)}.yaml"
    return f"```yaml\n# {path.relative_to(ROOT).as_posix()}\n{read_text(path).rstrip()}\n```"


def hub_table(page: Path, family: str) -> str:
    """Variant -> repository of every size."""
    chosen = get_family(family)
    rows = [["Model", "Variant", "Repository"]]
    for size in chosen.sizes:
        if size in chosen.bundled:
            rows.append([size, "any", f"bundled: `models/{chosen.folder.name}/{chosen.bundled[size]}/`"])
            continue
        variants: dict[str, list[str]] = {}
        for variant, repository in chosen.repositories(size).items():
            variants.setdefault(f"`{repository}`", []).append(variant)
        for repository, names in (variants or {"random weights only": ["-"]}).items():
            rows.append([size, ", ".join(names), repository])
    return grid(rows)


def compare_table(page: Path) -> str:
    """The families beside each other."""
    rows = [["Model", "Architecture", "Attention", "Context", "QK norm", "Sizes"]]
    for family in families().values():
        found = specs(family)
        if not found:  # its sizes lie in another's folder
            continue
        contexts = sorted({spec.context_length for spec in found.values()})
        reach = f"{contexts[0]:,}" if len(contexts) == 1 else f"{contexts[0]:,} to {contexts[-1]:,}"
        kinds = ", ".join(dict.fromkeys(_attention(spec) for spec in found.values()))
        norms = "; ".join(dict.fromkeys(_qk_norm(spec) for spec in found.values()))
        architecture = ", ".join(dict.fromkeys(part for spec in found.values() for part in _architecture(spec)))
        rows.append([_linked(page, family.name), architecture, kinds, reach, norms, ", ".join(found)])
    return grid(rows)


def _linked(page: Path, family: str) -> str:
    """A family's name, linked to its page where it has one."""
    name = NAMES.get(family, family)
    target = DOCS / "models" / f"{name}.md"
    link = Path(os.path.relpath(target, page.parent)).as_posix()
    return f"**[{name}]({link})**" if target.is_file() else f"**{name}**"


def _architecture(spec: ModelSpec) -> Iterator[str]:
    yield "RMSNorm" if spec.norm == "rms" else "layer norm"
    yield "RoPE" if spec.positions == "rope" else "learned positions"
    yield "mixture of experts" if all(spec.expert_layers) else "SwiGLU" if spec.mlp == "gated" else "plain feed-forward"
    yield from ["repeated layers"] if spec.layer_repeat > 1 else []


def _attention(spec: ModelSpec) -> str:
    return "MHA" if spec.num_kv_heads == spec.num_heads else "MQA" if spec.num_kv_heads == 1 else "GQA"


def _qk_norm(spec: ModelSpec) -> str:
    return "no" if spec.qk_norm == "none" else f"{spec.qk_norm}, {spec.qk_norm_position.replace('_rope', ' RoPE')}"


def weights_table(page: Path, family: str) -> str:
    """A family's weight map."""
    chosen = get_family(family)
    rows = [["Parameter", "Checkpoint"], *([f"`{name}`", _rule(rule)] for name, rule in chosen.weights.items())]
    rows += [["ignored", f"`{pattern}`"] for pattern in chosen.ignore]
    rows += [["before every name, or not", f"`{chosen.optional_prefix}`"]] if chosen.optional_prefix else []
    return grid(rows)


def _rule(rule: Any) -> str:
    """A weight rule in words, by the names of runtime/weight_map.py."""
    if isinstance(rule, str):
        return f"`{rule}`"
    kind, inner = next(iter(rule.items()))
    parts = "; ".join(map(_rule, inner if isinstance(inner, list) else [inner]))
    argument = next((f" over {value}" for key, value in rule.items() if key in ("over", "heads")), "")
    return f"{kind}{argument} ({parts})"


def traits_table(page: Path) -> str:
    """The fields of ModelSpec with their types, and what their comments say."""
    source = read_text(ROOT / "runtime" / "spec.py")
    lines = source.splitlines()
    (spec,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "ModelSpec")
    assert isinstance(spec, ast.ClassDef)
    rows = [["Field", "Type", "Meaning"]]
    section_end = spec.lineno
    for node in spec.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = (line.strip() for line in lines[section_end : node.lineno - 1])
        rows += [[f"*{plain(line[2:])}*", "", ""] for line in above if line.startswith("# ")]
        section_end = node.lineno
        comment = lines[node.lineno - 1].partition("  # ")[2]
        rows.append([f"`{ast.unparse(node.target)}`", _type(node.annotation), plain(comment)])
    return grid(rows)


def _type(annotation: ast.expr) -> str:
    """`tuple[int | None, ...]` -> list of whole number or null."""
    if isinstance(annotation, ast.BinOp):
        return f"{_type(annotation.left)} or {_type(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if ast.unparse(annotation.value) == "Literal":
            return ", ".join(f"`{ast.literal_eval(value)}`" for value in inner)
        return f"{_type(inner[0])}, per layer"
    return TYPES.get(ast.unparse(annotation), "mapping with a `rope_type`")


def results_table(page: Path, name: str) -> str:
    """What benchmarks/results/NAME.json holds, as the benchmarks themselves print it."""
    found = read_json(ROOT / "benchmarks" / "results" / f"{name}.json")
    text = record.summary(found) if "rows" in found else alone.summary(found)
    return f"```text\n{text}\n```"


def bysize_table(page: Path) -> str:
    """All sizes, grouped by parameters; a mixture of experts is a group of its own."""
    groups: dict[str, dict[str, list[str]]] = {"< 2B": {}, "2B to 10B": {}, "> 10B": {}, "mixture of experts": {}}
    for family in families().values():
        for size, spec in specs(family).items():
            count = parameters(spec)
            group = "< 2B" if count < 2e9 else "2B to 10B" if count < 1e10 else "> 10B"
            group = "mixture of experts" if any(spec.expert_layers) else group
            groups[group].setdefault(_linked(page, family.name), []).append(size)
    rows = [["Parameters", "Models"]]
    for group, found in groups.items():
        rows.append([plain(group), "; ".join(f"{name} {', '.join(names)}" for name, names in found.items())])
    return grid(rows)


def kernels_table(page: Path) -> str:
    """The operations: first line and floor of each file's docstring."""
    rows = [["Operation", "What it is", "Floor"]]
    for path in sorted((ROOT / "kernels").glob("*.py")):
        if path.stem in ("__init__", "functional", "launch", "linear_phase", "overlap", "step_kernel", "step_tables"):
            continue
        docstring = ast.get_docstring(ast.parse(read_text(path))) or ""
        floor = re.search(r"^Floor: (.+?\.)(?=\s|\Z)", docstring, re.DOTALL | re.MULTILINE)
        assert floor is not None, path  # tests/test_structure.py asks for it
        link = Path(os.path.relpath(path, page.parent)).as_posix()
        rows.append([f"[`{path.stem}`]({link})", plain(docstring.partition("\n")[0]), plain(floor[1])])
    return grid(rows)


TABLES: dict[str, Callable[..., str]] = {
    function.__name__.removesuffix("_table"): function
    for function in (
        sizes_table, spec_table, hub_table, compare_table, weights_table, traits_table, results_table, bysize_table,
        kernels_table,
    )
}  # fmt: skip


def pieces(text: str, page: Path) -> Iterator[tuple[str, str, str]]:
    """(a table's marker, else "", text as it is, text as it should be). Raises TritiumError for a wrong marker."""
    lines, fence, index = text.splitlines(keepends=True), "", 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if mark := FENCE.match(line):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        yield "", line, line
        opening = None if fence else OPENING.fullmatch(line.strip())
        if opening is None:
            continue
        words, start = f"{opening[1]}{opening[2]}", index
        while index < len(lines) and lines[index].strip() != CLOSING:
            index += 1
        if index == len(lines):
            raise TritiumError(f"{page}: the table `{words}` has no {CLOSING}")
        yield words, "".join(lines[start:index]), f"{_made(words, page)}\n"


@cache
def _made(words: str, page: Path) -> str:
    name, *arguments = words.split()
    if name not in TABLES:
        raise TritiumError(f"{page}: unknown table {name!r}; {nearest(name, TABLES)}")
    takes = list(inspect.signature(TABLES[name]).parameters)[1:]
    if len(arguments) != len(takes):
        raise TritiumError(f"{page}: the table `{words}` takes {' '.join(takes).upper() or 'nothing'} behind its name")
    return TABLES[name](page, *arguments)


def stale(page: Path) -> list[str]:
    """The markers of a page's tables that are not what the data gives."""
    return [words for words, is_now, should_be in pieces(read_text(page), page) if is_now != should_be]


def main(arguments: Sequence[str]) -> int:
    """Rewrites, or with `--check` tells and returns 1 where something is stale; 2 for a mistake."""
    if list(arguments) not in ([], ["--check"]):
        print(f"usage: python docs/tables.py [--check], got {' '.join(arguments)}", file=sys.stderr)
        return 2
    done = "stale" if arguments else "written"
    try:
        found = {page: stale(page) for page in sorted(DOCS.rglob("*.md"))}
        for page, tables in found.items():
            print("".join(f"{page.relative_to(ROOT)}: {words}: {done}\n" for words in tables), end="")
            if tables and not arguments:
                page.write_text("".join(new for _, _, new in pieces(read_text(page), page)), encoding="utf-8")
    except TritiumError as error:
        print(f"docs/tables.py: error: {error}", file=sys.stderr)
        return 2
    return int(bool(arguments) and any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
