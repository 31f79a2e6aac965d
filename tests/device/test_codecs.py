"""Codecs keep what they promise, in the bytes that they promise."""

import numpy as np
import pytest
import torch

from mocosfl_device.codecs import NAMES, codec_of

SHAPES = [(1, 1, 4, 16, 16), (2, 3, 5, 3, 3), (1, 7, 33), (1, 1, 1, 1, 1)]


def latents(shape: tuple[int, ...], kind: str) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return {"relu": np.maximum(x, 0), "gradient": x * np.float32(1e-9), "constant": np.full_like(x, 3)}[kind]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["relu", "gradient", "constant"])
def test_bytes_and_losses(name: str, shape: tuple[int, ...], kind: str) -> None:
    codec, x = codec_of(name), latents(shape, kind)
    data = codec.encode(x)
    back = codec.decode(data, shape)
    assert len(data) == codec.size(shape)
    assert (back.dtype, back.shape) == (np.float32, shape)
    over = tuple(range(3 if len(shape) > 3 else 2, len(shape)))
    spread = np.abs(x).max(axis=over, keepdims=True) - np.minimum(x.min(axis=over, keepdims=True), 0)
    match name:
        case "fp32":
            assert np.array_equal(back, x)
        case "bf16":
            assert np.array_equal(back, torch.from_numpy(x).bfloat16().float().numpy())
        case "int8" | "int4":  # half a step, and at either end what bfloat16 rounds off
            levels = 255 if name == "int8" else 15
            assert (np.abs(back - x) <= spread * (0.5 / levels + 2**-8)).all()
        case "topk":
            flat, kept = x.reshape(*shape[:2], -1), back.reshape(*shape[:2], -1)
            count = max(1, round(0.1 * flat.shape[2]))
            assert ((kept != 0).sum(axis=2) <= count).all()
            np.testing.assert_allclose(kept, np.where(kept != 0, flat, 0), rtol=2**-8)
            largest = np.sort(np.abs(flat), axis=2)[:, :, -count:].sum(axis=2)
            np.testing.assert_allclose(np.abs(kept).sum(axis=2), largest, rtol=2**-8)


def test_the_published_latent_in_bytes() -> None:
    """C4S2 of a 32x32 image: 1,024 numbers."""
    shape = (1, 1, 4, 16, 16)
    sizes = {name: codec_of(name).size(shape) for name in NAMES}
    assert sizes == {"fp32": 4096, "bf16": 2048, "int8": 1040, "int4": 528, "topk": 128 + 2 * 102}


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_bytes_is_refused(name: str) -> None:
    codec, shape = codec_of(name), (1, 2, 4, 4, 4)
    data = codec.encode(latents(shape, "relu"))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match=f"{len(wrong)} bytes instead of {len(data)}"):
            codec.decode(wrong, shape)


def test_bits_of_other_places_are_refused() -> None:
    codec, shape = codec_of("topk"), (1, 1, 4, 4, 4)
    data = bytearray(codec.encode(latents(shape, "relu")))
    data[0] ^= 255
    with pytest.raises(ValueError, match="an image with another number of places than 6"):
        codec.decode(bytes(data), shape)


def test_unknown_codecs() -> None:
    with pytest.raises(ValueError, match="unknown codec 'int2'; accepted are fp32, bf16, int8, int4, topk"):
        codec_of("int2")
