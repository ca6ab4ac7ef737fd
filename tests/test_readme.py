"""The README says what is true today: its tables are the program's output, its example runs, its tree is the tree."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from tritium.benchmarks.decode import summary
from tritium.runtime.summary import model_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    """The text between a marker and its end, without the fence."""
    found = re.search(rf"<!-- {name} -->\n```\n(.*?)\n```\n<!-- /{name} -->", README, re.DOTALL)
    assert found, f"README.md has no section {name}"
    return found[1]


def test_models_table_is_current() -> None:
    assert section("models") == model_table()


def test_decode_table_is_the_results_file() -> None:
    record = json.loads((ROOT / "benchmarks/results/cpu-decode.json").read_text())
    assert section("decode") == summary(record)
    assert len(record["results"]) == 4


def test_stated_figures_are_the_bundled_models() -> None:
    stated = json.loads((ROOT / "models/mobilellm/shakespeare/results.json").read_text())["held_out_bits_per_byte"]
    for name in ("model", "kneser_ney_5gram_tokens", "kneser_ney_5gram_bytes"):
        assert f"{stated[name]:.3f}" in README


def test_stated_costs_of_quantisation_are_the_results_file() -> None:
    rows = json.loads((ROOT / "benchmarks/results/cpu-quantised.json").read_text())["results"]
    text = " ".join(README.split())
    int8, int4 = (f"{row['bits_per_byte']:.4f}" for row in rows)
    dense = f"{rows[0]['dense_bits_per_byte']:.4f}"
    assert f"costs {int8} bits per byte in 8 bits and {int4} in 4, instead of {dense};" in text
    int8, int4 = (f"{row['divergence']:.2e}" for row in rows)
    assert f"are {int8} and {int4} nats a token from what they were" in text


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    assert len(example[1].strip().splitlines()) <= 10
    exec(compile(example[1], "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "6 2877888 " in out.splitlines()[-1]


def test_the_tree_lists_every_file() -> None:
    """Each tracked file outside tests is named, or its folder's pattern is; nothing named is missing."""
    tree = section("tree")
    named = set(re.findall(r"^ *([\w./<>*-]+)", tree, re.MULTILINE))
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = listed.stdout.split("\n")
    for path in filter(None, tracked):
        top = path.split("/")[0]
        if top in ("kernels", "runtime") and path.endswith(".py") and not path.endswith("__init__.py"):
            assert Path(path).name in named, path
        elif "/" not in path and not path.startswith("."):
            assert path in named, path
        else:
            assert f"{top}/" in named or top in named or top.startswith("."), path
    for name in named:
        if name.endswith(".py") and "<" not in name:
            assert any(path.endswith(name) for path in tracked), name
