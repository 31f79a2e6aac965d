"""Simulated clients' numbers are those that real clients' codecs keep."""

import numpy as np
import pytest
import torch

from mocosfl.rounding import rounded
from mocosfl_device.codecs import NAMES, codec_of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 5, 4, 16, 16), (1, 3, 33), (1, 2, 5, 3, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-9, 0.0])
@pytest.mark.parametrize("kind", ["plain", "relu", "ties"])
def test_equals_the_codec_to_the_bit(name: str, shape: tuple[int, ...], scale: float, kind: str) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    x = {"plain": x, "relu": np.maximum(x, 0), "ties": x.round(1)}[kind]
    x = (x * scale).astype(np.float32)
    codec = codec_of(name, share=0.2)
    expected = codec.decode(codec.encode(x), shape)
    assert np.array_equal(rounded(torch.from_numpy(x), name, share=0.2).numpy(), expected)
