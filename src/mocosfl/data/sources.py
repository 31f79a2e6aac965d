"""From the name of a source to decoded images: find it, choose its splits, decode once, divide."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from mocosfl.config import DataSettings
from mocosfl.data.cache import Decoded, cached, pixels_file, store
from mocosfl.data.decode import Item, Split, Undecoded, decode, first_size
from mocosfl.data.folders import local_splits
from mocosfl.data.images import ImageSet
from mocosfl.data.tables import hub_splits
from mocosfl.errors import DataError, SettingError, nearest
from mocosfl_device.folders import TEST_SPLITS
from mocosfl_device.images import cache

HUBS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "stl10": "tanganke/stl10",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
    "imagenet12": "ILSVRC/imagenet-1k",
}
"""Short names of data sets on the Hugging Face hub."""

CONFIGS = {"ufldl-stanford/svhn": "cropped_digits"}
"""Configuration to use of the data sets that have several."""

LABELLED_TESTS = {"ILSVRC/imagenet-1k": "validation"}
"""Split to test on of the data sets whose split ``test`` has no labels."""

IMAGENET12 = {
    "n01443537": "goldfish",
    "n02099601": "golden retriever",
    "n02123597": "Siamese cat",
    "n02870880": "bookcase",
    "n02917067": "bullet train",
    "n03220513": "dome",
    "n03594945": "jeep",
    "n03954731": "plane",
    "n04037443": "racer",
    "n04069434": "reflex camera",
    "n04350905": "suit",
    "n04398044": "teapot",
}
"""MocoSFL's twelve classes of ImageNet, by WordNet id: those of the images that the authors' release downloads
(github.com/zlijingtao/imagnet-12)."""

# "test" and "imgs": they keep these draws apart from each other and from all others of the same seed.
_TEST_STREAM, _IMAGES_STREAM = 0x74657374, 0x696D6773


@dataclass(frozen=True)
class Splits:
    """The images of a source.

    Attributes:
        train: the training split.
        test: the test split; None where the source has none, and no labels to make one by.
        bank: labelled images to evaluate with instead of ``train`` (``data.label_split``).
        drawn: the source has no test split; ``test`` was drawn from its training split, by the seed.
    """

    train: ImageSet
    test: ImageSet | None
    bank: ImageSet | None = None
    drawn: bool = False

    @property
    def scored(self) -> Splits:
        """The images that an encoder is evaluated on: the training split, or ``bank`` instead, and the test split."""
        return self if self.bank is None else Splits(self.bank, self.test)


def load(settings: DataSettings, seed: int, say: Callable[[str], None] = print) -> Splits:
    """Decode the images of a source, or open them in the cache.

    ``digits`` and the names in ``HUBS`` mean the same everywhere; a folder of such a name is ``./cifar10``.
    Any other source is a path, if there is one, and else a hub id.

    Args:
        settings: what to load.
        seed: of the images set aside for test, and of those drawn where ``data.images`` is set.
        say: told, in one line each, what was converted, left out or could not be done.

    Returns:
        Both splits, of the same image shape and the same classes; in memory if they fit into ``data.memory``
        together, else memmaps of the cache.

    Raises:
        DataError: the source is missing, empty, damaged or unreachable.
        SettingError: a split, a column or more images are asked for than there are.
    """
    splits = find_splits(settings, say)
    chosen = _choose(splits, settings)
    return _divide(_decoded(chosen, settings, say), settings, seed, say)


def load_unlabelled(settings: DataSettings, say: Callable[[str], None] = print) -> ImageSet:
    """Decode all images of a source's training split; labels, if there are any, are not looked at.

    Args:
        settings: what to load. Nothing is set aside for test.
        say: as for ``load``.

    Raises:
        DataError, SettingError: as ``load``.
    """
    decoded = _decoded([_training_split(settings, say)], settings, say)
    pixels = decoded.pixels[0]
    if isinstance(pixels, np.memmap) and pixels.nbytes / 2**30 <= settings.memory:
        return ImageSet(np.array(pixels))
    return ImageSet(pixels)


def count_images(source: str, say: Callable[[str], None] = print) -> int:
    """Images in a source's training split, before any is decoded.

    Raises:
        DataError, SettingError: as ``load``.
    """
    return _training_split(DataSettings(source=source), say).read().count


def count_training_images(settings: DataSettings, seed: int, say: Callable[[str], None] = print) -> tuple[int, bool]:
    """Training images that ``load`` would return, before any is decoded, and whether they are labelled.

    Images that cannot be decoded, and ``data.images``, are left out of account.

    Raises:
        DataError, SettingError: as ``load``.
    """
    chosen = _choose(find_splits(settings, say), settings)
    split = chosen[0].read()
    if split.labels is None:
        return split.count, False
    if len(chosen) > 1:
        return split.count, True
    _, labels = np.unique(split.labels, return_inverse=True)
    return split.count - len(_test_rows(labels, settings.test_share, seed)), True


def _training_split(settings: DataSettings, say: Callable[[str], None]) -> Split:
    return _choose(find_splits(settings, say), settings)[0]


def find_splits(settings: DataSettings, say: Callable[[str], None]) -> dict[str, Split]:
    """A source's splits by name, before any image is decoded.

    Raises:
        DataError, SettingError: there is no such source.
    """
    source = settings.source
    if source == "digits":
        return {"train": Split("digits", _digits)}
    path = Path(os.path.expanduser(source))
    if source and source not in HUBS and os.path.exists(path):
        return local_splits(path, settings, say)
    if (hub := hub_id(source)) is not None:
        return hub_splits(hub, CONFIGS.get(hub), settings)
    if re.search(r"[/\\]|^~|\.parquet$", source):
        raise DataError(f"data.source={source}: there is no such file or folder")
    known = ["digits", *HUBS]
    hint = nearest(source, known)
    raise SettingError(
        f"data.source={source}: there is no such file, folder or data set; {hint}{' ' if hint else ''}Accepted are "
        f"{', '.join(known)}, owner/name of a data set on the Hugging Face hub, a parquet file, and a folder of "
        "parquet files or of images"
    )


def hub_id(source: str) -> str | None:
    """Owner and name on the Hugging Face hub of a source that is neither a path nor built in; None for any other."""
    if source not in HUBS and (source == "digits" or (source and os.path.exists(os.path.expanduser(source)))):
        return None
    hub = HUBS.get(source, source)
    return hub if re.fullmatch(r"\w[\w.-]*/[\w.-]+", hub) else None


def _digits() -> Undecoded:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    items: list[Item] = [(f"digit {index}", image) for index, image in enumerate(images)]
    return Undecoded(len(items), lambda: iter(items), digits.target.tolist(), tuple(map(str, digits.target_names)))


def _choose(splits: dict[str, Split], settings: DataSettings) -> list[Split]:
    """The training split and, where there is one, the test split; and after these that of ``data.label_split``."""
    train, test, bank = settings.train_split, settings.test_split, settings.label_split
    for setting, name in (("train_split", train), ("test_split", test), ("label_split", bank)):
        if name is not None and name not in splits:
            raise SettingError(
                f"data.{setting}={name}: there is no such split in data.source={settings.source}, "
                f"which has {', '.join(splits)}"
            )
    if test is None:
        tests = (LABELLED_TESTS.get(hub_id(settings.source) or ""), *TEST_SPLITS)
        test = next((name for name in tests if name in splits and name not in (train, bank)), None)
    elif test in (train, bank):
        which = "the training split, data.train_split" if test == train else "data.label_split"
        raise SettingError(f"data.test_split={test}: that is {which}, too")
    if bank is not None and test is None:
        raise SettingError(
            f"data.label_split={bank}: there is no test split to evaluate on; name one in data.test_split"
        )
    chosen = [splits[name] for name in (train, test, bank) if name is not None]
    wanted = settings.classes or (("imagenet12",) if settings.source == "imagenet12" else ())
    if not wanted:
        return chosen
    alike = [name for given in wanted for name in (IMAGENET12 if given == "imagenet12" else [given])]
    wanted = tuple(dict.fromkeys(alike))
    return [Split(f"{split.stamp} {wanted}", partial(_only, split, wanted, settings)) for split in chosen]


def _only(split: Split, wanted: tuple[str, ...], settings: DataSettings) -> Undecoded:
    """The images of some classes of a split, in the order of the names that are given."""
    whole = split.read()
    if whole.labels is None:
        raise SettingError(f"data.classes={' '.join(wanted)}: a split of data.source={settings.source} has no labels")
    found, number = np.unique(whole.labels, return_inverse=True)
    names = [str(label) for label in found] if whole.names is None else list(whole.names)
    if whole.names is not None:
        number = np.array(whole.labels)
    chosen = []
    for name in wanted:
        called = {name, IMAGENET12.get(name, name)}  # folders of ImageNet have ids, its hub's labels have names
        places = [place for place, known in enumerate(names) if known in called]
        places = places or [place for place, known in enumerate(names) if known.partition(",")[0] in called]
        if len(places) != 1:
            what = "there is no such class" if not places else f"{len(places)} classes are called that"
            listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise SettingError(f"data.classes={name}: {what} in data.source={settings.source}, which has {listed}")
        chosen.append(places[0])
    if len(set(chosen)) < len(chosen):
        raise SettingError(f"data.classes={' '.join(wanted)}: a class is named twice")
    new = np.full(len(names), -1)
    new[chosen] = np.arange(len(chosen))
    labels = new[number]
    kept = labels >= 0
    some = whole.some or (lambda mask: compress(whole.items(), mask))
    return Undecoded(
        int(kept.sum()), lambda: some(kept), labels[kept].tolist(), tuple(names[place] for place in chosen)
    )


def _decoded(chosen: list[Split], settings: DataSettings, say: Callable[[str], None]) -> Decoded:
    """The splits' images, from the cache if they are there."""
    make = partial(_decode, [split.read for split in chosen], settings, say)
    if settings.source == "digits":
        decoded = make(None)
    else:
        names = {"size", "channels", "image_column", "label_column", "skip_corrupt"}
        key = [[split.stamp for split in chosen], settings.model_dump(include=names), PIL.__version__]
        decoded = cached(key, make, say)
    for line in decoded.said:
        say(line)
    return decoded


