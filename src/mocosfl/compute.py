"""How the networks are computed, as the settings ask."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ParamSpec, TypeVar

import torch

from mocosfl.config import Config

P = ParamSpec("P")
R = TypeVar("R")


def autocast(device: torch.device, config: Config) -> AbstractContextManager:
    """bfloat16 autocast where ``train.precision`` asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16")


def compiled(function: Callable[P, R], config: Config) -> Callable[P, R]:
    """A function or module, through torch.compile where ``train.compile`` asks for it."""
    if config.train.compile == "off":
        return function
    return torch.compile(function, mode=config.train.compile, dynamic=False)


def fusible(device: torch.device) -> bool:
    """Whether torch.optim has a kernel there that updates all parameters at once."""
    return device.type in ("cpu", "cuda")
