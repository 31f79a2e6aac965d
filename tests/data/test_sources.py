"""Sources on disk and on the (replaced) hub, the cache, and the division into splits."""

import errno
import os
import shutil
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mocosfl.config import DataSettings
from mocosfl.data import cache, decode
from mocosfl.data.sources import IMAGENET12, balanced, count_images, load
from mocosfl.errors import DataError, SettingError

SHARED = Path(__file__).resolve().parents[3] / "shared/data"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MOCOSFL_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Grows by one for every image decoded."""
    calls, convert = [], decode.converted
    monkeypatch.setattr(decode, "converted", lambda *args: calls.append(1) or convert(*args))
    return calls


class Said(list):
    """What was said, but for the line that decoding begins."""

    def __call__(self, line):
        if not line.startswith("data: decoding"):
            self.append(line)


def read(source, seed=0, **settings):
    """Splits, and what was said."""
    said = Said()
    return load(DataSettings(source=str(source), **settings), seed, said), said


def solid(shade, size=8):
    """A colour image that is told by its red value."""
    return np.full((size, size, 3), (shade, 100, 50), dtype=np.uint8)


def shades(images):
    return images.gather(np.arange(len(images)))[:, 0, 0, 0].tolist()


def png(pixels):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, cat with 6 images and dog with 4, told by their shades 0 to 5 and 10 to 13."""
    root = tmp_path / "pets"
    for name, start, count in (("dog", 10, 4), ("cat", 0, 6)):
        for index in range(count):
            save(root / name / f"train{index}.png", solid(start + index))
    return root


def save_table(path, values, labels=None, classes=None, image=None, **columns):
    """A parquet file as the hub writes it."""
    data = {"image": [{"bytes": png(solid(value)), "path": None} for value in values], **columns}
    features = {"image": image or datasets.Image()}
    if labels is not None:
        data["label"] = labels
        features["label"] = datasets.ClassLabel(names=classes) if classes else None
    table = datasets.Dataset.from_dict(data)
    kinds = {name: features.get(name) or kind for name, kind in table.features.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # a path would show a progress bar
        pq.write_table(table.cast(datasets.Features(kinds)).data.table, file)


# digits


def test_digits(cache_folder):
    splits, said = read("digits", channels=1)
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert len(splits.train) + len(splits.test) == 1797
    assert splits.train.shape == (1, 8, 8)
    assert splits.train.classes == tuple("0123456789")
    original = {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in digits.images}
    assert {image.tobytes() for image in splits.train.images} <= original
    assert (np.bincount(splits.test.labels) == np.rint(np.bincount(digits.target) * 0.2)).all()
    assert said == []
    assert not cache_folder.exists()


def test_digits_in_colour_at_another_size():
    splits, said = read("digits", size=16)
    assert splits.train.shape == (3, 16, 16)
    assert said == [
        "data: 1,797 of 1,797 images were grey, converted to colour",
        "data: 1,797 of 1,797 images were not 16x16, resized and cropped",
    ]


# folders of images


def test_class_folders(folder):
    (splits, said) = read(folder, test_share=0.5)
    assert splits.train.classes == splits.test.classes == ("cat", "dog")
    assert splits.train.shape == (3, 8, 8)
    assert splits.train.labels.dtype == np.int64
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1]
    both = shades(splits.train) + shades(splits.test)
    assert sorted(both) == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]
    assert said == []


def test_flat_folder_has_no_labels(tmp_path):
    for index in range(3):
        save(tmp_path / "flat" / f"{index}.webp", solid(index))
    splits, _ = read(tmp_path / "flat")
    assert splits.train.labels is None
    assert splits.train.classes is None
    assert splits.test is None
    assert len(splits.train) == 3


@pytest.mark.parametrize("test", ["test", "validation", "valid", "val"])
def test_split_folders(tmp_path, test):
    root = tmp_path / "set"
    for name, shade in (("train/dog", 1), ("train/cat/deep/er", 2), (f"{test}/dog", 3), ("extra/dog", 4)):
        save(root / name / "a.png", solid(shade))
    splits, said = read(root)
    assert (shades(splits.train), splits.train.labels.tolist()) == ([2, 1], [0, 1])
    assert (shades(splits.test), splits.test.labels.tolist()) == ([3], [1])
    assert splits.train.classes == splits.test.classes == ("cat", "dog")
    assert said == []
    splits, _ = read(root, train_split=test, test_split="extra")
    assert shades(splits.train) == [3]
    assert shades(splits.test) == [4]