def _decode(
    reads: list[Callable[[], Undecoded]],
    settings: DataSettings,
    say: Callable[[str], None],
    folder: Path | None,
) -> Decoded:
    """Decode the splits into a folder, or into memory."""
    splits = [read() for read in reads]
    total = sum(split.count for split in splits)
    if not all(split.count for split in splits):
        raise DataError(f"data.source={settings.source}: a split holds no images")
    if folder is not None:
        say(f"data: decoding {total:,} images; they are kept in {cache()} for later runs")
    numbers, classes, said = _number(splits)
    size = settings.size or first_size(splits[0].items(), settings.skip_corrupt)
    shape = (settings.channels, size, size)
    notes: Counter[str] = Counter()
    pixels, labels = [], []
    for index, (split, all_labels) in enumerate(zip(splits, numbers, strict=True)):
        chunks = decode(split.items(), size, settings.channels, settings.skip_corrupt, notes)
        path = pixels_file(folder, index) if folder else None
        decoded, kept = store(chunks, split.count, shape, path)
        if not len(decoded):
            raise DataError(f"data.source={settings.source}: not one image of a split can be decoded")
        pixels.append(decoded)
        labels.append(None if all_labels is None else all_labels[kept])
    said += [f"data: {count:,} of {total:,} images {note}" for note, count in sorted(notes.items())]
    return Decoded(pixels, labels, classes, said)


