"""`python main.py --model qwen3 --size 0.6B --prompt "..."`, or `--chat --stream`: the command line from a checkout.

Without `--chat` it is `tritium generate`, with it `tritium chat`; other commands, such as
`python main.py models`, work too. It needs no installation.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    import tritium  # noqa: F401 - found through the folder of this script, which python puts first on sys.path

    root = Path(__file__).resolve().parent
    # From here on the folders at the root are reachable as tritium.<folder> only.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    from tritium.runtime.cli import main

    arguments = [argument for argument in sys.argv[1:] if argument != "--chat"]
    if not arguments or arguments[0].startswith("-"):  # no command of its own
        arguments.insert(0, "chat" if "--chat" in sys.argv else "generate")
    sys.exit(main(arguments))
