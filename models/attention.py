"""The attention-side layers under the names that MobileLLM's documentation uses."""

from ..runtime.layers import FeedForward, MultiHeadAttention, RMSNorm

__all__ = ["FeedForward", "MultiHeadAttention", "RMSNorm"]