def _number(
    splits: list[Undecoded],
) -> tuple[list[NDArray[np.int64] | None], tuple[str, ...] | None, list[str]]:
    """Number the classes in the same way in all splits.

    Returns:
        For each split its labels as numbers, or None; the names of all classes; and what there is to say.
    """
    labelled = [split for split in splits if split.labels is not None]
    if not labelled:
        return [None] * len(splits), None, []
    classes = labelled[0].names
    if classes is not None and all(split.names == classes for split in labelled):
        numbers = [np.array(split.labels, dtype=np.int64) for split in labelled]
    else:
        names = [_names(split) for split in labelled]
        found, joined = np.unique(np.concatenate(names), return_inverse=True)
        numbers = np.split(joined, np.cumsum([len(piece) for piece in names])[:-1])
        classes = tuple(str(name) for name in found)
    said = []
    if len(splits) > 1 and splits[0].labels is not None and splits[1].labels is not None:
        unseen = np.setdiff1d(numbers[1], numbers[0])
        if len(unseen):
            alone = ", ".join(classes[number] for number in unseen)
            said.append(f"data: {len(unseen)} of {len(classes)} classes are in the test split alone ({alone})")
    rest = iter(numbers)
    return [None if split.labels is None else next(rest) for split in splits], classes, said


