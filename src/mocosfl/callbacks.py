"""What happens beside the training loop: metrics, the kNN monitor, checkpoints, the progress line."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from mocosfl.errors import RunError
from mocosfl.latent_cache import RecallingCohort
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.observe import Observer, serve_prometheus
from mocosfl.run import Run
from mocosfl.trainer import Callback, Trainer

SECONDS_BETWEEN_LINES = 15
"""Where there is no terminal to draw on, a plain line of progress is printed this often."""


class MetricsLog(Callback):
    """Averages the metrics over ``train.log_every`` steps and writes them to metrics.jsonl and TensorBoard."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()  # steps that had the metric: not every step is a synchronisation
        self.count = 0
        self.seconds = 0.0  # over all resumes
        self.window = 0.0  # seconds of the steps since the last line

    def before_training(self, trainer: Trainer) -> None:
        """Open the log where the run stands."""
        self.run.rewind_metrics(-1 if self.run.latest_step is None else trainer.step)
        resumed = trainer.step + 1 if trainer.step else None
        self.writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=resumed)
        self.last = time.monotonic()

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Add to the sums; every so many steps, write their means."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] += 1
        self.count += 1
        self.window += self._tick()
        if trainer.step % trainer.config.train.log_every == 0 or trainer.step == trainer.steps:
            trainer.check()
            means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
            means["server_lr"], means["client_lr"] = trainer.rates
            self.window += self._tick()  # the device has caught up
            means["images_per_second"] = self.count * trainer.config.step_images / max(self.window, 1e-9)
            means |= {f"seconds/{phase}": spent for phase, spent in trainer.stopwatch.read().items()}
            self.sums, self.counts, self.count, self.window = {}, Counter(), 0, 0.0
            self.write(trainer, means)

    def write(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Write values at the trainer's step, everywhere."""
        self._tick()
        trainer.latest |= values
        record = {"step": trainer.step, "epoch": round(trainer.epoch, 4), "seconds": round(self.seconds, 2)}
        self.run.log(record | values)
        for name, value in values.items():
            self.writer.add_scalar(name, value, trainer.step)

    def _tick(self) -> float:
        now = time.monotonic()
        elapsed, self.last = now - self.last, now
        self.seconds += elapsed
        return elapsed

    def after_training(self, trainer: Trainer) -> None:
        """Write what the last evaluation took, which came after the last line; close the log."""
        if trainer.step == trainer.steps:  # not where a run was stopped: it goes on from there
            spent = {f"seconds/{phase}": value for phase, value in trainer.stopwatch.read().items()}
            if spent:
                self.write(trainer, spent)
        self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """The sums under way and the seconds spent."""
        return {
            "sums": self.sums,
            "counts": dict(self.counts),
            "count": self.count,
            "seconds": self.seconds,
            "window": self.window,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.sums, self.counts, self.count = dict(state["sums"]), Counter(state["counts"]), state["count"]
        self.seconds, self.window = state["seconds"], state["window"]


class Monitor(Callback):
    """kNN accuracy on the held-out images, before the first step, every ``evaluation.every`` epochs, and at the end.

    Args:
        log: where the accuracy is written; None on the processes that do not write.
        knn: computes it, in percent, with the clients' average half; every process takes part.

    Attributes:
        seconds: spent on it, over all resumes.
    """

    def __init__(self, log: MetricsLog | None, knn: Callable[[], float]) -> None:
        self.log, self.knn = log, knn
        self.seconds = 0.0

    def before_training(self, trainer: Trainer) -> None:
        """Measure the untrained encoder."""
        if "knn_held_out" not in trainer.latest:
            self._measure(trainer)

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Measure when it is time."""
        if trainer.every(trainer.config.evaluation.every) or trainer.step == trainer.steps:
            trainer.check()
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        began = time.monotonic()
        with trainer.stopwatch.phase("evaluate"):
            accuracy = self.knn()
        self.seconds += time.monotonic() - began
        if self.log is not None:
            self.log.write(trainer, {"knn_held_out": accuracy})

    def state_dict(self) -> dict[str, Any]:
        """The seconds spent."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.seconds = state["seconds"]


class Follower(Protocol):
    """Clients elsewhere, who are asked ahead of time."""

    def follow(self, steps: int, round_steps: int | None, stopping: Callable[[], bool]) -> None:
        """See ``RemoteCohort.follow``."""


def let_follow(cohort: Follower, trainer: Trainer) -> None:
    """Tell clients elsewhere how many steps ask for their latents, where rounds end, and when the run is to stop."""
    sampled = trainer.config.pool < trainer.config.clients.number
    steps = trainer.steps
    if isinstance(trainer.cohort, RecallingCohort):
        steps = trainer.cohort.schedule.uploads(steps)
    cohort.follow(steps, trainer.round_steps if sampled else None, lambda: trainer.stop)


class NetworkLog(Callback):
    """Figures of the network beside the metrics, and a table of the clients now and then.

    Args:
        log: where the figures are written.
        cohort: the clients; it is told how long the run is, and when it stops.
        console: where the table is drawn, every minute and at the end.
        metrics_port: of Prometheus. Unset: none.
    """

    SECONDS = 60

    def __init__(
        self, log: MetricsLog, cohort: RemoteCohort, console: Console, metrics_port: int | None = None
    ) -> None:
        self.log, self.cohort, self.console, self.port = log, cohort, console, metrics_port
        self.end: Callable[[], None] | None = None

    def before_training(self, trainer: Trainer) -> None:
        """Begin to count."""
        let_follow(self.cohort, trainer)
        self.observer = Observer(self.cohort, trainer)
        if self.port is not None:
            self.end = serve_prometheus(self.observer, self.port)
        self.last = self.drawn = time.monotonic()
        self.before, self.step = self.observer.figures(), trainer.step

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Write when it is time; draw when it is."""
        if trainer.step % trainer.config.train.log_every and trainer.step != trainer.steps:
            return
        now, figures = time.monotonic(), self.observer.figures()
        rate = 1 / max(now - self.last, 1e-9)
        values = figures | {"steps_per_second": (trainer.step - self.step) * rate}
        for way in ("in", "out"):
            name = f"socket_bytes_{way}"
            moved = figures[name] - self.before[name]
            values[f"{name}_per_client_step"] = moved / max(figures["latents"] - self.before["latents"], 1)
        self.log.write(trainer, values)
        self.last, self.before, self.step = now, figures, trainer.step
        if now - self.drawn > self.SECONDS:
            self.drawn = now
            self.console.print(self.observer.table())

    def after_training(self, trainer: Trainer) -> None:
        """Draw the table."""
        self.console.print(self.observer.table())

    def close(self) -> None:
        """End Prometheus, also after an error."""
        if self.end is not None:
            self.end()


class CollapseGuard(Callback):
    """Ends a run whose features have become one and the same: a client half that tells nothing teaches nothing.

    Looked at every ``train.log_every`` steps: the features' variance, and whether the contrast is at the level of
    guessing.
    """

    SPREAD = 1e-3
    """Least variance of normalised features; that of healthy runs was 0.2 and more."""
    FROM, STEPS = 0.1, 100
    """Nothing is expected of the first tenth of a run, nor of its first hundred steps."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Add to the sums; judge when it is time."""
        for name in ("spread", "contrast_accuracy", "loss"):
            self.sums[name] = self.sums.get(name, 0) + metrics[name]
        self.count += 1
        if trainer.step % trainer.config.train.log_every:
            return
        trainer.check()
        spread, accuracy, loss = (float(total) / self.count for total in self.sums.values())
        self.sums, self.count = {}, 0
        guess = 1 / (trainer.config.contrast.queue + 1)
        ways = 2 if trainer.config.contrast.symmetric else 1
        queue = trainer.config.contrast.objective == "moco"  # the others' losses at guessing depend on the batch
        guessing = queue and accuracy <= 2 * guess and loss / ways >= 0.95 * -math.log(guess)
        if trainer.step >= max(self.STEPS, self.FROM * trainer.steps) and (spread < self.SPREAD or guessing):
            raise RunError(
                f"training has collapsed at step {trainer.step}: the features' variance is {spread:.2g} (healthy: "
                f"0.2 and more), contrast accuracy {accuracy:.2%}, loss {loss:.3f}; lower ressfl.weight or "
                "the learning rate, set ressfl.clip, or raise ressfl.ssim_target or ressfl.warmup, and start anew"
            )

    def state_dict(self) -> dict[str, Any]:
        """The sums under way."""
        return {"sums": self.sums, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state_dict``'s result."""
        self.sums, self.count = dict(state["sums"]), state["count"]


class Checkpoints(Callback):
    """Writes the whole state every ``train.checkpoint_every`` steps, at the end, and when the run is asked to stop; and
    when clients have sent all latents that the server needs, before they are let go.

    All processes of a run put the state together; the first writes it.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.saved: int | None = None

    def before_training(self, trainer: Trainer) -> None:
        """Keep the state at the start too: then there is always one to go on from."""
        if trainer.step == 0:
            self._save(trainer)
        self.saved = trainer.step

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save when it is time."""
        if isinstance(trainer.cohort, RecallingCohort) and trainer.cohort.has_all:
            self._save(trainer)
            trainer.cohort.let_go()
        elif trainer.step % trainer.config.train.checkpoint_every == 0:
            self._save(trainer)

    def after_training(self, trainer: Trainer) -> None:
        """Save where the run ended or was stopped."""
        if self.saved != trainer.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        with trainer.stopwatch.phase("checkpoint"):
            state = trainer.state_dict()
            if trainer.world.rank == 0:
                apart = trainer.cohort.apart() if isinstance(trainer.cohort, RecallingCohort) else None
                self.run.save_checkpoint(trainer.step, state, apart)
                self.run.write_participation(state["cohort"].get("clients", state["cohort"])["drawn"].numpy())
        self.saved = trainer.step


class ProgressLine(Callback):
    """One live line: epoch, step, images/s, loss, contrast accuracy, last kNN, time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.printed = time.monotonic()

    def before_training(self, trainer: Trainer) -> None:
        """Start drawing."""
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _Facts(trainer),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=trainer.steps, completed=trainer.step)
        self.bar.start()

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=trainer.step)
        due = time.monotonic() - self.printed > SECONDS_BETWEEN_LINES or trainer.step == trainer.steps
        if not self.console.is_terminal and due:
            self.printed = time.monotonic()
            left = self.bar.tasks[0].time_remaining
            ending = "" if left is None else f"  {timedelta(seconds=round(left))} left"
            self.console.print(_facts(trainer) + ending, highlight=False, soft_wrap=True)

    def after_training(self, trainer: Trainer) -> None:
        """Stop drawing."""
        self.bar.stop()

    def close(self) -> None:
        """Stop drawing, also after an error."""
        if hasattr(self, "bar"):
            self.bar.stop()


class _Facts(ProgressColumn):
    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.trainer = trainer

    def render(self, task: Task) -> Text:
        return Text(_facts(self.trainer))


def _facts(trainer: Trainer) -> str:
    """The latest figures in one line; those not known yet are left out."""
    latest = trainer.latest
    facts = [
        f"epoch {trainer.epoch:.1f}/{trainer.config.train.epochs:g}",
        f"step {trainer.step}/{trainer.steps}",
    ]
    for name, text in (
        ("images_per_second", "{:.0f} images/s"),
        ("clients", "{:.0f} clients"),
        ("steps_per_second", "{:.1f} steps/s"),
        ("stragglers", "{:.0f} late"),
        ("loss", "loss {:.3f}"),
        ("contrast_accuracy", "contrast {:.1%}"),
        ("knn_held_out", "kNN {:.1f} %"),
    ):
        if name in latest:
            facts.append(text.format(latest[name]))
    return "  ".join(facts)