def test_train_may_be_a_class(tmp_path):
    for name in ("train", "plane"):
        save(tmp_path / "vehicles" / name / "a.png", solid(1))
    assert read(tmp_path / "vehicles")[0].train.classes == ("plane", "train")


def test_train_folder_alone_is_a_split(tmp_path):
    save(tmp_path / "set/train/cat/a.png", solid(1))
    splits, _ = read(tmp_path / "set")
    assert splits.train.classes == ("cat",)
    assert splits.test is None  # the only image of its class stays in training


def test_classes_of_both_splits_are_numbered_together(tmp_path):
    for name in ("train/b", "train/d", "test/d", "test/a"):
        save(tmp_path / "set" / name / "a.png", solid(1))
    splits, said = read(tmp_path / "set")
    assert splits.train.classes == splits.test.classes == ("a", "b", "d")
    assert splits.train.labels.tolist() == [1, 2]
    assert splits.test.labels.tolist() == [0, 2]
    assert said == ["data: 1 of 3 classes are in the test split alone (a)"]


def test_linked_class_folders_and_a_link_back(folder, tmp_path):
    root = tmp_path / "linked"
    root.mkdir()
    (root / "pet").symlink_to(folder / "cat")
    (root / "wild").symlink_to(folder / "dog")
    (folder / "dog" / "back").symlink_to(root)
    splits, _ = read(root, test_share=0.01)
    assert splits.train.classes == ("pet", "wild")
    assert len(splits.train) + len(splits.test) == 10


def test_unused_files_are_said(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "cat" / "raw.heic").write_bytes(b"?")
    (folder / ".hidden.png").write_bytes(b"?")
    assert read(folder)[1] == [f"data: files in {folder} that are not used: 2 (.heic, .txt)"]


def test_images_beside_split_folders_are_said_not_used(tmp_path):
    for name in ("train/cat/a.png", "test/cat/a.png", "preview.png"):
        save(tmp_path / "set" / name, solid(1))
    assert read(tmp_path / "set")[1] == [f"data: files in {tmp_path / 'set'} that are not used: 1 (.png)"]


def test_link_to_nowhere_is_a_corrupt_image(folder):
    (folder / "cat" / "link.png").symlink_to(folder / "gone.png")
    with pytest.raises(DataError, match=r"link\.png: cannot be decoded \(.*No such file"):
        read(folder)
    assert read(folder, skip_corrupt=True)[1] == ["data: 1 of 11 images could not be decoded, left out"]


def test_conversions_are_said_with_their_count(folder, cache_folder):
    save(folder / "cat" / "x.png", np.zeros((8, 8), np.uint8))
    save(folder / "cat" / "y.png", np.zeros((20, 12, 3), np.uint8))
    expected = [
        "data: 1 of 12 images were grey, converted to colour",
        "data: 1 of 12 images were not 8x8, resized and cropped",
    ]
    assert read(folder)[1] == expected
    assert read(folder)[1] == expected  # out of the cache
    assert len(list(cache_folder.iterdir())) == 1


def test_size_of_the_first_image_holds_for_both_splits(tmp_path):
    save(tmp_path / "set/train/a/a.png", solid(1, 10))
    save(tmp_path / "set/test/a/a.png", solid(2, 20))
    splits, said = read(tmp_path / "set")
    assert splits.train.shape == splits.test.shape == (3, 10, 10)
    assert said == ["data: 1 of 2 images were not 10x10, resized and cropped"]


def test_corrupt_image_is_named_or_left_out(folder):
    broken = folder / "cat" / "train1.png"
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(DataError) as error:
        read(folder)
    assert str(error.value).startswith(f"{broken}: cannot be decoded (")
    splits, said = read(folder, skip_corrupt=True, test_share=0.01)
    everything = sorted(zip(shades(splits.train), splits.train.labels.tolist(), strict=True))
    everything += zip(shades(splits.test), splits.test.labels.tolist(), strict=True)
    assert sorted(everything) == [(s, 0) for s in (0, 2, 3, 4, 5)] + [(s, 1) for s in (10, 11, 12, 13)]
    assert said == ["data: 1 of 10 images could not be decoded, left out"]


@pytest.mark.parametrize("size", [None, 8])
def test_nothing_but_corrupt_images(tmp_path, size):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="not one image"):
        read(tmp_path / "bad", skip_corrupt=True, size=size)


def test_folder_errors(tmp_path, folder):
    with pytest.raises(DataError, match=r"data\.source=.*gone: there is no such file or folder"):
        read(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.source=.*empty: the folder holds no images, it is empty; accepted"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no images, none of its 1 files is one; accepted are .*\.png"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"data\.source=.*a\.txt: a file must be a parquet file"):
        read(tmp_path / "empty" / "a.txt")
    save(folder / "loose.png", solid(1))
    with pytest.raises(DataError, match=r"pets: images such as loose\.png \(1 in all\) lie beside sub-folders"):
        read(folder)


