"""The classic GPT: a config by its own names, and the model."""

from ..runtime.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
