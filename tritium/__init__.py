"""Tritium: a transformer runtime for Qwen and MobileLLM models.

The sub-packages `tritium.kernels`, `tritium.runtime`, `tritium.models` and `tritium.benchmarks` lie beside this folder
in a checkout and inside it in a wheel.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "setup.py").is_file():
    __path__.append(str(_root))

_PUBLIC = {
    "load": "loading",
    "load_pretrained_model": "loading",
    "load_config": "loading",
    "load_model": "loading",
    "save_pretrained": "checkpoint",
    "add_lora": "lora",
    "merge_lora": "lora",
    "load_adapter": "lora_files",
    "save_adapter": "lora_files",
    "register_transformers": "dropin.registration",
    "kernel_mapping": "dropin.hub_kernels",
    "from_transformers": "dropin.conversion",
    "to_transformers": "dropin.conversion",
    "accelerate": "dropin.accelerate",
    "TextGenerator": "text",
    "Engine": "engine.engine",
    "SamplingOptions": "generation",
    "Decoder": "decoder",
    "ModelOutput": "decoder",
    "ModelSpec": "spec",
    "Tokenizer": "tokenizer",
    "TritiumError": "errors",
}


def __getattr__(name: str) -> Any:
    """Public names, imported on first use; `load_<family>` exists for every family in models/."""
    if name in _PUBLIC:
        return getattr(import_module(f".runtime.{_PUBLIC[name]}", __name__), name)
    if name.startswith("load_"):
        return import_module(".runtime.loading", __name__).family_loader(name.removeprefix("load_"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
