import torch

from mocosfl.contrast import update_momentum


def test_moves_by_one_minus_tau() -> None:
    online = [torch.randn(3, 2), torch.randn(4)]
    momentum = [torch.randn(3, 2), torch.randn(4)]
    expected = [0.9 * m + 0.1 * o for m, o in zip(momentum, online, strict=True)]
    update_momentum(momentum, online, 0.9)
    for moved, wanted in zip(momentum, expected, strict=True):
        torch.testing.assert_close(moved, wanted)


def test_tau_one_keeps_and_zero_copies() -> None:
    online, momentum = [torch.randn(5)], [torch.randn(5)]
    before = momentum[0].clone()
    update_momentum(momentum, online, 1.0)
    assert torch.equal(momentum[0], before)
    update_momentum(momentum, online, 0.0)
    torch.testing.assert_close(momentum[0], online[0])
