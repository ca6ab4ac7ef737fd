"""The operations of a decoder, one file each: definition and, but for the loss, kernels and launcher.

Every file opens with the operation's formula, shapes, dtype contract and floor (bytes and operations), followed by
`<op>_reference`, its definition in plain PyTorch. The definitions run anywhere torch runs, on any dtype: float64 gives
the truth that every faster implementation is measured against. Nothing here imports another Tritium package.

`from tritium.kernels import rms_norm` gives the function for anyone's model (functional.py), and so for every name of
an operation. The file of the same name is `tritium.kernels.rms_norm` in an import of what it holds: `from
tritium.kernels.rms_norm import rms_norm_reference`.
"""

if __name__ == "kernels":
    # The checkout's root is on sys.path, so this folder was found under a name that belongs to another distribution,
    # one that `transformers` imports. Hand over to that distribution; without one, look like the empty namespace that
    # importers know to ignore.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        del __file__
else:
    from .functional import *  # noqa: F403 - what its __all__ names
    from .functional import __all__ as __all__