def test_split_errors(tmp_path, folder):
    with pytest.raises(SettingError, match=r"data\.train_split=learn: there is no such split in .*, which has train"):
        read(folder, train_split="learn")
    with pytest.raises(SettingError, match=r"data\.test_split=dev: .* which has train"):
        read("digits", test_split="dev")
    with pytest.raises(SettingError, match=r"data\.test_split=train: that is the training split"):
        read("digits", test_split="train")
    for name in ("Train", "Test"):
        save(tmp_path / "set" / name / "a" / "a.png", solid(1))
    with pytest.raises(SettingError, match=r"data\.train_split=train: .* which has Test, Train"):
        read(tmp_path / "set")
    save(tmp_path / "tests/test/a/a.png", solid(1))
    with pytest.raises(SettingError, match=r"data\.train_split=train: .* which has test"):
        read(tmp_path / "tests")


# parquet


def test_parquet_file(tmp_path):
    save_table(tmp_path / "test-0.parquet", [5, 6, 7, 8], [1, 0, 1, 0], ["yes", "no"])
    splits, said = read(tmp_path / "test-0.parquet", test_share=0.5)
    assert splits.train.classes == ("yes", "no")  # as declared, not sorted
    labels = dict(zip([5, 6, 7, 8], [1, 0, 1, 0], strict=True))
    for part in (splits.train, splits.test):
        assert [labels[shade] for shade in shades(part)] == part.labels.tolist()
    assert len(splits.train) == len(splits.test) == 2
    assert said == []


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], "test-00000-of-00001.parquet"),
        (["data/train-0.parquet", "data/train-1.parquet"], "data/validation-0.parquet"),
        (["default/train/0000.parquet", "default/train/0001.parquet"], "default/test/0000.parquet"),
        (["train.parquet", "train-2.parquet"], "valid.parquet"),
        (["set10-train_0.parquet", "set10-train_1.parquet"], "set10-test.parquet"),
    ],
)
def test_parquet_folder(tmp_path, train, test):
    root = tmp_path / "set"
    for index, name in enumerate(sorted(train)):
        save_table(root / name, [index], [0], ["a", "b"])
    save_table(root / test, [9], [1], ["a", "b"])
    (root / "README.md").write_text("about")
    splits, said = read(root)
    assert shades(splits.train) == [0, 1]
    assert shades(splits.test) == [9]
    assert splits.test.labels.tolist() == [1]
    assert splits.test.classes == ("a", "b")
    assert said[-2:] == [
        f"data: files in {root} that are not used: 1 (.md)",
        "data: 1 of 2 classes are in the test split alone (b)",
    ]


@pytest.mark.parametrize("name", ["part-{}", "{:04}"])
def test_parquet_files_that_name_no_split_are_all_training(tmp_path, name):
    for index in range(2):
        save_table(tmp_path / "set" / f"{name.format(index)}.parquet", [index])
    assert shades(read(tmp_path / "set")[0].train) == [0, 1]


@pytest.mark.parametrize("names", [("Test", "Train"), ("learn", "probe")])
def test_parquet_files_are_not_mixed_by_mistake(tmp_path, names):
    for index, name in enumerate(names):
        save_table(tmp_path / "set" / f"{name}-0.parquet", [index])
    with pytest.raises(SettingError, match=rf"data\.train_split=train: .* which has {', '.join(names)}"):
        read(tmp_path / "set")
    assert shades(read(tmp_path / "set", train_split=names[1])[0].train) == [1]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([30, 4, 30, -2], ("-2", "4", "30"), [2, 1, 2, 0]),
        (["b", "a", "b", "c"], ("a", "b", "c"), [1, 0, 1, 2]),
        ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    ],
)
def test_labels_are_mapped_to_numbers(tmp_path, labels, classes, numbers):
    save_table(tmp_path / "train.parquet", [1, 2, 3, 4], labels)
    save_table(tmp_path / "test.parquet", [5], labels[:1])
    splits, _ = read(tmp_path)
    assert splits.train.classes == classes
    assert splits.train.labels.tolist() == numbers
    assert splits.test.labels.tolist() == numbers[:1]


def test_differently_declared_classes_are_matched_by_name(tmp_path):
    save_table(tmp_path / "train.parquet", [1, 2], [0, 1], ["x", "y"])
    save_table(tmp_path / "test.parquet", [3, 4], [0, 1], ["y", "x"])
    splits, _ = read(tmp_path)
    assert splits.train.labels.tolist() == [0, 1]
    assert splits.test.labels.tolist() == [1, 0]


