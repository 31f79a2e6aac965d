"""Image sets in memory and on disk, and channel statistics against the naive formula."""

import numpy as np
import pytest
import torch

from mocosfl.data.images import ImageSet, channel_statistics

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (23, 3, 5, 5), dtype=np.uint8)


@pytest.fixture
def on_disk(pixels, tmp_path):
    np.save(tmp_path / "pixels.npy", pixels)
    return np.load(tmp_path / "pixels.npy", mmap_mode="r")


ROWS = np.array([7, 0, 22, 7])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moved", [False, True])
def test_take_from_memory(pixels, device, moved):
    images = ImageSet(pixels)
    if moved:
        assert images.to(device) is images
    taken = images.take(ROWS, device)
    assert taken.dtype == torch.uint8
    assert taken.device.type == device
    assert np.array_equal(taken.cpu().numpy(), pixels[ROWS])
    assert len(images) == 23
    assert images.shape == (3, 5, 5)
    assert not images.streamed


@pytest.mark.parametrize("device", DEVICES)
def test_take_from_disk(on_disk, device):
    images = ImageSet(on_disk).to(device)
    assert images.streamed
    assert np.array_equal(images.take(ROWS, device).cpu().numpy(), on_disk[ROWS])
    assert np.array_equal(on_disk[ROWS], images.gather(ROWS))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_rows_are_part_of_a_shared_array(pixels, on_disk, where, moved):
    part = np.array([20, 3, 11])
    images = ImageSet(pixels if where == "memory" else on_disk, np.array([0, 1, 0]), ("a", "b"), part)
    if moved:
        images.to("cpu")
    assert len(images) == 3
    assert np.array_equal(images.take(np.array([2, 0]), "cpu").numpy(), pixels[[11, 20]])
    assert np.shares_memory(images.images, pixels if where == "memory" else on_disk)


def test_pixels_of_read_only_array_can_be_kept_on_a_device(pixels):
    pixels.flags.writeable = False
    assert np.array_equal(ImageSet(pixels).to("cpu").take(ROWS, "cpu").numpy(), pixels[ROWS])


def test_taken_images_are_a_copy(pixels):
    images = ImageSet(pixels.copy()).to("cpu")
    images.take(ROWS, "cpu").zero_()
    assert np.array_equal(images.images, pixels)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("chunk", [1, 200, 10**9])  # one image, two images and all of them at a time
def test_statistics_are_exact_over_the_given_rows(pixels, on_disk, where, chunk, monkeypatch):
    monkeypatch.setattr("mocosfl.data.images.CHUNK", chunk)
    rows = np.array([5, 1, 22, 9, 10])
    mean, std = channel_statistics(ImageSet(pixels if where == "memory" else on_disk), rows)
    naive = pixels[rows].astype(np.float64) / 255
    assert mean == pytest.approx(naive.mean(axis=(0, 2, 3)), rel=1e-12)
    assert std == pytest.approx(naive.std(axis=(0, 2, 3)), rel=1e-12)
    assert all(isinstance(value, float) for value in mean + std)


def test_statistics_do_not_depend_on_order_or_chunks(pixels, monkeypatch):
    images, rows = ImageSet(pixels), np.arange(23)
    whole = channel_statistics(images, rows)
    monkeypatch.setattr("mocosfl.data.images.CHUNK", 1)
    assert channel_statistics(images, rows[::-1]) == whole


def test_statistics_of_a_constant_channel():
    pixels = np.zeros((4, 1, 3, 3), dtype=np.uint8)
    pixels[:] = 51
    assert channel_statistics(ImageSet(pixels), np.arange(4)) == ((pytest.approx(0.2),), (1 / 255,))


def test_statistics_of_nothing(pixels):
    with pytest.raises(ValueError, match="rows is empty"):
        channel_statistics(ImageSet(pixels), np.arange(0))
