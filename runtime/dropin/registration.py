"""What `transformers` is told of us: the names under which its models find our attention and our experts."""

from .attention import attention_forward, mask, theirs

NAME = "tritium"


def register_transformers() -> None:
    """Makes attn_implementation="tritium" known to `transformers`, once; again does nothing.

    Models that name another implementation are as they were. Raises TritiumError where transformers is absent.
    """
    theirs("modeling_utils").AttentionInterface.register(NAME, attention_forward)
    theirs("masking_utils").AttentionMaskInterface.register(NAME, mask)
