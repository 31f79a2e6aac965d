"""Layers that the backbones share."""

import torch
from torch import nn

from mocosfl.config import ModelSettings
from mocosfl.models import build
from mocosfl.models.layers import WSConv2d, with_plain_filters


def test_plain_filters_compute_the_same() -> None:
    half = build(ModelSettings(width=8, cut=3, bottleneck="C4S2"), 3, 8, seed=0).client
    plain = with_plain_filters(half)
    assert any(isinstance(module, WSConv2d) for module in half.modules())
    assert not any(isinstance(module, WSConv2d) for module in plain.modules())
    assert any(isinstance(module, nn.Conv2d) for module in plain.modules())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(plain(images), half.eval()(images))
