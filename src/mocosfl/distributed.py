"""Several processes, one run: whose part is which, and how the parts are put together.

Started by ``torchrun --nproc-per-node=4 -m mocosfl train ...``. Without it there is one process, every part is the
whole, and nothing here communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor

from mocosfl.errors import MocosflError, ReportedElsewhere, RunError

T = TypeVar("T")


class World:
    """The processes of a run.

    Attributes:
        rank: number of this process. The one with rank 0 writes.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def share(self, count: int, rank: int | None = None) -> slice:
        """A process's part of ``count`` things: consecutive, in the order of ranks, the first ones one longer.

        Args:
            count: things to share.
            rank: whose part. Unset: this process's.
        """
        rank = self.rank if rank is None else rank
        least, more = divmod(count, self.size)
        start = rank * least + min(rank, more)
        return slice(start, start + least + (rank < more))

    def lengths(self, count: int) -> list[int]:
        """How many of ``count`` things each process has, in the order of ranks."""
        parts = [self.share(count, rank) for rank in range(self.size)]
        return [part.stop - part.start for part in parts]

    def gather(self, part: Tensor, lengths: Sequence[int], dim: int = 0) -> Tensor:
        """Concatenate every process's part.

        Args:
            part: this process's, of ``lengths[rank]`` along ``dim``.
            lengths: of all parts.
            dim: along which to concatenate.

        Returns:
            The same on every process; no gradient flows through it.
        """
        if self.size == 1:
            return part
        longest = max(lengths)
        mine = part.detach().movedim(dim, 0)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        with self.together():
            dist.all_gather(everyone, padded)
        whole = torch.cat([tensor[:length] for tensor, length in zip(everyone, lengths, strict=True)])
        return whole.movedim(0, dim)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of one dtype, by their sums over all processes."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message, however many tensors
        with self.together():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.size == 1:
            return flag
        shared = torch.tensor(int(flag))
        with self.together():
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared)

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something, and give everybody what came out.

        Args:
            work: returns something that can be pickled.

        Raises:
            ReportedElsewhere: on the other processes, where the first one's work raised a ``MocosflError``.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        error: MocosflError | None = None
        if self.rank == 0:
            try:
                result = work()
            except MocosflError as raised:
                error = raised
        message = [(result, error is None)]
        with self.together():
            dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if not message[0][1]:
            raise ReportedElsewhere("the first process of the run met an error")
        return message[0][0]  # type: ignore[return-value]

    def lead(self, work: Callable[[], T]) -> T:
        """Let everybody do something, the first process before the others: it fills caches, and meets errors first.

        Raises:
            ReportedElsewhere: as ``first``.
        """
        mine: list[T] = []
        self.first(lambda: mine.append(work()) if self.rank == 0 else None)
        return mine[0] if mine else work()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes; gradients flow through it, and are summed too."""
        return tensor if self.size == 1 else _Sum.apply(tensor, self)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around a call that needs all processes.

        Raises:
            RunError: one of them is gone.
        """
        try:
            yield
        except RuntimeError as error:  # as gloo reports it; the errors of torch.distributed are its subclasses
            reason = str(error).partition("\n")[0][:200]
            raise RunError(
                f"an exchange failed, most likely as another of the run's {self.size} processes has ended ({reason})"
            ) from error


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        total = tensor.clone()
        world.add([total])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        ctx.world.add([total])
        return total, None


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the other processes that torchrun has started, if it has.

    Args:
        device: this process's: CUDA tensors go through nccl, all others through gloo.
    """
    # torch.distributed.nn binds the group of all processes as a default argument where it is imported after the group
    # exists, as torch.optim does. Then the group outlives its destruction, and its threads abort the process at exit.
    # So it is imported above.
    if dist.is_initialized():  # by the program that uses this library
        yield World(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
    else:
        # A process that is gone is noticed by its closed connection. One that loads data may take its time.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
        try:
            yield World(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
