"""The blocks and the stack under the names that MobileLLM's documentation uses."""

from ..runtime.layers import TransformerBlock, TransformerDecoder

__all__ = ["TransformerBlock", "TransformerDecoder"]
