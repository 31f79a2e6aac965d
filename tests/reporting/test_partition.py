import io

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from mocosfl.reporting.partition import draw, table


def printed(counts, class_names):
    console = Console(file=io.StringIO(), width=80)
    console.print(table(counts, class_names))
    return console.file.getvalue()


def test_table_names_the_largest_classes_and_sums_up():
    text = printed(np.array([[4, 0, 1000], [0, 3, 0]]), ["cat", "[red]dog", "ship"])
    assert "ship: 1,000, cat: 4" in text
    assert "[red]dog: 3" in text
    assert "clients: 2\nimages: 1,007\n" in text
    assert "images a client: least 3, median 503.5, most 1,004" in text
    assert "classes a client: least 1, median 1.5, most 2" in text


def test_table_shows_the_first_clients_only():
    text = printed(np.ones((100, 50), int), [f"a class with a long name {label}" for label in range(50)])
    assert "│     19 │" in text
    assert "│     20 │" not in text
    assert "│      … │" in text
    assert "+47" in text
    assert "clients: 100" in text


@pytest.mark.parametrize("counts", [np.array([5, 7, 9]), np.array([[5], [7], [9]])])
def test_table_of_unlabelled_images(counts):
    text = printed(counts, None)
    assert "least 5, median 7, most 9" in text
    assert "class" not in text


@pytest.mark.parametrize(("clients", "classes"), [(1, 2), (5, 200), (100, 10), (1234, 3)])
def test_picture_of_any_size(tmp_path, clients, classes):
    counts = np.random.default_rng(0).poisson(1, (clients, classes))
    draw(counts, [f"$a$ {label}" for label in range(classes)], tmp_path / "p.png", "two $ and $")
    height, width, _ = imread(tmp_path / "p.png").shape
    assert width == 1500
    assert height <= 1650
    assert [file.name for file in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize("clients", [3, 1000])
def test_picture_of_unlabelled_images(tmp_path, clients):
    draw(np.arange(1, clients + 1), None, tmp_path / "p.png", "sizes")
    assert imread(tmp_path / "p.png").shape[1] == 1500


def test_an_older_picture_is_replaced_and_a_failure_leaves_it(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    with pytest.raises(IndexError):
        draw(np.ones((3, 2), int), ["only one name"], path, "fails")
    assert path.read_bytes() == b"old"
    draw(np.ones((3, 2), int), ["cat", "dog"], path, "works")
    assert path.read_bytes().startswith(b"\x89PNG")