def test_missing_labels(tmp_path):
    save_table(tmp_path / "none.parquet", [1, 2], [-1, -1], ["x", "y"])
    assert read(tmp_path / "none.parquet")[0].train.labels is None
    save_table(tmp_path / "some.parquet", [1, 2], [0, -1], ["x", "y"])
    with pytest.raises(DataError, match=r"row 1 of .*some\.parquet: there is no label, while other rows have one"):
        read(tmp_path / "some.parquet")
    table = pq.read_table(tmp_path / "some.parquet")
    many = table.set_column(1, table.field("label"), pa.array([0, 7]))
    pq.write_table(many, tmp_path / "many.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*many\.parquet: label=7, but there are 2 classes"):
        read(tmp_path / "many.parquet")


def test_columns_are_chosen(tmp_path):
    path = tmp_path / "a.parquet"
    other = [{"bytes": png(solid(value)), "path": None} for value in (70, 80)]
    raw = [png(solid(value)) for value in (30, 40)]
    save_table(path, [1, 2], [0, 1], ["x", "y"], other=other, raw=raw, coarse=["p", "q"], score=[0.5, 0.25])
    there = r"There are: image \(PIL\.Image\.Image\), other \(dict\), raw \(binary\), coarse \(string\), score \("
    with pytest.raises(
        DataError,
        match=rf"several columns hold images \(image, other\); name one in data.image_column. {there}",
    ):
        read(path)
    splits, _ = read(path, image_column="other", label_column="coarse")
    assert shades(splits.train) == [70, 80]
    assert splits.train.classes == ("p", "q")
    assert shades(read(path, image_column="raw")[0].train) == [30, 40]
    with pytest.raises(SettingError, match=r"data\.image_column=img: there is no such column\. There are: image"):
        read(path, image_column="img")
    with pytest.raises(SettingError, match=r"data\.image_column=score: that column does not hold images\. There"):
        read(path, image_column="score")
    with pytest.raises(SettingError, match=r"data\.label_column=y: there is no such column\. There are: image"):
        read(path, image_column="image", label_column="y")
    with pytest.raises(SettingError, match=r"data\.label_column=score: that column does not hold classes, integers"):
        read(path, image_column="image", label_column="score")


def test_the_one_class_column_is_the_label(tmp_path):
    save_table(tmp_path / "a.parquet", [1, 2], [0, 1], ["x", "y"])
    table = pq.read_table(tmp_path / "a.parquet")
    features = datasets.Features.from_arrow_schema(table.schema)
    renamed = datasets.Features({"image": features["image"], "species": features["label"]})
    table = table.rename_columns(["image", "species"]).replace_schema_metadata(renamed.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[0].train.classes == ("x", "y")


def test_images_by_path_only(tmp_path):
    save(tmp_path / "a.png", solid(3))
    table = pa.table({"image": pa.array([{"bytes": None, "path": str(tmp_path / "a.png")}])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert shades(read(tmp_path / "a.parquet")[0].train) == [3]


def test_parquet_errors(tmp_path):
    save_table(tmp_path / "good.parquet", [1, 2])
    table = pq.read_table(tmp_path / "good.parquet")
    damaged = pa.table({"image": pa.array([table["image"][0].as_py(), {"bytes": b"junk", "path": None}])})
    pq.write_table(damaged, tmp_path / "row.parquet")
    with pytest.raises(DataError, match=r"row 1 of .*row\.parquet: cannot be decoded"):
        read(tmp_path / "row.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.parquet: cannot be read"):
        read(tmp_path / "junk.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"no column holds images; name one .* There are: text \(string\)"):
        read(tmp_path / "text.parquet")
    pq.write_table(table[:0], tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"a split holds no images"):
        read(tmp_path / "empty.parquet")
    (tmp_path / "mixed").mkdir()
    for name, source in (("train-0", "good"), ("train-1", "text")):
        shutil.copy(tmp_path / f"{source}.parquet", tmp_path / "mixed" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"train-1\.parquet: lacks the columns image of .*train-0\.parquet"):
        read(tmp_path / "mixed")


@pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="no CIFAR-10 beside the checkout")
def test_cifar10_test_file():
    path = SHARED / "cifar10/test-00000-of-00001.parquet"
    splits, said = read(path)
    assert splits.train.shape == (3, 32, 32)
    assert splits.train.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(splits.train.labels).tolist() == [800] * 10
    assert np.bincount(splits.test.labels).tolist() == [200] * 10
    assert said == []
    # The set aside keeps the file's order, so the file's first image is the first of one of the two parts.
    first = next(pq.ParquetFile(path).iter_batches(1)).to_pylist()[0]
    pixels = np.asarray(Image.open(BytesIO(first["img"]["bytes"]))).transpose(2, 0, 1)
    matches = [part.labels[0] for part in (splits.train, splits.test) if np.array_equal(part.images[0], pixels)]
    assert matches == [first["label"]]


# hub


@pytest.fixture
def hub(monkeypatch):
    """A hub of one data set; grows by the arguments of each call."""
    calls = []

    def table(values, labels):
        features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["x", "y"])})
        cells = [{"bytes": png(solid(value)), "path": None} for value in values]
        return datasets.Dataset.from_dict({"img": cells, "fine_label": labels}, features=features)

    def load_dataset(*args):
        calls.append(args)
        return datasets.DatasetDict({"train": table([1, 2, 3], [0, 1, 0]), "valid": table([9], [1])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("cifar10", ("uoft-cs/cifar10", None)),
        ("cifar100", ("uoft-cs/cifar100", None)),
        ("svhn", ("ufldl-stanford/svhn", "cropped_digits")),
        ("stl10", ("tanganke/stl10", None)),
        ("tiny-imagenet", ("zh-plus/tiny-imagenet", None)),
        ("some-one/a.set", ("some-one/a.set", None)),
    ],
)
def test_hub(hub, source, call, decoded):
    splits, said = read(source)
    assert hub == [call]
    assert (shades(splits.train), splits.train.labels.tolist()) == ([1, 2, 3], [0, 1, 0])
    assert (shades(splits.test), splits.test.labels.tolist()) == ([9], [1])
    assert splits.train.classes == ("x", "y")
    assert said == []
    read(source)
    assert len(decoded) == 4  # the second time out of the cache


