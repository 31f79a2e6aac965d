"""Which images each client of the pool draws in a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mocosfl.data.partition import Partition
from mocosfl_device.randomness import POOL, bits, items


def pool_of_round(
    seed: int, round_: int, number: int, size: int, rich: int = 0, rich_size: int = 0
) -> NDArray[np.int64]:
    """Draw the clients of one round.

    Args:
        seed: the run's seed.
        round_: number of the round, from 0.
        number: N, all clients.
        size: clients to draw.
        rich: how many of all clients, the last ones by number, are rich.
        rich_size: how many of those to draw.

    Returns:
        (size,) int64 client numbers in ascending order, all N of them where ``size`` is N.
    """
    if size == number:
        return np.arange(number)
    keys = bits(seed, POOL, round_, np.arange(number))
    poor, poor_size = number - rich, size - rich_size
    drawn = [np.argpartition(keys[:poor], poor_size - 1)[:poor_size]] if poor_size else []
    if rich_size:
        drawn.append(poor + np.argpartition(keys[poor:], rich_size - 1)[:rich_size])
    return np.sort(np.concatenate(drawn))


def with_stand_ins(seed: int, step: int, pool: NDArray[np.int64], present: NDArray[np.int64]) -> NDArray[np.int64]:
    """Replace clients that are away by others that are there, drawn alike.

    Args:
        seed: the run's seed.
        step: at which the round begins.
        pool: (P,) int64, the clients of the round.
        present: (p,) int64, all that are there, in ascending order.

    Returns:
        (P,) int64 client numbers in ascending order; those for whom nobody stands in are still among them.
    """
    away, others = np.setdiff1d(pool, present), np.setdiff1d(present, pool)
    order = np.argsort(bits(seed, POOL, step, others, 1))
    stand_in = others[order][: len(away)]
    return np.union1d(np.setdiff1d(pool, away[: len(stand_in)]), stand_in)


class ClientSampler:
    """Sampling without replacement: each client goes through its images in an order of its own, anew every epoch.

    A draw is a client's d-th image since the run began; which image that is depends on (seed, client, d) alone. The
    only state is the number of images each client has drawn.

    Attributes:
        drawn: (N,) int64, images that each client has drawn so far.
    """

    def __init__(self, partition: Partition, seed: int) -> None:
        self.partition = partition
        self.seed = seed
        self.drawn = np.zeros(len(partition), dtype=np.int64)

    def draw(
        self, pool: NDArray[np.int64], batches: NDArray[np.int64] | int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the next images of every client of the pool.

        Args:
            pool: (P,) int64 client numbers, distinct.
            batches: images of each client, (P,) int64, or one number for all; n is their sum.

        Returns:
            The rows of the training set, (n,) int64, client after client, and the number of each draw, (n,) int64.
        """
        batches = np.broadcast_to(batches, pool.shape)
        client = np.repeat(pool, batches)
        within = np.arange(len(client)) - np.repeat(batches.cumsum() - batches, batches)
        draws = self.drawn[client] + within
        self.drawn[pool] += batches
        start, stop = self.partition.offsets[client], self.partition.offsets[client + 1]
        item, _ = items(self.seed, client, draws, stop - start)
        return self.partition.rows[start + item], draws
