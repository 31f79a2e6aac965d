import pytest
import torch

from mocosfl.contrast import KeyQueue


class NaiveQueue:
    """A list a ring: append, drop from the front."""

    def __init__(self, queue: KeyQueue) -> None:
        self.rings = [list(ring) for ring in queue.keys.clone()]

    def push(self, keys: torch.Tensor, rings: list[int]) -> None:
        for ring, new in zip(rings, keys, strict=True):
            size = len(self.rings[ring])
            self.rings[ring] = (self.rings[ring] + list(new))[-size:]


def oldest_first(queue: KeyQueue, ring: int) -> torch.Tensor:
    return queue.keys[ring].roll(-int(queue.next[ring]), 0)


@pytest.mark.parametrize(
    ("size", "counts"), [(8, [4, 4, 4]), (7, [3, 3, 3, 3]), (5, [5, 5]), (5, [12, 3]), (1, [1, 4])]
)
def test_a_shared_queue_holds_the_latest_keys(size: int, counts: list[int]) -> None:
    queue = KeyQueue(size, 3)
    naive = NaiveQueue(queue)
    for count in counts:
        keys = torch.randn(1, count, 3)
        queue.push(keys)
        naive.push(keys, [0])
        assert torch.equal(oldest_first(queue, 0), torch.stack(naive.rings[0]))


def test_rings_of_sampled_clients_move_alone() -> None:
    queue = KeyQueue(4, 3, rings=5)
    naive = NaiveQueue(queue)
    for rings, count in ([0, 3, 4], 3), ([3, 1], 2), ([4], 6), ([0, 1, 2, 3, 4], 1):
        keys = torch.randn(len(rings), count, 3)
        queue.push(keys, torch.tensor(rings))
        naive.push(keys, rings)
        for ring in range(5):
            assert torch.equal(oldest_first(queue, ring), torch.stack(naive.rings[ring]))


def test_starts_with_unit_vectors_by_seed() -> None:
    queue = KeyQueue(16, 8, seed=3)
    assert torch.allclose(queue.keys.norm(dim=2), torch.ones(1, 16))
    assert torch.equal(queue.keys, KeyQueue(16, 8, seed=3).keys)
    assert not torch.equal(queue.keys, KeyQueue(16, 8, seed=4).keys)


def test_its_place_survives_saving() -> None:
    queue, restored = KeyQueue(5, 2), KeyQueue(5, 2, seed=9)
    queue.push(torch.randn(1, 3, 2))
    restored.load_state_dict(queue.state_dict())
    more = torch.randn(1, 4, 2)
    queue.push(more)
    restored.push(more)
    assert torch.equal(queue.keys, restored.keys)
