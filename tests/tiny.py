"""A run that many tests make."""

from mocosfl.config import Config

DIGITS = {
    "data.source": "digits",
    "data.size": 8,
    "data.channels": 1,
    "data.held_out": 0.1,
    "partition.kind": "iid",
    "model.width": 4,
    "model.head": "v1",
    "contrast.queue": 64,
    "clients.number": 3,
    "clients.batch": 4,
    "sync.every": 4,
    "train.lr": 0.01,
    "train.epochs": 0.2,
    "train.log_every": 1,
    "train.checkpoint_every": 5,
    "evaluation.every": 0,
    "evaluation.probe_epochs": 0,
}
"""A real but tiny run on digits: 22 steps."""


def digits(**changes: object) -> Config:
    return Config().updated(DIGITS | changes)