def on_hub(monkeypatch, splits, names, image="image", label="label"):
    """A hub whose data set has these splits, of (shade, label) pairs, and these classes."""
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})

    def load_dataset(*args):
        tables = datasets.DatasetDict()
        for split, pairs in splits.items():
            cells = [{"bytes": png(solid(shade)), "path": None} for shade, _ in pairs]
            columns = {image: cells, label: [number for _, number in pairs]}
            tables[split] = datasets.Dataset.from_dict(columns, features=features)
        return tables

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def held(images):
    """Shades and the names of their classes."""
    names = None if images.labels is None else [images.classes[number] for number in images.labels]
    return shades(images), names


def test_svhn_as_on_the_hub(monkeypatch):
    splits = {"train": [(1, 4), (2, 9)], "test": [(3, 4)], "extra": [(5, 0), (6, 9), (7, 9)]}
    on_hub(monkeypatch, splits, [str(digit) for digit in range(10)])
    found, _ = read("svhn")
    assert held(found.train) == ([1, 2], ["4", "9"])
    assert held(found.test) == ([3], ["4"])
    assert held(read("svhn", train_split="extra")[0].train) == ([5, 6, 7], ["0", "9", "9"])


def test_tiny_imagenet_as_on_the_hub(monkeypatch):
    on_hub(monkeypatch, {"train": [(1, 1), (2, 0)], "valid": [(3, 1)]}, ["n01443537", "n01629819"])
    found, _ = read("tiny-imagenet")
    assert held(found.train) == ([1, 2], ["n01629819", "n01443537"])
    assert held(found.test) == ([3], ["n01629819"])


STL10 = {"train": [(1, 0), (2, 1)], "test": [(3, 1)], "unlabeled": [(4, -1), (5, -1), (6, -1)]}


def test_stl10_as_on_the_hub(monkeypatch):
    on_hub(monkeypatch, STL10, ["airplane", "bird"])
    found, said = read("stl10")
    assert held(found.train) == held(found.scored.train) == ([1, 2], ["airplane", "bird"])
    found, said = read("stl10", train_split="unlabeled", label_split="train")
    assert held(found.train) == ([4, 5, 6], None)
    assert held(found.test) == held(found.scored.test) == ([3], ["bird"])
    assert held(found.scored.train) == ([1, 2], ["airplane", "bird"])
    assert said == []
    again, _ = read("stl10", train_split="unlabeled", label_split="train")  # out of the cache
    assert held(again.scored.train) == ([1, 2], ["airplane", "bird"])


