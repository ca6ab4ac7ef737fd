"""The command line of the benchmarks."""

import argparse
import sys

from tritium.runtime.errors import TritiumError

from . import decode

BENCHMARKS = {"decode": decode.run}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tritium.benchmarks", description=__doc__)
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS, default="decode", help="which one (decode)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda ...")
    parser.add_argument("--threads", type=int, help="CPU threads for every contender; torch's choice where absent")
    parser.add_argument("--json", metavar="FILE", help="write the figures, with hardware and versions, to a file")
    options = parser.parse_args()
    try:
        BENCHMARKS[options.benchmark](options)
    except TritiumError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
