"""Alignment and uniformity, held to their definitions in plain loops (Wang and Isola, 2020)."""

import math
import sys

import pytest
import torch

from mocosfl.evaluation import alignment, uniformity

module = sys.modules[alignment.__module__]


def unit(vector):
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def naive_alignment(first, second, alpha):
    pairs = zip(first.tolist(), second.tolist(), strict=True)
    return sum(distance(unit(a), unit(b)) ** alpha for a, b in pairs) / len(first)


def naive_uniformity(features, t):
    vectors = [unit(vector) for vector in features.tolist()]
    potentials = []
    for i in range(len(vectors)):
        for j in range(len(vectors)):
            if i != j:
                potentials.append(math.exp(-t * distance(vectors[i], vectors[j]) ** 2))
    return math.log(sum(potentials) / len(potentials))


@pytest.fixture
def views():
    generator = torch.Generator().manual_seed(0)
    first = 3 * torch.rand(23, 5, generator=generator)
    return first, first + torch.rand(23, 5, generator=generator)


def test_equal_the_naive_loops(views):
    for alpha in (2, 1, 3.5):
        assert alignment(*views, alpha=alpha) == pytest.approx(naive_alignment(*views, alpha), rel=1e-12)
    for t in (2, 0.5, 10):
        assert uniformity(views[0], t=t) == pytest.approx(naive_uniformity(views[0], t), rel=1e-12)
    assert alignment(*views) == alignment(*views, alpha=2)
    assert uniformity(views[0]) == uniformity(views[0], t=2)


def test_uniformity_does_not_depend_on_the_chunk(views, monkeypatch):
    whole = uniformity(views[0])
    for numbers in (1, 23, 4 * 23, 22 * 23):  # one row, ..., rows that do not divide the images
        monkeypatch.setattr(module, "CHUNK_NUMBERS", numbers)
        assert uniformity(views[0]) == pytest.approx(whole, rel=1e-12)


def test_the_length_of_features_does_not_matter(views):
    first, second = views
    scale = 1 + torch.arange(23.0)[:, None]
    assert alignment(first * scale, second) == pytest.approx(alignment(first, second), rel=1e-5)
    assert uniformity(first * scale) == pytest.approx(uniformity(first), rel=1e-5)


def test_extremes():
    same = torch.tensor([[0.6, 0.8]]).repeat(40, 1)
    assert alignment(same, same) == 0
    assert alignment(same, -same) == pytest.approx(4)
    assert uniformity(same) == pytest.approx(0, abs=1e-12)
    # Two opposite points: of 40 * 39 pairs, 2 * 20 * 19 are at distance 0 and 2 * 20 * 20 at distance 2.
    half = torch.cat([same[:20], -same[:20]])
    assert uniformity(half) == pytest.approx(math.log((760 + 800 * math.exp(-8)) / 1560))
    spread = torch.randn(500, 200, generator=torch.Generator().manual_seed(0))
    assert uniformity(spread) == pytest.approx(-4, abs=0.1)


def test_rejects(views):
    first, second = views
    with pytest.raises(ValueError, match=r"\(23, 5\) and \(22, 5\)"):
        alignment(first, second[1:])
    with pytest.raises(ValueError, match=r"\(0, 5\)"):
        alignment(first[:0], second[:0])
    with pytest.raises(ValueError, match=r"\(1, 5\): expected \(N, D\) with N at least 2"):
        uniformity(first[:1])
