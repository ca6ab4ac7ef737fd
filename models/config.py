"""The configurations that models are built from."""

from ..runtime.gpt import GPTConfig
from ..runtime.mobilellm import MobileLLMConfig, get_mobilellm_config
from ..runtime.spec import ModelSpec

__all__ = ["GPTConfig", "MobileLLMConfig", "ModelSpec", "get_mobilellm_config"]
