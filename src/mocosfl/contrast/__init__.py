"""The contrast: objectives, key queue, InfoNCE, moving averages."""

from mocosfl.contrast.infonce import infonce
from mocosfl.contrast.momentum import update_momentum
from mocosfl.contrast.objectives import OBJECTIVES, Batch, Objective, objective_of, score
from mocosfl.contrast.queue import KeyQueue

__all__ = ["OBJECTIVES", "Batch", "KeyQueue", "Objective", "infonce", "objective_of", "score", "update_momentum"]
