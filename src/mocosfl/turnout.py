"""When averages are due, and which of the active clients are there in a step (``clients.drop``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.config import Config
from mocosfl.data.images import upload
from mocosfl_device.randomness import DROP, uniform


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, its rounds, and its intervals from one average to the next.

    Attributes:
        steps: of the run.
        round_steps: of a round.
        every: steps between two averages; 0: none but where a round or the run ends.
        sampled: whether pools are sampled, so that rounds have an end at all.
    """

    steps: int
    round_steps: int
    every: int
    sampled: bool

    @classmethod
    def of(cls, config: Config, images: int) -> Schedule:
        """Of a run on so many training images."""
        steps = max(1, round(config.train.epochs * images / config.step_images))
        a_pass = round(images * config.pool / (config.clients.number * config.step_images))
        rounds = config.clients.round or max(1, a_pass)
        return cls(steps, rounds, config.sync.every, config.pool < config.clients.number)

    def interval(self, step: int) -> tuple[int, int]:
        """First step, from 0, of the interval that a step is in, and how many steps it has."""
        begin, end = 0, self.steps
        if self.sampled:
            begin = step - step % self.round_steps
            end = min(end, begin + self.round_steps)
        if self.every:
            begin = step - (step - begin) % self.every
            end = min(end, begin + self.every)
        return begin, end - begin


class Turnout:
    """Which active clients are there.

    Between two averages each drops out with the probability ``clients.drop``, before a step drawn at random from all of
    the interval, and is back when the next average is handed out. One client always stays: the last to leave. As all of
    it is a function of seed, interval and client, it depends neither on what came before nor on who computes it.

    Args:
        config: the whole configuration.
        images: size of the training set.
    """

    def __init__(self, config: Config, images: int) -> None:
        self.seed, self.drop, self.schedule = config.seed, config.clients.drop, Schedule.of(config, images)

    def present(self, step: int, pool: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each client of the pool, (P,) int64, is there in a step, from 0: (P,)."""
        if not self.drop:
            return np.ones(len(pool), dtype=bool)
        begin, length = self.schedule.interval(step)
        drops = uniform(self.seed, DROP, begin, pool, 0) < self.drop
        leaves = np.where(drops, (uniform(self.seed, DROP, begin, pool, 1) * length).astype(np.int64), length)
        if (leaves < length).all():
            leaves[leaves.argmax()] = length
        return step - begin < leaves


@contextmanager
def untouched(stacks: Iterable[Tensor], away: NDArray[np.int64]) -> Iterator[None]:
    """Whatever happens to tensors, (P, ...), meanwhile, the rows of clients that are away, (k,) int64, stay."""
    stacks = list(stacks)
    if not len(away) or not stacks:
        yield
        return
    rows = upload(away, stacks[0].device)
    with torch.no_grad():
        kept = [stack[rows] for stack in stacks]
    yield
    with torch.no_grad():
        for stack, before in zip(stacks, kept, strict=True):
            stack.data[rows] = before  # what is saved for the backward pass does not mind