def test_unlabelled_folder_beside_labelled_ones(tmp_path):
    save(tmp_path / "set/unlabeled/a.png", solid(9))
    save(tmp_path / "set/train/cat/a.png", solid(1))
    save(tmp_path / "set/train/dog/a.png", solid(2))
    save(tmp_path / "set/test/dog/a.png", solid(3))
    found, _ = read(tmp_path / "set", train_split="unlabeled", label_split="train")
    assert held(found.train) == ([9], None)
    assert held(found.scored.train) == ([1, 2], ["cat", "dog"])
    assert held(found.test) == ([3], ["dog"])


def test_label_split_needs_a_test_split(tmp_path):
    save(tmp_path / "set/unlabeled/a.png", solid(9))
    save(tmp_path / "set/train/cat/a.png", solid(1))
    chosen = {"train_split": "unlabeled", "label_split": "train"}
    with pytest.raises(SettingError, match=r"data\.label_split=train: there is no test split to evaluate on"):
        read(tmp_path / "set", **chosen)
    with pytest.raises(SettingError, match=r"data\.test_split=train: that is data\.label_split, too"):
        read(tmp_path / "set", **chosen, test_split="train")
    with pytest.raises(SettingError, match=r"data\.label_split=labels: there is no such split"):
        read(tmp_path / "set", train_split="train", label_split="labels")


NAMES = ["tench, Tinca tinca", "goldfish, Carassius auratus", "Siamese cat, Siamese", "crane, bird", "crane, machine"]


def test_imagenet12_as_on_the_hub(monkeypatch, decoded):
    """Labels have all names of a class; those of the test split are secret; images of other classes are not decoded."""
    names = [*NAMES, *(f"{name}, and more" for name in list(IMAGENET12.values())[3:]), "golden retriever"]
    train = [(number, number) for number in range(len(names))]
    on_hub(monkeypatch, {"train": train, "validation": [(50, 1), (51, 3)], "test": [(60, -1)]}, names)
    found, _ = read("imagenet12")
    assert [name.partition(",")[0] for name in found.train.classes] == list(IMAGENET12.values())
    assert shades(found.train) == [number for number in range(len(names)) if number not in (0, 3, 4)]
    assert held(found.test) == ([50], ["goldfish, Carassius auratus"])
    assert len(decoded) == 13
    assert count_images("imagenet12") == 12


@pytest.mark.parametrize("kind", ["hub", "parquet", "folder"])
def test_some_classes_alone(kind, tmp_path, monkeypatch, decoded):
    pairs = [(10 * number + place, number) for place in range(3) for number in (4, 0, 2)]
    names = ["a", "b", "c, cee", "d", "e"]
    source = "some-one/set"
    if kind == "hub":
        on_hub(monkeypatch, {"train": pairs, "test": pairs[:3]}, names)
    elif kind == "parquet":
        source = tmp_path / "set"
        for part in range(3):
            some = pairs[3 * part : 3 * part + 3]
            save_table(source / f"train-{part}.parquet", [s for s, _ in some], [n for _, n in some], names)
        save_table(source / "test-0.parquet", [s for s, _ in pairs[:3]], [n for _, n in pairs[:3]], names)
    else:
        source = tmp_path / "set"
        for split, some in (("train", pairs), ("test", pairs[:3])):
            for shade, number in some:
                save(source / split / names[number] / f"{shade:02}.png", solid(shade))
    found, _ = read(source, classes=("e", "c"))
    assert found.train.classes == ("e", "c, cee")
    assert sorted(zip(*held(found.train), strict=True)) == [
        *((20 + place, "c, cee") for place in range(3)),
        *((40 + place, "e") for place in range(3)),
    ]
    assert sorted(shades(found.test)) == [20, 40]
    assert len(decoded) == 8
    assert len(read(source)[0].train) == 9  # and the cache does not mix them up


def test_corrupt_images_are_named_by_their_rows_among_all(monkeypatch):
    on_hub(monkeypatch, {"train": [(1, 0), (2, 1), (3, 0)]}, ["a", "b"])
    load_dataset = datasets.load_dataset

    def broken(*args):
        tables = load_dataset(*args)
        cells = [{"bytes": png(solid(1)), "path": None}] * 2 + [{"bytes": b"junk", "path": None}]
        columns = {"image": cells, "label": [0, 1, 0]}
        tables["train"] = datasets.Dataset.from_dict(columns, features=tables["train"].features)
        return tables

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match=r"row 2 of a/b \(train\): cannot be decoded"):
        read("a/b", classes=("a",))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("tenc",), r"data\.classes=tenc: there is no such class in data\.source=a/b, which has tench, Tinca tinca"),
        (("crane",), r"data\.classes=crane: 2 classes are called that"),
        (("goldfish", "n01443537"), r"data\.classes=goldfish n01443537: a class is named twice"),
    ],
)
def test_classes_that_there_are_not(monkeypatch, classes, message):
    on_hub(monkeypatch, {"train": [(1, 1), (2, 2)], "test": [(3, 1)]}, NAMES)
    with pytest.raises(SettingError, match=message):
        read("a/b", classes=classes)


