"""Split federated self-supervised learning: train an image encoder from images that never leave their devices.

>>> import mocosfl
>>> result = mocosfl.train(mocosfl.recipe("digits"), out="runs/first")  # doctest: +SKIP
>>> encoder = mocosfl.load_encoder("runs/first")  # doctest: +SKIP
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mocosfl.config import Config
    from mocosfl.encoder import Encoder, load_encoder
    from mocosfl.evaluating import evaluate
    from mocosfl.experiment import Result, pretrain, train
    from mocosfl.recipes import recipe
    from mocosfl.trust import trust_code

__version__ = version("mocosfl")
__all__ = ["Config", "Encoder", "Result", "evaluate", "load_encoder", "pretrain", "recipe", "train", "trust_code"]

_HOME = {
    "Config": "mocosfl.config",
    "Encoder": "mocosfl.encoder",
    "Result": "mocosfl.experiment",
    "evaluate": "mocosfl.evaluating",
    "load_encoder": "mocosfl.encoder",
    "pretrain": "mocosfl.experiment",
    "recipe": "mocosfl.recipes",
    "train": "mocosfl.experiment",
    "trust_code": "mocosfl.trust",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line answers --help without loading torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'mocosfl' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
