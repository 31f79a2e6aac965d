"""How the networks are computed, as the settings ask."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch

from mocosfl.config import Config
from mocosfl.errors import SettingError

P = ParamSpec("P")
R = TypeVar("R")


def autocast(device: torch.device, config: Config) -> AbstractContextManager:
    """bfloat16 autocast where ``train.precision`` asks for it."""
    if config.train.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def compiled(function: Callable[P, R], config: Config) -> Callable[P, R]:
    """A function or module, through torch.compile where ``train.compile`` asks for it.

    Raises:
        SettingError: this PyTorch compiles wrongly.
    """
    if config.train.compile == "off":
        return function
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise SettingError(
            f"train.compile={config.train.compile}: PyTorch {torch.__version__} computes wrong gradients when it "
            "compiles a convolution before GroupNorm; install 2.7 or newer, or set train.compile=off"
        )
    return torch.compile(function, mode=config.train.compile, dynamic=False)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, and use it again, as PyTorch does on a GPU.

    glibc hands large blocks back to Linux at once, and a step frees and takes the same ones again: clearing their
    pages took up to two thirds of the time of a step with wide latents (benchmarks).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h: when to hand back the end of the heap (-1: never), and how many blocks to map by themselves."""


def channels_last_pays(device: torch.device, config: Config) -> bool:
    """Whether the server half runs faster with channels last, as measured (benchmarks/README.md).

    On a CPU it does, but with GroupNorm in bfloat16; on a GPU GroupNorm would turn the layout back.
    """
    grouped_bf16 = config.model.server_norm == "group" and config.train.precision == "bf16"
    return device.type == "cpu" and not grouped_bf16


def fusible(device: torch.device) -> bool:
    """Whether torch.optim has a kernel there that updates all parameters at once."""
    return device.type in ("cpu", "cuda")
