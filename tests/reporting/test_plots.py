"""Curves with fewer points, and heat maps of many clients."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mocosfl.reporting.plots import BARS, CLASSES, POINTS, heat_map, per_client, plain, running_mean, thinned
from mocosfl.reporting.report import Held


@given(st.integers(1, 5000), st.integers(4, 300), st.integers(0, 2**32 - 1))
def test_a_thinner_curve_keeps_its_extremes(count: int, points: int, seed: int) -> None:
    x, y = np.arange(count) / 3, np.random.default_rng(seed).normal(size=count)
    fewer_x, fewer_y = thinned(x, y, points)
    assert len(fewer_x) == len(fewer_y) <= max(points, 4)
    assert (np.diff(fewer_x) > 0).all()
    rows = np.searchsorted(x, fewer_x)
    assert (y[rows] == fewer_y).all()
    assert (fewer_y.min(), fewer_y.max()) == (y.min(), y.max())
    assert (fewer_x[0], fewer_x[-1]) == (x[0], x[-1])


def test_numbers_that_are_none_do_not_hide_the_others() -> None:
    y = np.sin(np.arange(10_000) / 500)
    y[::3] = np.nan
    y[7000:8000] = np.inf
    _, fewer = thinned(np.arange(10_000), y)
    known = y[np.isfinite(y)]
    assert np.nanmin(fewer) == known.min()
    assert fewer[np.isfinite(fewer)].max() == known.max()


@pytest.mark.parametrize("window", [1, 3, 100])
def test_running_mean(window: int) -> None:
    values = np.random.default_rng(0).normal(size=100)
    values[[3, 50]] = np.nan
    naive = [np.nanmean(values[max(0, end - window) : end]) if window > 1 else values[end - 1] for end in range(1, 101)]
    np.testing.assert_allclose(running_mean(values, window), naive)


def test_a_heat_map_of_very_many_clients_is_bounded_and_loses_no_image() -> None:
    counts = np.random.default_rng(0).poisson(2, (100_000, 10))
    held = Held(counts.sum(1), counts, tuple(f"class {label}" for label in range(10)))
    trace = heat_map(0, held).figure["data"][0]
    assert len(trace["z"]) == len(trace["y"]) == 10
    assert len(trace["z"][0]) == len(trace["x"]) <= 500
    widths = [int(b.replace(",", "")) - int(a.replace(",", "")) + 1 for a, b in (x.split(" to ") for x in trace["x"])]
    total = sum(value * width for row in trace["z"] for value, width in zip(row, widths, strict=True))
    assert total == pytest.approx(counts.sum(), rel=1e-3)


def test_very_many_classes_share_rows() -> None:
    counts = np.random.default_rng(0).poisson(2, (20, 300))
    trace = heat_map(0, Held(counts.sum(1), counts, tuple(map(str, range(300))))).figure["data"][0]
    assert len(trace["z"]) == len(trace["y"]) == CLASSES
    assert trace["y"][0] == "0 and 2 more"
    assert sum(value or 0 for row in trace["z"] for value in row) == counts.sum()


def test_a_heat_map_of_few_clients_shows_each() -> None:
    held = Held(np.array([5, 3]), np.array([[5, 0], [1, 2]]), ("cat", "cat"))
    trace = heat_map(0, held).figure["data"][0]
    assert trace["z"] == [[5, 1], [None, 2]]
    assert trace["x"] == ["client 0", "client 1"]
    assert trace["y"] == ["cat", "cat (1)"]  # a row each, though they are called alike


def test_very_many_clients_are_drawn_in_order() -> None:
    values = np.random.default_rng(0).poisson(50, 100_000)
    trace = per_client("p", "images", values, 0).figure["data"][0]
    assert len(trace["x"]) <= POINTS
    assert (trace["y"][0], trace["y"][-1]) == (values.max(), values.min())
    bars = per_client("p", "images", values[:BARS], 0).figure["data"][0]
    assert bars["type"] == "bar"
    assert bars["y"] == values[:BARS].tolist()


def test_texts_are_no_html_for_plotly() -> None:
    assert plain("<a href='http://x'>&lt;") == "&lt;a href='http://x'&gt;&amp;lt;"
