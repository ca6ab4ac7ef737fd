"""What `transformers` is told of us: the name under which its models find our attention and our experts."""

from .attention import attention_forward, mask
from .experts import experts_forward
from .packages import theirs

NAME = "tritium"


def register_transformers() -> None:
    """Makes attn_implementation="tritium" and experts_implementation="tritium" known to `transformers`; again is
    harmless.

    Models that name other implementations are as they were. Raises TritiumError where transformers is absent.
    """
    theirs("modeling_utils").AttentionInterface.register(NAME, attention_forward)
    theirs("masking_utils").AttentionMaskInterface.register(NAME, mask)
    theirs("integrations.moe").ExpertsInterface.register(NAME, experts_forward)
