"""Runs the modelling and generation tests of `transformers` itself, as they are and against accelerated models.

    python -m tests.dropin.suite /path/to/transformers [--models qwen3 gpt2 ...] [-- -k generate]

Takes a source checkout, whose own source is what runs. Each model's tests run twice, in processes of their own; the
second time this file is a plugin there, and every model that a test builds or loads is accelerated before it gets it.
Prints the tests that pass as they are and fail with us, and exits with 1 if there are any but those `BY_DESIGN`.
"""

import argparse
import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

MODELS = ("qwen2", "qwen3", "qwen3_moe", "llama", "llama4", "gpt2")
HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
VARIABLE = "TRITIUM_ACCELERATES"  # the families whose models the plugin accelerates
BY_DESIGN = {  # tests that fail because a model is accelerated, whatever it computes
    "test_can_set_attention_dynamically": "asks that a new model's attention have the name that its config gave",
    "test_sdpa_can_dispatch_non_composite_models": "asks the same",
    "test_attention_outputs": "takes a config from a model and sets output_attentions, which only eager attention may",
}


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin: the models of the families named accelerate themselves once they are built."""
    for family in os.environ.get(VARIABLE, "").split():
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        base = import_module("transformers").PreTrainedModel
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, base) and cls.__module__ == module.__name__:
                accelerates(cls)


def accelerates(cls: Any) -> None:
    """Makes a class accelerate the models that are made of it or loaded with it, but not the parts of others."""
    import tritium

    building: list[Any] = accelerates.__dict__.setdefault("building", [])
    known: set[Any] = accelerates.__dict__.setdefault("known", set())
    known.add(cls)

    def outermost(make: Any) -> Any:
        @functools.wraps(make)
        def made(first: Any, *args: Any, **kwargs: Any) -> Any:
            building.append(first)
            try:
                result = make(first, *args, **kwargs)
            finally:
                building.pop()
            model = first if result is None else result
            if not building and type(model) in known:
                tritium.accelerate(model)
            return result

        return made

    cls.__init__ = outermost(cls.__init__)
    cls.from_pretrained = classmethod(outermost(cls.from_pretrained.__func__))


def outcomes(checkout: Path, family: str, accelerated: bool, options: list[str]) -> dict[str, tuple[str, str]]:
    """Of each test of a family, how it ended (passed, skipped, failed) and the last line of what it said."""
    paths = [str(checkout / "src"), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    env |= {VARIABLE: family} if accelerated else {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "suite", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", f"tests/models/{family}/test_modeling_{family}.py", *options]
        run = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
        if run.returncode not in (0, 1):  # 1: tests ran, and some failed
            raise SystemExit(f"{' '.join(command)} did not run in {checkout}:\n{(run.stdout + run.stderr)[-2000:]}")
        return {
            f"{case.get('classname')}::{case.get('name')}": outcome(case)
            for case in ElementTree.parse(report).getroot().iter("testcase")
        }


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    """How one test of a report ended, and its message."""
    for kind, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(kind)) is not None:
            return name, (found.get("message") or "").strip().splitlines()[0][:200] if found.get("message") else ""
    return "passed", ""


def only_with_us(before: dict[str, tuple[str, str]], after: dict[str, tuple[str, str]]) -> dict[str, str]:
    """The tests that passed or were skipped as they are, and fail, or are not there, with us; what each says."""
    missing = ("failed", "it did not run")
    ends = {name: after.get(name, missing) for name, (end, _) in before.items() if end != "failed"}
    return {name: message for name, (end, message) in ends.items() if end == "failed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("options", nargs="*", help="after --: for pytest, such as -k or -n")
    arguments = parser.parse_args()
    found = 0
    for family in arguments.models:
        before, after = (outcomes(arguments.checkout, family, us, arguments.options) for us in (False, True))
        worse = only_with_us(before, after)
        for run, ends in (("as they are", before), ("accelerated", after)):
            print(f"{family} {run}: {dict(Counter(end for end, _ in ends.values()))}")
        for name, message in worse.items():
            reason = BY_DESIGN.get(name.rpartition("::")[2])
            found += reason is None
            print(f"  fails only with us: {name}: {reason or message}", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
