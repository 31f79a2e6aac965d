"""Runs side by side: what is in the table is what is in their files."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mocosfl.baselines import method_settings
from mocosfl.cli import main
from mocosfl.config import Config
from mocosfl.errors import RunError, SettingError
from mocosfl.footprint.plan import Plan
from mocosfl.footprint.traffic import of_client
from mocosfl.reporting import compare

TINY = {"data.source": "digits", "data.size": 8, "data.channels": 1, "model.width": 4, "clients.number": 4}
STEPS = 40


def hand_made(
    path: Path, knn: float | None = None, probe: float | None = None, loss: float = 3.5, **changes: object
) -> Path:
    """A run folder of four images a step; finished, if there is a kNN."""
    path.mkdir(parents=True)
    config = Config().updated(TINY | {"train.epochs": 0.5} | changes)
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "data.json").write_text('{"images": 320}', encoding="utf-8")
    lines = []
    for step in range(10, (STEPS if knn is not None else 20) + 1, 10):
        last = {"knn_held_out": 30.0 + step} if step > 10 else {}
        lines.append(
            {"step": step, "epoch": step / 80, "seconds": 3.0 * step, "loss": loss + (STEPS - step) / 100} | last
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if knn is not None:
        figures = {"knn": knn, "linear_probe": probe, "knn_untrained": 20.0, "training_seconds": 600.0, "steps": STEPS}
        (path / "result.json").write_text(json.dumps(figures), encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    hand_made(folder / "run-10", 51.25, 60.5, seed=1)
    hand_made(folder / "run-9", 53.75, None, loss=2.5, **{"sync.every": 3})
    hand_made(folder / "half", **{"sync.every": 3, "train.log_every": 7})
    hand_made(folder / "failed" / "broken")
    (folder / "failed" / "broken.log").write_text("step 1\nerror: no [luck]\n\n", encoding="utf-8")
    (folder / "failed" / "early.log").write_text("error: no data", encoding="utf-8")
    return folder


def test_figures_are_those_of_the_files(runs: Path) -> None:
    found = {row.name: row for row in compare.rows([runs])}
    assert list(found) == ["broken", "early", "half", "run-9", "run-10"]
    plan = Plan.of(Config().updated(TINY | {"train.epochs": 0.5}), 320)
    figures = {"knn": 51.25, "linear_probe": 60.5, "knn_untrained": 20.0, "loss": 3.5, "images": 160, "seconds": 600}
    assert found["run-10"].figures == figures | {"bytes": sum(of_client(plan).run.values())}
    assert "linear_probe" not in found["run-9"].figures
    assert found["half"].state == "step 20/40"
    assert found["half"].figures.keys() == {"loss", "images", "seconds", "bytes"}
    assert (found["half"].figures["images"], found["half"].figures["seconds"]) == (80, 60)
    assert found["broken"].state == "failed: error: no [luck]"
    assert (found["early"].state, found["early"].settings) == ("failed: error: no data", {})


def test_bytes_of_whole_networks_stand_beside_those_of_halves(tmp_path: Path) -> None:
    hand_made(tmp_path / "mocosfl", 50.0)
    hand_made(tmp_path / "fedema", 45.0, **{"clients.batch": 4} | method_settings("fedema"))
    lines = list(csv.DictReader(io.StringIO(compare.as_csv(compare.rows([tmp_path])))))
    bytes_ = {line["run"]: float(line["bytes"]) for line in lines}
    config = Config().updated(TINY | {"train.epochs": 0.5, "clients.batch": 4} | method_settings("fedema"))
    average = of_client(Plan.of(config, 320)).average
    assert bytes_["fedema"] == 2 * average["halves up"] > bytes_["mocosfl"]  # 10 steps, and one average at the end


def test_only_settings_that_differ_are_told(runs: Path) -> None:
    rows = compare.rows([runs])
    assert compare.differing(rows) == ["seed", "sync.every"]  # not train.log_every, which changes no number
    most = compare.reference(rows, ["seed", "sync.every"])
    assert most == {"seed": 0, "sync.every": 50}
    by_name = {row.name: row for row in rows}
    assert compare.changes(by_name["run-9"], most) == {"sync.every": 3}
    assert compare.changes(by_name["run-10"], most) == {"seed": 1}
    other = compare.reference(rows, ["seed", "sync.every"], "run-9")
    assert compare.changes(by_name["run-10"], other) == {"seed": 1, "sync.every": 50}
    with pytest.raises(SettingError, match="base=run-8: did you mean run-9"):
        compare.reference(rows, ["seed"], "run-8")


def test_all_forms_say_the_same(runs: Path) -> None:
    rows = compare.rows([runs])
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compare.table(rows))
    printed = console.export_text()
    marked = compare.markdown(rows)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in marked.split("\n")[2:7]
    }
    assert cells["run-9"] == ["sync.every=3", "finished", "53.75", "–", "2.500", "160", "10 min", cells["run-9"][-1]]
    assert cells["run-10"][:4] == ["seed=1", "finished", "51.25", "60.50"]
    assert cells["broken"][1] == "failed: error: no [luck]"
    for cell in (
        "run-9",
        "sync.every=3",
        "53.75",
        "2.500",
        "step 20/40",
        "no [luck]",
        "Where nothing else is said: seed=0",
    ):
        assert cell in printed
    assert "Where nothing else is said: seed=0, sync.every=50." in marked

    lines = {line["run"]: line for line in csv.DictReader(io.StringIO(compare.as_csv(rows)))}
    assert (lines["run-9"]["sync.every"], lines["run-9"]["knn"], lines["run-9"]["linear_probe"]) == ("3", "53.75", "")
    records = {record["run"]: record for record in json.loads(compare.as_json(rows))}
    assert records["run-10"]["settings"] == {"seed": 1, "sync.every": 50}
    assert records["run-10"]["figures"]["knn"] == 51.25
    assert records["early"]["settings"] == {}


def test_order(runs: Path) -> None:
    rows = compare.rows([runs])

    def names(by: str) -> list[str]:
        return [row.name for row in compare.ordered(rows, by)]

    assert names("knn")[:2] == ["run-9", "run-10"]
    assert names("loss")[:2] == ["run-9", "run-10"]
    assert names("sync.every") == ["half", "run-9", "broken", "run-10", "early"]
    with pytest.raises(SettingError, match="sort=kn: did you mean knn"):
        names("kn")


def test_means_over_seeds(tmp_path: Path) -> None:
    knns = [50.0, 51.0, 55.0]
    paths = [hand_made(tmp_path / f"a{seed}", knn, 60.0, seed=seed) for seed, knn in enumerate(knns)]
    paths += [hand_made(tmp_path / "b", 40.0, 60.0, **{"sync.every": 3}), hand_made(tmp_path / "half", seed=5)]
    first, other, half = compare.averaged(compare.rows(paths))
    assert (first.runs, other.runs, half.runs) == (3, 1, 1)
    assert first.figures["knn"] == pytest.approx(52.0)
    assert first.spread["knn"] == pytest.approx(statistics.stdev(knns))
    text = compare.markdown([first, other])
    assert "| a |  | 3 | 52.00 ± 2.65 | 60.00 ± 0.00 |" in text
    assert "| b | sync.every=3 | 1 | 40.00 | 60.00 |" in text
    assert "seed" not in text

    lines = {line["run"]: line for line in csv.DictReader(io.StringIO(compare.as_csv([first, other])))}
    assert (lines["a"]["runs"], lines["b"]["runs"]) == ("3", "1")
    assert float(lines["a"]["knn"]) == pytest.approx(52.0)
    assert float(lines["a"]["knn_std"]) == pytest.approx(statistics.stdev(knns))
    assert (lines["b"]["knn"], lines["b"]["knn_std"]) == ("40.0", "")
    assert "knn_std" not in compare.as_csv([other])

    assert compare.reference([first, other], ["sync.every"], "a2") == {"sync.every": 50}  # by any of the seeds' names
    with pytest.raises(SettingError, match=r"base=a3: did you mean a"):
        compare.reference([first, other], ["sync.every"], "a3")
    compare.draw([first, other], tmp_path / "means.png")


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["base-seed=0", "base-seed=1"], "base"),
        (["base", "base-seed-1", "base-seed-2"], "base"),
        (["x10", "x11"], "x1"),
        (["one", "other"], "o"),
        (["a", "b"], "a"),
    ],
)
def test_the_name_of_a_mean_is_what_names_share(names: list[str], shared: str, tmp_path: Path) -> None:
    paths = [hand_made(tmp_path / name, 50.0, 60.0, seed=seed) for seed, name in enumerate(names)]
    assert [row.name for row in compare.averaged(compare.rows(paths))] == [shared]


def test_a_narrow_table_has_all_figures(runs: Path) -> None:
    """Settings move below them."""
    rows = compare.rows([runs])
    for width in (60, 80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(compare.table(rows, width=width))
        printed = console.export_text()
        for title in ("kNN, %", "probe, %", "loss", "images", "time", "bytes"):
            assert title in printed or width < 80, (width, title)
        assert ("run-9: sync.every=3\n" in printed) == (width < 200)
        assert "Where nothing else is said" in printed


def test_a_mean_is_of_all_runs_or_of_none(tmp_path: Path) -> None:
    probes = [60.0, None, 62.0]
    paths = [hand_made(tmp_path / f"a{seed}", 50.0 + seed, probe, seed=seed) for seed, probe in enumerate(probes)]
    [row] = compare.averaged(compare.rows(paths))
    assert row.figures["knn"] == pytest.approx(51.0)
    assert "linear_probe" not in row.figures
    assert "linear_probe" not in row.spread


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "picture.png"
    assert main(["compare", str(runs), "--sort", "knn", "--out", str(picture), "--json"]) == 0
    told = capsys.readouterr()
    assert [record["run"] for record in json.loads(told.out)][:2] == ["run-9", "run-10"]
    assert str(picture) in told.err
    with Image.open(picture) as image:
        assert min(image.size) > 300
    both = [str(runs / "run-9"), str(runs / "run-10"), "--base", "run-10"]
    assert main(["compare", *both, "--out", str(picture), "--markdown"]) == 0
    assert "| run-9 | seed=0, sync.every=3 |" in capsys.readouterr().out
    assert main(["compare", str(runs), "--json"]) == 0
    assert (runs / "compare.png").exists()
    assert main(["compare", str(runs), "--json", "--csv"]) == 2
    assert main(["compare"]) == 2
    assert main(["compare", str(tmp_path / "nowhere")]) == 1
    assert "neither a run nor a folder of runs" in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [hand_made(tmp_path / above / "run", 50.0) for above in ("a", "b")]
    assert [row.name for row in compare.rows(paths)] == [str(path) for path in paths]
    with pytest.raises(RunError, match="neither a run nor"):
        compare.rows([tmp_path])


def test_a_picture_of_many_runs_with_nothing_to_draw_in_some(tmp_path: Path) -> None:
    paths = [hand_made(tmp_path / f"r{number}", 50.0 + number, seed=number) for number in range(12)]
    row = compare.Row("early", "failed")
    compare.draw([*compare.rows(paths), row], tmp_path / "many.png")
    compare.draw([row], tmp_path / "none.png")
    heights = {}
    for name in ("many", "none"):
        with Image.open(tmp_path / f"{name}.png") as image:
            heights[name] = image.height
    assert heights["many"] > heights["none"]
