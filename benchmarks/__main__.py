"""Measures the kernels and whole models on this GPU: right first, then timed beside floors and peers.

Without arguments: the tests that need a GPU, every kernel and model, within ten minutes, to results/<gpu>.json and a
plot beside it. What a run did not reach, the next one takes up.
"""

import argparse
import sys
from pathlib import Path

import torch
from tritium.runtime.errors import Parser, TritiumError, nearest
from tritium.runtime.files import read_json
from tritium.runtime.loading import pick_device

from . import record, suite
from .alone import ALONE, summary

NEEDS = (
    "the benchmarks need a GPU, and torch sees none; `decode --device cpu` measures the decode step of the PyTorch "
    "path, `--device cpu --smoke --json FILE` only tries everything out"
)


def main() -> int:
    parser = Parser(
        prog="python -m tritium.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = (*suite.OPERATIONS, *ALONE, "show")
    parser.add_argument(
        "benchmark", nargs="*", metavar="WHAT",
        help=f"{', '.join(choices)}: operations, models, the step of small models beside transformers, loading beside "
        "reading, what 8 and 4 bits cost, many sequences served, a results file as a table (by --json); all operations "
        "and models by default",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu ...; the GPU where absent")
    parser.add_argument("--json", metavar="FILE", help="the results file (results/<gpu>.json)")
    parser.add_argument("--plot", metavar="FILE", help="the picture (beside the results file)")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="stop after so long (10)")
    parser.add_argument("--case", metavar="TEXT", help="only cases whose `operation: name` contains this")
    parser.add_argument("--again", action="store_true", help="measure what was measured with this code, too")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="leave out the tests that need a GPU")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, once, in Triton's interpreter on the CPU")
    parser.add_argument("--threads", type=int, help="decode, loading: CPU threads for every contender (torch's choice)")
    options = parser.parse_args()
    try:
        for name in options.benchmark:
            if name not in choices:
                raise TritiumError(f"unknown {name!r}; {nearest(name, choices)}")
        return _run(options)
    except TritiumError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if not options.minutes > 0:
        raise TritiumError(f"--minutes: must be above 0, got {options.minutes}")
    if options.threads is not None and options.threads < 1:
        raise TritiumError(f"--threads: must be 1 or more, got {options.threads}")
    alone = ALONE.get(options.benchmark[0]) if len(options.benchmark) == 1 else None
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and (Path(path).is_dir() or (alone and not Path(path).parent.is_dir())):
            raise TritiumError(f"--{name}: {path}: give a file in a folder that exists")
    if {*ALONE, "show"} & set(options.benchmark) and len(options.benchmark) > 1:
        raise TritiumError(f"{', '.join(ALONE)} and show go alone")
    if options.benchmark == ["show"]:
        if not options.json:
            raise TritiumError("show: name a results file by --json")
        found = read_json(Path(options.json))
        try:
            print(summary(found) if "results" in found else record.summary(record.read(Path(options.json))))
        except (KeyError, TypeError, AttributeError):
            raise TritiumError(f"{options.json}: not a results file") from None
        return 0
    if alone is not None:
        options.device = options.device or "cpu"
        alone.run(options)
        return 0
    if options.device is None and not torch.cuda.is_available():
        raise TritiumError(NEEDS)
    options.device = str(pick_device(options.device))
    if options.device == "cpu" and not options.smoke:
        raise TritiumError(NEEDS)
    if options.device != "cpu" and options.smoke:
        raise TritiumError("--smoke: runs in the interpreter, with --device cpu")
    # Tests belong to the one command, not to a question about one operation.
    options.tests = options.tests and not options.smoke and not options.benchmark and options.case is None
    return suite.run(options)


if __name__ == "__main__":
    sys.exit(main())
