"""The contrast: key queue, InfoNCE, moving averages."""

from mocosfl.contrast.infonce import infonce
from mocosfl.contrast.momentum import update_momentum
from mocosfl.contrast.queue import KeyQueue

__all__ = ["KeyQueue", "infonce", "update_momentum"]