def test_classes_need_labels(tmp_path):
    save(tmp_path / "flat/a.png", solid(1))
    with pytest.raises(SettingError, match=r"data\.classes=cat: a split of data\.source=.* has no labels"):
        read(tmp_path / "flat", classes=("cat",))


def test_imagenet12_in_folders_of_wordnet_ids(tmp_path):
    for place, name in enumerate([*IMAGENET12, "n01440764"]):
        for split in ("train", "val"):
            save(tmp_path / "imagenet" / split / name / "a.JPEG", solid(place))
    found, _ = read(tmp_path / "imagenet", classes=("imagenet12",))
    assert found.train.classes == tuple(IMAGENET12)
    assert len(found.train) == len(found.test) == 12


def test_corrupt_hub_image(monkeypatch):
    cells = [{"bytes": b"junk", "path": None}]
    table = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features({"image": datasets.Image()}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict({"train": table}))
    with pytest.raises(DataError, match=r"row 0 of a/b \(train\): cannot be decoded"):
        read("a/b")


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = (
        r"data\.source=cifar10: cannot load uoft-cs/cifar10 from the Hugging Face hub "
        r"\(Couldn't reach the Hub\)\. A local copy works too: give the path"
    )
    with pytest.raises(DataError, match=expected):
        read("cifar10")


def test_path_wins_over_hub_but_not_over_known_names(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "owner/name/a.png", solid(50))
    save(tmp_path / "cifar10/a.png", solid(60))
    assert shades(read("owner/name")[0].train) == [50]
    assert shades(read("./cifar10")[0].train) == [60]
    assert hub == []
    assert shades(read("cifar10")[0].train) == [1, 2, 3]


def test_unknown_names():
    with pytest.raises(SettingError, match=r"data\.source=cifr10: .*did you mean cifar10\? Accepted are digits, cifar"):
        read("cifr10")
    with pytest.raises(SettingError, match=r"data\.source=: there is no such file, folder or data set; Accepted"):
        read("")
    for source in ("a/b/c", "~/nothing-of-this-name", "x.parquet", "./x"):
        with pytest.raises(DataError, match=f"data.source={source}: there is no such file or folder"):
            read(source)


# cache


def test_second_load_decodes_nothing(folder, decoded, cache_folder):
    first, _ = read(folder)
    assert len(decoded) == 10
    second, _ = read(folder)
    assert len(decoded) == 10
    assert [entry.name.startswith("tmp") for entry in cache_folder.iterdir()] == [False]
    for one, other in ((first.train, second.train), (first.test, second.test)):
        assert np.array_equal(one.images, other.images)
        assert np.array_equal(one.labels, other.labels)
        assert one.classes == other.classes


def test_key_holds_what_the_pixels_depend_on(folder, decoded, tmp_path):
    read(folder)
    read(folder, images=2, test_share=0.4, memory=1e-9, held_out=0.5, seed=3)
    assert len(decoded) == 10
    read(folder, channels=1)
    assert len(decoded) == 20
    read(folder, size=4)
    assert len(decoded) == 30
    read(folder / "cat")  # the same files as one class, but without labels
    assert len(decoded) == 36
    save(folder / "cat" / "train0.png", solid(99))
    splits, _ = read(folder, test_share=0.01)
    assert len(decoded) == 46
    assert 99 in shades(splits.train) + shades(splits.test)


@pytest.mark.parametrize("name", ["entry.json", "pixels0.npy", "labels0.npy"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "junk"])
def test_damaged_entry_is_made_anew(folder, decoded, cache_folder, name, damage):
    before, _ = read(folder)
    (file,) = cache_folder.glob(f"*/{name}")
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes({"empty": b"", "cut": data[: len(data) - 5], "junk": b"junk" * 100}[damage])
    after, said = read(folder)
    assert said == []
    assert len(decoded) == 20
    assert np.array_equal(before.train.images, after.train.images)
    read(folder)
    assert len(decoded) == 20


def test_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOCOSFL_CACHE", str(tmp_path / "file" / "cache"))
    splits, said = read(folder, memory=1e-9)
    assert len(splits.train) == 8
    assert not splits.train.streamed
    assert len(said) == 1
    assert said[0].startswith(f"data: cannot write the cache {tmp_path / 'file' / 'cache'} (Not a directory)")


