"""The page in a real browser: what is drawn, on a desk and on a phone, in the light and in the dark."""

import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mocosfl.reporting.dashboard import Dashboard
from mocosfl.reporting.examples import Examples
from mocosfl.reporting.page import page, write
from mocosfl.reporting.report import Reader
from mocosfl.reporting.sections import Shown

PATIENCE = 150
"""Seconds after which something hangs."""
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PLOTS = {
    *("loss", "contrast-accuracy", "knn-held-out", "rates", "divergence", "spread", "partition-0", "participation-0"),
    *("traffic", "time", "images-per-second", "map-0", "privacy"),
}
INK = """node => [...node.querySelectorAll('.scatterlayer path, .barlayer path, .heatmaplayer image')]
    .filter(mark => { const box = mark.getBoundingClientRect(); return box.width + box.height > 0; }).length"""
"""Lines, points, bars and heat maps of a plot that can be seen."""


@contextmanager
def opened(browser: Any, address: str, **context: Any) -> Iterator[Any]:
    """A page; whatever it reports or asks the network for is an error."""
    own = browser.new_context(**context)
    found, complaints = own.new_page(), []
    found.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    found.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    allowed = address.rpartition("/")[0] + "/" if address.startswith("http") else address
    found.on("request", lambda r: r.url.startswith((allowed, "data:", "blob:")) or complaints.append(r.url))
    found.goto(address)
    yield found
    own.close()
    assert complaints == []


def until(found: Any, expression: str) -> None:
    """Wait until something on the page is true. (Playwright's own way of waiting is what the page's policy forbids.)"""
    deadline = time.monotonic() + PATIENCE
    while not found.evaluate(expression):
        assert time.monotonic() < deadline, expression
        found.wait_for_timeout(100)


@pytest.fixture(scope="module")
def written(finished: Path, seen: Examples, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the page of a finished run."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(page([Shown("mine", Reader(finished).read(), seen)]), path)
    return path.as_uri()


@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_every_section_is_drawn(browser: Any, written: str, size: dict[str, int], scheme: str) -> None:
    phone = size is PHONE
    with opened(browser, written, viewport=size, color_scheme=scheme, has_touch=phone, is_mobile=phone) as found:
        plots = found.query_selector_all(".plot")
        assert {plot.get_attribute("data-figure") for plot in plots} == PLOTS
        for plot in plots:
            assert plot.evaluate(INK) > 0, plot.get_attribute("data-figure")
            box = plot.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size["width"]
        for section in found.query_selector_all("main section"):
            assert section.query_selector("h2").inner_text()
            assert section.query_selector(".plot, table, .gallery") is not None, section.get_attribute("id")
        images = found.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
        assert len(images) == 48 + 1
        assert all(width and alt for width, alt in images)
        assert found.evaluate("document.documentElement.scrollWidth") == size["width"]
        levels = found.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
        ink, paper = found.evaluate(
            "[getComputedStyle(document.querySelector('#plot-loss .xtick text')).fill, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        light, dark = brightness(paper), brightness(ink)
        assert (light - dark if scheme == "light" else dark - light) > 150
        buttons = found.evaluate("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
        assert not [title for title in buttons if "hare" in title or "loud" in title]  # of a chart with a server


def brightness(colour: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def test_colours_change_with_the_light(browser: Any, written: str) -> None:
    with opened(browser, written, color_scheme="light") as found:
        line = "getComputedStyle(document.querySelector('#plot-loss .scatterlayer path.js-line')).stroke"
        before = found.evaluate(line)
        found.emulate_media(color_scheme="dark")
        until(found, f"{line} !== '{before}'")
        found.evaluate("dispatchEvent(new Event('beforeprint'))")  # paper is white
        until(found, f"{line} === '{before}'")


def test_a_point_of_the_map_shows_its_image(browser: Any, written: str) -> None:
    with opened(browser, written, viewport=DESK) as found:
        point = found.locator("#plot-map-0 .scatterlayer path.point").first
        point.scroll_into_view_if_needed()
        box = point.bounding_box()
        found.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        until(found, "!document.getElementById('preview').hidden")
        assert "data:image/jpeg" in found.evaluate("document.getElementById('preview').style.backgroundImage")


def test_names_that_are_html_do_nothing(
    browser: Any, copied: Callable[[str], Path], seen: Examples, tmp_path: Path
) -> None:
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
    folder = copied("hostile")
    counts = np.ones((20, 2), int)
    link = "<a href='https://example.org'>x</a>"
    np.savez(folder / "partition.npz", images=counts.sum(1), counts=counts, classes=np.array([evil, link]))
    seen = Examples(**(vars(seen) | {"classes": (evil, link, *seen.classes[2:])}))
    path = tmp_path / "hostile.html"
    write(page([Shown(evil, Reader(folder).read(), seen), Shown(link, Reader(folder).read(), seen)]), path)
    with opened(browser, path.as_uri()) as found:
        assert found.evaluate("window.hacked") is None
        assert found.evaluate("document.querySelectorAll('main a, svg a, img:not([src^=data])').length") == 0
        assert "<img src=x" in found.inner_text("#plot-map-0")
        assert "<img src=x" in found.inner_text("header")


def test_the_curve_of_a_real_run_grows(browser: Any, tmp_path: Path) -> None:
    """As a user sees it: the command in a process of its own, until it is over."""
    command = [sys.executable, "-m", "mocosfl", "train", "digits", "--out", "run", "--dashboard", "0"]
    tiny = ["--model.width", "8", "--train.epochs", "12", "--train.log-every", "2", "--evaluation.probe-epochs", "2"]
    process = subprocess.Popen(
        [*command, *tiny],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    try:
        address = process.stdout.readline().removeprefix("dashboard: ").strip()
        assert address.startswith("http://127.0.0.1:")
        length = "document.querySelector('#plot-loss')?.data?.[0]?.x?.length ?? 0"
        with opened(browser, address, viewport=DESK) as found:
            until(found, f"{length} >= 2")
            found.evaluate("Plotly.relayout('plot-loss', {'xaxis.range': [0, 5], 'xaxis.autorange': false})")
            found.evaluate("document.querySelector('#settings details').open = true")
            first = found.evaluate(length)
            until(found, f"{length} > {first}")
            assert found.evaluate("document.querySelector('#plot-loss').layout.xaxis.range") == [0, 5]
            assert found.evaluate("document.querySelector('#settings details').open")
            assert "appears when the run is over" in found.inner_text("#map")
            until(found, "document.documentElement.dataset.ended === 'true'")
            assert "the run is over" in found.inner_text("header")
            assert found.query_selector("#plot-map-0").evaluate(INK) > 100
            assert found.query_selector("#signal").is_hidden()
        process.wait(60)
        assert process.returncode == 0, process.stdout.read()
    finally:
        process.kill()
        process.communicate()


def test_a_server_that_is_gone_is_noticed(browser: Any, tmp_path: Path) -> None:
    own = browser.new_context()
    found = own.new_page()
    with Dashboard("0", tmp_path / "run", lambda text: None) as dashboard:
        found.goto(dashboard.url)
        assert "preparing" in found.inner_text("header")
    until(found, "!document.getElementById('signal').hidden")
    assert "No answer since" in found.inner_text("#signal")
    own.close()
