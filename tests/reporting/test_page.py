"""What stands on a page, without looking at it."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from mocosfl.cli import main
from mocosfl.errors import SettingError
from mocosfl.reporting import page as module
from mocosfl.reporting.examples import Examples
from mocosfl.reporting.page import RUNS, html, names_of, page
from mocosfl.reporting.report import Missing, Reader
from mocosfl.reporting.sections import Live, Shown
from mocosfl.run import FILES, Run

SECTIONS = (
    *("settings", "curves", "partition", "participation", "traffic", "time", "evaluation"),
    *("neighbours", "map", "privacy"),
)


def shown(folder: Path, found: Examples | Missing | None = None) -> Shown:
    return Shown(folder.name, Reader(folder).read(), found or Missing("not asked for"))


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of those that are not scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.texts.append(data)


def own(text: str) -> str:
    """A page without plotly.js."""
    return text.replace(get_plotlyjs(), "")


def test_every_section_is_there_whatever_the_run_has(finished: Path, seen: Examples, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    for run in (shown(finished, seen), shown(tmp_path)):
        made = page([run])
        assert tuple(section.name for section in made.sections) == SECTIONS
        tags = Tags(own(html(made))).tags
        assert tuple(attributes["id"] for tag, attributes in tags if tag == "section") == SECTIONS
    assert "not finished" in own(html(page([shown(tmp_path)])))


def test_figures_are_what_plotly_accepts(finished: Path, seen: Examples, copied: Callable[[str], Path]) -> None:
    other = copied("other")
    Run.open(other).log({"step": 33, "epoch": 2.1, "clients": 3, "stragglers": 1, "socket_bytes_in": 5e6})
    Run.open(other).log({"step": 34, "epoch": 2.2, "socket_bytes_in": 6e6, "socket_bytes_out": 1e6})
    drawn = set()
    for runs in ([shown(finished, seen)], [shown(finished, seen), shown(other, seen)]):
        for name, figure in page(runs).state()["figures"].items():
            drawn.add(name)
            made = go.Figure(data=figure["data"], layout=figure["layout"])  # raises for anything that it does not know
            assert len(made.data)
    assert {"loss", "contrast-accuracy", "knn-held-out", "rates", "divergence", "spread", "traffic", "time"} <= drawn
    assert {"partition-0", "participation-0", "map-0", "map-1", "wire-1", "connected-1", "privacy"} <= drawn


def test_nothing_of_a_run_is_taken_for_html(copied: Callable[[str], Path], seen: Examples) -> None:
    evil = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
    folder = copied("<b>bold & co")
    run = Run.open(folder)
    (folder / "config.yaml").write_text(run.config.updated({"recipe": evil, "clients.init": evil}).to_yaml())
    counts = np.ones((20, 2), int)
    np.savez(folder / "partition.npz", images=counts.sum(1), counts=counts, classes=np.array([evil, "'\"&lt;"]))
    report = json.loads((folder / "privacy.json").read_text())
    report["attacks"][evil] = report["attacks"].pop("decoder") | {"what": evil}
    run.write_json("privacy.json", report)
    run.log({"step": 40, "epoch": 3, f"divergence/{evil}": 0.1, f"seconds/{evil}": 1.0})
    hostile = Examples(**(vars(seen) | {"classes": (evil, *seen.classes[1:]), "what": evil}))
    text = own(html(page([shown(folder, hostile)])))
    assert text.count("<script") == text.count("</script>") == 3  # data, plotly's (left out here) and our own
    tags = Tags(text).tags
    assert not [tag for tag, attributes in tags if "onerror" in attributes or tag == "b"]
    assert {attributes["src"][:11] for tag, attributes in tags if tag == "img"} == {"data:image/"}
    figures = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    texts = re.sub(r"<br>|<extra>|</extra>", "", json.dumps(figures))  # of our own, for plotly, which takes some HTML
    assert "<" not in texts.replace("<extra>%{fullData.name}", "")
    assert "&lt;img src=x" in json.dumps(figures)


def test_scripts_are_named_by_their_hashes_and_nothing_can_be_loaded(finished: Path) -> None:
    text = html(page([shown(finished)]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1].replace("&#39;", "'")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    for script in scripts:
        assert f"'sha256-{module._hash(script)}'" in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in policy
    assert "connect-src 'self'" in html(page([shown(finished)]), "state.json").replace("&#39;", "'")
    addresses = [a for _, attributes in Tags(own(text)).tags for n, a in attributes.items() if n in ("src", "href")]
    assert {address[:1] for address in addresses} <= {"#", "d"}  # anchors and data


def test_settings_that_differ_come_first_and_are_marked(finished: Path, copied: Callable[[str], Path]) -> None:
    other = copied("other")
    config = Run.open(other).config.updated({"train.lr": 0.01, "clients.lr": 0.5})
    (other / "config.yaml").write_text(config.to_yaml())
    table, folded = page([shown(finished), shown(other)]).sections[0].blocks
    assert [list(row) for row in table.rows] == [["clients.lr", "–", "0.5"], ["train.lr", "0.06", "0.01"]]
    everything = folded.blocks[0]
    assert [everything.rows[place][0] for place in sorted(everything.marked)] == ["clients.lr", "train.lr"]
    alone, _ = page([shown(finished)]).sections[0].blocks
    assert ["clients.batch", "4"] in [list(row) for row in alone.rows]
    assert "clients.lr" not in [row[0] for row in alone.rows]


def test_pictures_are_left_out_where_they_are_not_wanted(finished: Path, seen: Examples) -> None:
    made = page([shown(finished, seen)], images=False)
    assert "data:image" not in own(html(made))
    assert "pictures" not in made.state()["figures"]["map-0"]
    assert "left out, as was asked for" in own(html(made))
    assert own(html(page([shown(finished, seen)]))).count("data:image") > 48


def test_a_long_run_makes_no_large_page(copied: Callable[[str], Path]) -> None:
    folder = copied("long")
    values = np.random.default_rng(0).normal(size=50_000)
    values[23_456], values[7_777] = 50, -50
    with (folder / "metrics.jsonl").open("w") as file:
        for step, value in enumerate(values.tolist(), start=1):
            file.write(f'{{"step": {step}, "epoch": {step / 100}, "seconds": {step / 10}, "loss": {value}}}\n')
    made = page([shown(folder)])
    raw = made.state()["figures"]["loss"]["data"][0]
    assert len(raw["y"]) <= 1000
    assert (max(raw["y"]), min(raw["y"])) == (50, -50)
    assert len(own(html(made))) < 10**6


def test_a_page_under_way_says_what_comes_later(finished: Path) -> None:
    live = Live("training", step=3, steps=9, left=61.0, clients=(("client", "heard"), [("7", "1 s ago")]), more=2)
    made = page([shown(finished)], live)
    assert made.sections[0].name == "clients"
    text = own(html(made, "state.json"))
    for words in ("step 3 of 9", "about 1 min 1 s left", "1 s ago", "and 2 more", "appears when the run is over"):
        assert words in text
    assert not made.state()["ended"]
    assert page([shown(finished)]).state()["ended"]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert names_of([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(SettingError, match="x is named twice"):
        names_of([tmp_path / "x", tmp_path / "a/../x"])
    with pytest.raises(SettingError, match="9 runs: a page shows 8 at most"):
        names_of([tmp_path / str(place) for place in range(RUNS + 1)])


def test_the_command_writes_one_file(
    copied: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mocosfl.reporting.examples.IMAGES", 50)
    copied("one"), copied("two")
    (tmp_path / "one/report.html").write_text("<!doctype html>of an earlier version")
    assert main(["report", "one"]) == 0
    assert "report: one/report.html" in capsys.readouterr().out
    assert (tmp_path / "one/report.html").read_text().startswith("<!doctype html>")
    assert main(["report", "one", "two", "--no-images"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "2 runs" in text
    assert "data:image" not in own(text)
    assert main(["report", "one", "--out", "new/page.html", "--no-images"]) == 0
    assert (tmp_path / "new/page.html").exists()
    assert "report.html" in FILES  # so the run can be made anew
    assert main(["report", "one", "--out", "new/page.html", "--no-images"]) == 0  # replaces its own
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<!doctype html>my own")
    assert main(["report", "one", "--out", "thesis.html"]) == 1
    assert "thesis.html is already there and is no report of mocosfl" in capsys.readouterr().err
    assert thesis.read_text() == "<!doctype html>my own"


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["nowhere"], 1, "nowhere is not a run"),
        (["one", "one/"], 1, "is named twice"),
        (["one", "--out", "one"], 1, "out=one: that is a folder"),
        ([], 2, "name a run"),
    ],
)
def test_errors_of_the_command(
    args: list[str],
    status: int,
    words: str,
    copied: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    copied("one")
    assert main(["report", *args]) == status
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("report.html"))
