"""The families as data, a folder each, and the public names of the models, imported on first use."""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "GPT": "gpt",
    "GPTConfig": "gpt",
    "MobileLLM": "mobilellm",
    "MobileLLMConfig": "mobilellm",
    "get_mobilellm_config": "mobilellm",
    "Decoder": "decoder",
    "ModelOutput": "decoder",
}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"..runtime.{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
