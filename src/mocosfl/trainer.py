"""The training loop, the same for clients anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mocosfl.clients import Cohort, Stopped
from mocosfl.config import Config
from mocosfl.data.sampler import pool_of_round
from mocosfl.distributed import World
from mocosfl.errors import RunError
from mocosfl.server import Server
from mocosfl.stopwatch import Stopwatch
from mocosfl.turnout import Schedule


class Callback:
    """Something that happens beside the loop: logging, evaluation, checkpoints. A hook left out does nothing."""

    def before_training(self, trainer: Trainer) -> None:
        """Called once, before the first step or the first after a resume."""

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Called after every step; ``metrics`` are tensors on the device: reading one waits for it."""

    def after_training(self, trainer: Trainer) -> None:
        """Called once, after the last step or when the run was asked to stop."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this callback."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""


class Trainer:
    """One loop between a server and a cohort of clients (MocoSFL, algorithm 1).

    Args:
        config: the whole configuration.
        cohort: the clients.
        server: the server.
        images: size of the training set.
        callbacks: run in this order, on every process of the run.
        world: the processes of the run.

    Attributes:
        step: steps done.
        steps: steps of the whole run.
        latest: the last value of every metric that a callback has read.
        rates: learning rates of server and clients in the last step.
        stop: set to end the run after the step under way.
        stopwatch: where the time goes: clients, server, synchronise, and what callbacks count.
    """

    def __init__(
        self,
        config: Config,
        cohort: Cohort,
        server: Server,
        images: int,
        callbacks: Sequence[Callback] = (),
        world: World | None = None,
    ) -> None:
        self.config, self.cohort, self.server, self.callbacks = config, cohort, server, callbacks
        self.world = world or World()
        self.steps_per_epoch = images / config.step_images
        self.schedule = Schedule.of(config, images)
        self.steps, self.round_steps = self.schedule.steps, self.schedule.round_steps
        self.warmup = round(config.train.warmup * self.steps)
        self.step = 0
        self.stop = False
        self.latest: dict[str, float] = {}
        self.rates = (0.0, 0.0)
        self.stopwatch = Stopwatch(server.device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=server.device)

    def run(self) -> None:
        """Train from ``step`` to ``steps``."""
        for callback in self.callbacks:
            callback.before_training(self)
        sampled, phase = self.config.pool < self.config.clients.number, self.stopwatch.phase
        while self.step < self.steps and not self.world.any(self.stop):
            if sampled and self.step % self.round_steps == 0:
                self.cohort.activate(self._pool(self.step // self.round_steps))
            self.rates = server_lr, client_lr = self.rates_of(self.step)

            try:
                with phase("clients"):
                    latents = self.cohort.forward()
            except Stopped:
                break
            with phase("server"):
                gradients, metrics = self.server.step(latents, server_lr)
            if self.config.clients.drop:  # share of the images that there would be if nobody were away
                metrics["present"] = metrics["loss"].new_tensor(sum(latents.shares) / self.config.step_images)
            if gradients is not None:
                with phase("clients"):
                    metrics |= self.cohort.backward(gradients, client_lr)

            self.step += 1
            if not self.config.clients.frozen and self._at_sync_point():
                with phase("synchronise"):
                    metrics |= self.cohort.synchronise()
            self._watch(metrics["loss"])
            for callback in self.callbacks:
                callback.after_step(self, metrics)
        for callback in self.callbacks:
            callback.after_training(self)

    def _pool(self, round_: int) -> NDArray[np.int64]:
        config = self.config
        return pool_of_round(config.seed, round_, config.clients.number, config.pool, config.rich, config.pool_rich)

    def _at_sync_point(self) -> bool:
        """After every so many steps (of a round, where pools are sampled), before the pool changes, at the end."""
        begin, length = self.schedule.interval(self.step - 1)
        return self.step == begin + length

    def rates_of(self, step: int) -> tuple[float, float]:
        """Learning rates of server and clients in a step, from 0: warm-up, then a cosine, both counted in steps."""
        if step < self.warmup:
            factor = (step + 1) / self.warmup
        else:
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            factor = (1 + math.cos(math.pi * done)) / 2
        settings = self.config.train
        return factor * settings.lr, factor * (self.config.clients.lr or settings.lr)

    @property
    def epoch(self) -> float:
        """Images seen, in multiples of the training set."""
        return self.step / self.steps_per_epoch

    def every(self, epochs: float) -> bool:
        """Whether the last step completed another so many epochs."""
        if epochs == 0:
            return False
        length = epochs * self.steps_per_epoch
        return int(self.step / length + 1e-9) > int((self.step - 1) / length + 1e-9)

    def _watch(self, loss: Tensor) -> None:
        """Note the first step whose loss is not finite, without waiting for the device."""
        bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad = torch.where(bad, self.step, self._first_bad)

    def check(self) -> None:
        """Wait for the device and make sure that every loss so far was finite; callbacks do so before they log.

        Raises:
            RunError: one was not; names the first such step.
        """
        if (step := int(self._first_bad)) >= 0:
            raise RunError(
                f"the loss at step {step} is not finite; lower train.lr or clients.lr, or raise "
                "contrast.temperature or train.warmup"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to equal one that was never stopped.

        Raises:
            RunError: a loss or a weight is not finite, so there is nothing worth keeping.
        """
        self.check()
        state: dict[str, Any] = {
            "step": self.step,
            "cohort": self.cohort.state_dict(),
            "server": self.server.state_dict(),
            "latest": self.latest,
            "stopwatch": self.stopwatch.state_dict(),
            "callbacks": {type(c).__name__: c.state_dict() for c in self.callbacks},
        }
        finite = [t.isfinite().all() for t in _tensors(state) if t.is_floating_point()]
        if not torch.stack([f.cpu() for f in finite]).all():
            raise RunError(f"a weight is not finite after step {self.step}; lower train.lr or clients.lr")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.step = state["step"]
        self.cohort.load_state_dict(state["cohort"])
        self.server.load_state_dict(state["server"])
        self.latest = dict(state["latest"])
        self.stopwatch.load_state_dict(state["stopwatch"])
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(type(callback).__name__, {}))


def _tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping | list):
        for value in state.values() if isinstance(state, Mapping) else state:
            yield from _tensors(value)
