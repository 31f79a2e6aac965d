"""Which images each client of the pool draws in a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mocosfl.data.partition import Partition
from mocosfl.randomness import ORDER, POOL, bits, permuted


def pool_of_round(seed: int, round_: int, number: int, size: int) -> NDArray[np.int64]:
    """Draw the clients of one round.

    Args:
        seed: the run's seed.
        round_: number of the round, from 0.
        number: N, all clients.
        size: clients to draw.

    Returns:
        (size,) int64 client numbers in ascending order, all N of them where ``size`` is N.
    """
    if size == number:
        return np.arange(number)
    keys = bits(seed, POOL, round_, np.arange(number))
    return np.sort(np.argpartition(keys, size - 1)[:size])


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

    def draw(self, pool: NDArray[np.int64], batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draw the next images of every client of the pool.

        Args:
            pool: (P,) int64 client numbers, distinct.
            batch: B, images a client.

        Returns:
            The rows of the training set, (P, B) int64, and the number of each draw, (P, B) int64.
        """
        sizes, starts = self.partition.sizes[pool, None], self.partition.offsets[pool, None]
        draws = self.drawn[pool, None] + np.arange(batch)
        self.drawn[pool] += batch
        epoch, position = draws // sizes, draws % sizes
        item = permuted(position, sizes, self.seed, ORDER, pool[:, None], epoch)
        return self.partition.rows[starts + item], draws
