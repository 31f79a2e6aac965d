"""Semi-supervised fine-tuning: which images are labelled, and what is learnt from them."""

import numpy as np
import pytest
import torch

from mocosfl.config import AugmentSettings, ModelSettings
from mocosfl.data.images import ImageSet
from mocosfl.encoder import Encoder
from mocosfl.evaluation.finetune import finetune, labelled_rows


def test_the_labelled_images_are_of_all_classes_alike() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), [140, 60, *[100] * 8]))
    for share, each in ((0.1, 10), (0.01, 1)):
        rows = labelled_rows(labels, share, seed=3)
        assert len(rows) == len(set(rows.tolist())) == round(share * len(labels))
        assert (np.diff(rows) > 0).all()
        assert np.bincount(labels[rows]).tolist() == [each] * 10
    assert (labelled_rows(labels, 0.1, 3) == labelled_rows(labels, 0.1, 3)).all()
    assert set(labelled_rows(labels, 0.1, 3)) != set(labelled_rows(labels, 0.1, 4))
    assert set(labelled_rows(labels, 0.01, 3)) < set(labelled_rows(labels, 0.1, 3))


def test_every_class_has_a_labelled_image_and_small_ones_give_all() -> None:
    labels = np.repeat(np.arange(20), 5)
    assert np.bincount(labels[labelled_rows(labels, 0.01, 0)]).tolist() == [1] * 20
    labels = np.repeat([0, 1], [97, 3])
    assert np.bincount(labels[labelled_rows(labels, 0.1, 0)]).tolist() == [7, 3]


PLAIN = AugmentSettings(crop_scale=(0.7, 1.0), flip_p=0)


@pytest.fixture(scope="module")
def stripes() -> tuple[ImageSet, ImageSet]:
    """Images with stripes from left to right (class 0), or up and down (1), brighter or darker; and others to test."""
    rng = np.random.default_rng(0)

    def made(count: int) -> ImageSet:
        labels = np.arange(count) % 2
        wave = 100 * np.sin(2 * np.pi * (np.arange(8) / 4 + rng.random(count)[:, None]))
        rows, columns = np.broadcast_arrays(wave[:, :, None], wave[:, None, :])
        images = np.where(labels[:, None, None] == 0, rows, columns) + rng.uniform(100, 150, (count, 1, 1))
        return ImageSet(images.clip(0, 255).astype(np.uint8)[:, None].copy(), labels, ("rows", "columns"))

    return made(60), made(40)


def test_it_learns_from_few_labels_and_leaves_the_encoder_as_it_was(stripes: tuple[ImageSet, ImageSet]) -> None:
    train, test = stripes
    encoder = Encoder(ModelSettings(width=4), 1, 8, seed=1).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    rows = labelled_rows(train.labels, 0.5, 0)

    def tuned(train: ImageSet) -> float:
        return finetune(encoder, train, rows, test, 2, 24, 0.02, 15, PLAIN)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    accuracy = tuned(train)
    assert torch.equal(torch.get_rng_state(), state)
    assert accuracy >= 80
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert not encoder.training

    # Neither the other images nor their labels are looked at.
    others = np.setdiff1d(np.arange(len(train)), rows)
    images, labels = train.images.copy(), train.labels.copy()
    images[others], labels[others] = 0, 1 - labels[others]
    assert tuned(ImageSet(images, labels, train.classes)) == accuracy


def test_one_seed_one_result(stripes: tuple[ImageSet, ImageSet]) -> None:
    """Also where the labels do not fill whole batches, and one image would be left over for BatchNorm."""
    train, test = stripes
    encoder = Encoder(ModelSettings(width=4, client_norm="batch", server_norm="batch"), 1, 8)
    noise = np.random.default_rng(0).integers(0, 2, len(test))  # so that accuracies differ
    test = ImageSet(test.images, noise, test.classes)
    rows = np.arange(33)

    def tuned(seed: int) -> float:
        return finetune(encoder, train, rows, test, 2, 2, 0.05, 32, PLAIN, seed)

    first = tuned(0)
    torch.manual_seed(5)
    assert tuned(0) == first
    assert {tuned(seed) for seed in range(1, 5)} != {first}


def test_test_images_are_read_once_and_nothing_is_chosen_on_them(stripes: tuple[ImageSet, ImageSet]) -> None:
    class Spy(ImageSet):
        taken = 0

        def take(self, rows, device):
            Spy.taken += len(rows)
            return super().take(rows, device)

    train, test = stripes
    encoder = Encoder(ModelSettings(width=4), 1, 8)
    accuracies = []
    for labels in (test.labels, 1 - test.labels):  # of one and the same classifier they add up to 100
        watched = Spy(test.images, labels, test.classes)
        accuracies.append(finetune(encoder, train, np.arange(10), watched, 2, 3, 0.05, 8, PLAIN, test_batch=7))
    assert Spy.taken == 2 * len(test)
    assert sum(accuracies) == pytest.approx(100)


def test_rejects(stripes: tuple[ImageSet, ImageSet]) -> None:
    train, test = stripes
    with pytest.raises(ValueError, match="on 1 images: expected at least 2"):
        finetune(Encoder(ModelSettings(width=4), 1, 8), train, np.arange(1), test, 2)