def _names(split: Undecoded) -> NDArray:
    labels = split.labels or []
    return np.array(labels if split.names is None else [split.names[label] for label in labels])


def _divide(decoded: Decoded, settings: DataSettings, seed: int, say: Callable[[str], None]) -> Splits:
    """Set a test split aside where there is none, draw ``data.images``, and read into memory what fits."""
    pixels, labels = list(decoded.pixels), list(decoded.labels)
    rows = [np.arange(len(array)) for array in pixels]
    if len(pixels) == 1 and labels[0] is not None:
        aside = _test_rows(labels[0], settings.test_share, seed)
        if len(aside):
            pixels, labels = pixels * 2, labels * 2
            rows = [np.setdiff1d(rows[0], aside), aside]
    if settings.images is not None:
        if settings.images > len(rows[0]):
            raise SettingError(f"data.images={settings.images}: the training split has {len(rows[0]):,} images")
        rows[0] = balanced(rows[0], labels[0], settings.images, np.random.default_rng([seed, _IMAGES_STREAM]))

    gib = sum(len(r) * array[:1].nbytes for r, array in zip(rows, pixels, strict=True)) / 2**30
    stream = gib > settings.memory and all(isinstance(array, np.memmap) for array in pixels)
    if stream:
        say(
            f"data: {gib:.1f} GiB of decoded images are more than data.memory={settings.memory:g} GiB; "
            f"they are streamed from {cache()}"
        )
    sets = []
    for array, numbers, part in zip(pixels, labels, rows, strict=True):
        whole = len(part) == len(array)
        numbers = None if numbers is None else numbers[part]
        classes = None if numbers is None else decoded.classes
        if stream:
            sets.append(ImageSet(array, numbers, classes, None if whole else part))
        else:
            # Indexing copies, also out of a memmap; an array that is in memory whole needs no second copy.
            held = array if whole and not isinstance(array, np.memmap) else array[part]
            sets.append(ImageSet(held, numbers, classes))
    drawn = len(sets) > len(decoded.pixels)
    return Splits(sets[0], sets[1] if len(sets) > 1 else None, sets[2] if len(sets) > 2 else None, drawn)


def _shuffled_rank(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Place of each image in a random order of its class, (n,) int64 from 0."""
    order = np.lexsort((rng.permutation(len(labels)), labels))
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    return rank


def _test_rows(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Rows of a share of every class, rounded, but at least one image and never all of them."""
    sizes = np.bincount(labels)
    wanted = np.clip(np.rint(sizes * share), 1, np.maximum(sizes - 1, 0))
    rank = _shuffled_rank(labels, np.random.default_rng([seed, _TEST_STREAM]))
    return np.flatnonzero(rank < wanted[labels])


def balanced(
    rows: NDArray[np.int64], labels: NDArray[np.int64] | None, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw some rows, of every class equally many as long as it has any left.

    Args:
        rows: (n,) int64, rows to draw from.
        labels: (at least max(rows) + 1,) int64 class number of every row; None to draw regardless of class.
        count: rows to draw, at most n.
        rng: source of the random choices.

    Returns:
        (count,) int64, in the order they have in ``rows``.
    """
    classes = np.zeros(len(rows), dtype=np.int64) if labels is None else labels[rows]
    rank = _shuffled_rank(classes, rng)
    # The first of each class, then the second of each, and so on; which classes give one more is drawn too.
    order = np.lexsort((rng.permutation(classes.max(initial=0) + 1)[classes], rank))
    return rows[np.sort(order[:count])]
