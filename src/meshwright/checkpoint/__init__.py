"""Checkpoints: two doors, `save` and `load`, in front of `torch.distributed.checkpoint`."""

from meshwright.checkpoint.folders import latest, prune, step_folder
from meshwright.checkpoint.load import load
from meshwright.checkpoint.save import save

__all__ = ["latest", "load", "prune", "save", "step_folder"]
