"""What one does to a model before and after training it."""

from ..runtime.model_utils import freeze, initialise, load_checkpoint, save_checkpoint, unfreeze

__all__ = ["freeze", "initialise", "load_checkpoint", "save_checkpoint", "unfreeze"]