def test_full_disk(folder, cache_folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "fsync", full)
    splits, said = read(folder)
    assert len(splits.train) == 8
    reason = "(No space left on device); the decoded images stay in memory"
    assert said == [f"data: cannot write the cache {cache_folder} {reason}"]
    assert list(cache_folder.iterdir()) == []


def test_corrupt_image_leaves_nothing_in_the_cache(folder, cache_folder):
    (folder / "dog" / "train3.png").write_bytes(b"junk")
    with pytest.raises(DataError):
        read(folder)
    assert list(cache_folder.iterdir()) == []


def test_another_process_may_write_the_same_entry(folder, cache_folder, monkeypatch):
    replace = os.replace

    def late(source, target):
        shutil.copytree(source, target)
        replace(source, target)

    monkeypatch.setattr(cache.os, "replace", late)
    splits, said = read(folder)
    assert len(splits.train) == 8
    assert said == []
    assert len(list(cache_folder.iterdir())) == 1


def test_default_cache_folder(monkeypatch):
    monkeypatch.delenv("MOCOSFL_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.cache() == Path("/home/someone/.cache/mocosfl")


# memory, test split, data.images


@pytest.mark.parametrize("images", [None, 4])
def test_sets_larger_than_memory_are_streamed(folder, cache_folder, images):
    held, _ = read(folder, images=images)
    streamed, said = read(folder, images=images, memory=1e-9)
    assert said == [
        f"data: 0.0 GiB of decoded images are more than data.memory=1e-09 GiB; they are streamed from {cache_folder}"
    ]
    for one, other in ((held.train, streamed.train), (held.test, streamed.test)):
        assert not one.streamed
        assert other.streamed
        assert len(one) == len(other)
        rows = np.arange(len(one))[::-1]
        assert np.array_equal(one.take(rows, "cpu").numpy(), other.take(rows, "cpu").numpy())
        assert np.array_equal(one.labels, other.labels)
    assert streamed.train.images.filename == streamed.test.images.filename  # one file, no copy


def test_memory_counts_both_splits_as_they_are_used(folder):
    image = 3 * 8 * 8 / 2**30
    assert not read(folder, memory=10 * image)[0].train.streamed
    assert read(folder, memory=9.9 * image)[0].train.streamed
    assert not read(folder, memory=9.9 * image, images=2)[0].train.streamed


def test_test_split_depends_on_the_seed_alone():
    one, two, other = (read("digits", seed=seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(one.test.images, two.test.images)
    assert not np.array_equal(one.test.images, other.test.images)
    assert np.array_equal(np.bincount(one.test.labels), np.bincount(other.test.labels))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_every_class_is_in_both_splits(folder, share):
    splits, _ = read(folder, test_share=share)
    assert set(splits.train.labels) == set(splits.test.labels) == {0, 1}


def test_images_draws_every_class_alike(folder):
    splits, _ = read(folder, images=5, test_share=0.01)  # of 5 cats and 3 dogs
    assert sorted(np.bincount(splits.train.labels)) == [2, 3]
    assert shades(splits.train) == sorted(shades(splits.train))
    assert all((shade >= 10) == label for shade, label in zip(shades(splits.train), splits.train.labels, strict=True))
    assert not set(shades(splits.train)) & set(shades(splits.test))
    splits, _ = read(folder, images=7, test_share=0.01)
    assert np.bincount(splits.train.labels).tolist() == [4, 3]  # the dogs are used up


def test_images_without_labels(folder):
    splits, _ = read(folder / "cat", images=4)
    assert len(splits.train) == 4
    assert shades(splits.train) == sorted(set(shades(splits.train)))


def test_more_images_than_there_are(folder):
    with pytest.raises(SettingError, match=r"data\.images=9: the training split has 8 images"):
        read(folder, images=9)


def test_balanced():
    labels = np.repeat([0, 1, 2, 0], [50, 3, 20, 50])
    rows = np.flatnonzero(np.arange(123) % 5 > 0)
    for count in (0, 1, 6, 30, len(rows)):
        drawn = balanced(rows, labels, count, np.random.default_rng(0))
        assert len(drawn) == count
        assert np.isin(drawn, rows).all()
        assert (np.diff(drawn) > 0).all()
        counts = np.bincount(labels[drawn], minlength=3)
        left = np.bincount(labels[rows], minlength=3) - counts
        assert all(counts[c] >= counts.max() - 1 for c in range(3) if left[c])
    assert len(balanced(rows[:0], labels, 0, np.random.default_rng(0))) == 0
