"""What the server pre-trains on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mocosfl.config import Config
from mocosfl.data.federation import federate
from mocosfl.data.images import ImageSet
from mocosfl.errors import SettingError
from mocosfl.privacy.mixture import fingerprints, mix


def all_of(images: ImageSet) -> np.ndarray:
    return fingerprints(images, np.arange(len(images)))


def silent(text: str) -> None:
    pass


def config(**changes: object) -> Config:
    base = {"data.source": "digits", "data.channels": 1, "clients.number": 20, "pretrain.spare_client": 3}
    return Config().updated(base | changes)


ALL = {"partition.kind": "iid", "data.held_out": 0}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """60 grey images of 10x12 pixels in 2 classes."""
    rng = np.random.default_rng(0)
    for number in range(60):
        place = tmp_path / "source" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (10, 12), dtype=np.uint8)).save(place / f"{number}.png")
    return str(tmp_path / "source")


def test_shares_and_halves(folder: str) -> None:
    said: list[str] = []
    settings = config(**{"pretrain.source": folder, "pretrain.target_share": 0.05, "data.held_out": 0.1})
    mixture = mix(settings, said.append)
    target = federate(settings, silent)
    assert len(mixture.shared) == round(0.05 * len(target.train_rows))
    source, shared = mixture.partition.sizes
    assert shared == len(mixture.shared)
    assert source == 48 - round(0.1 * 48)  # a fifth is the source's test split, a tenth of the rest is held out
    assert mixture.splits.train.shape == (1, 8, 8)
    assert any("resized" in line for line in said), said

    pixels = mixture.splits.train.gather(mixture.partition.client(1))
    assert np.array_equal(pixels, target.splits.train.gather(mixture.shared))
    sampler = mixture.sampler(0)
    seen = []
    for _ in range(5):
        rows, draws = sampler.draw(np.zeros(1, dtype=np.int64), np.array([16]))
        owned = np.isin(rows, mixture.partition.client(1))
        assert owned.sum() == 8
        seen += draws.tolist()
    assert len(set(seen)) == len(seen)  # no two draws share their augmentation
    assert mixture.epoch_images == 2 * source


def test_no_image_of_the_spare_client(folder: str) -> None:
    settings = config(**{"pretrain.source": folder, "pretrain.target_share": 1.0})
    target = federate(settings, silent)
    spare = target.partition.client(3)
    mixture = mix(settings, silent)
    assert not np.isin(fingerprints(target.splits.train, spare), all_of(mixture.splits.train)).any()
    assert len(mixture.shared) == len(target.train_rows) - len(spare)


def test_nor_one_with_the_same_pixels() -> None:
    """The source is the clients' own data set: what the spare client holds is taken out of it."""
    settings = config(**{"pretrain.source": "digits"})
    target = federate(settings, silent)
    spare = fingerprints(target.splits.train, target.partition.client(3))
    images = all_of(mix(settings, silent).splits.train)
    assert len(images) >= 1000
    assert not np.isin(spare, images).any()


def test_one_of_both_will_do(folder: str) -> None:
    alone = mix(config(**{"pretrain.source": folder}), silent)
    assert len(alone.partition) == 1
    assert not len(alone.shared)
    shared = mix(config(**{"pretrain.target_share": 0.5}), silent)
    assert len(shared.partition) == 1
    assert len(shared.shared) == shared.partition.sizes[0]


def test_fingerprints() -> None:
    images = ImageSet(np.random.default_rng(0).integers(0, 256, (1100, 3, 4, 4), dtype=np.uint8))
    numbers = all_of(images)
    assert len(set(numbers.tolist())) == 1100
    assert np.array_equal(fingerprints(images, np.arange(1100)[::-1]), numbers[::-1])
    assert fingerprints(images, np.arange(0)).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing to pre-train on; name the server's own images"),
        ({"pretrain.target_share": 0.0001}, r"target_share=0.0001: of the clients' \d+ images that is not one"),
        ({"pretrain.source": "/no/such/folder"}, "pretrain.source=/no/such/folder: there is no such file or folder"),
        ({"pretrain.source": "digits", "pretrain.images": 5000}, "pretrain.images=5000: the training split has"),
        (
            {"pretrain.target_share": 0.5, "clients.number": 1, "pretrain.spare_client": 0, **ALL},
            r"pretrain.target_share=0.5: all images are those of the spare client \(pretrain.spare_client=0\)",
        ),
        (
            {"pretrain.source": "digits", "clients.number": 1, "pretrain.spare_client": 0, **ALL},
            "pretrain.source=digits: all its images are those of the spare client",
        ),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        mix(config(**changes), silent)


def test_the_spare_client_must_exist() -> None:
    with pytest.raises(SettingError, match=r"pretrain.spare_client=20: the clients are 0 to 19"):
        config(**{"pretrain.spare_client": 20})
