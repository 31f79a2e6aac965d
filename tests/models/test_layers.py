"""Layers that the backbones share."""

import threading

import torch
from torch import nn

from mocosfl.config import ModelSettings
from mocosfl.models import build
from mocosfl.models.layers import WSConv2d, seeded, with_plain_filters


def test_plain_filters_compute_the_same() -> None:
    half = build(ModelSettings(width=8, cut=3, bottleneck="C4S2"), 3, 8, seed=0).client
    plain = with_plain_filters(half)
    assert any(isinstance(module, WSConv2d) for module in half.modules())
    assert not any(isinstance(module, WSConv2d) for module in plain.modules())
    assert any(isinstance(module, nn.Conv2d) for module in plain.modules())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain(images), half.eval()(images))


def test_threads_do_not_draw_from_each_others_seeds() -> None:
    """The dashboard counts bytes of networks that it builds while the run builds its own."""
    with seeded(1):
        expected = torch.rand(4)
    entered = threading.Event()

    def other() -> None:
        with seeded(2):
            entered.set()
            torch.rand(1)

    thread = threading.Thread(target=other)
    with seeded(1):
        first = torch.rand(2)
        thread.start()
        assert not entered.wait(0.2)
        second = torch.rand(2)
    thread.join()
    assert entered.is_set()
    assert torch.equal(torch.cat([first, second]), expected)
