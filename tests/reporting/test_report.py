"""What is read of a run folder, whole, damaged, or not there yet."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mocosfl.errors import RunError
from mocosfl.footprint import traffic
from mocosfl.footprint.plan import Plan
from mocosfl.reporting import compare, report
from mocosfl.reporting.page import page
from mocosfl.reporting.report import Metrics, Missing, Reader, Series, running_total
from mocosfl.reporting.sections import Shown
from mocosfl.run import Run


def test_a_finished_run(finished: Path) -> None:
    found = Reader(finished).read()
    assert (found.command, found.steps, found.images) == ("train", 32, 1294)
    assert len(found.metrics.series["loss"]) == 32
    assert found.metrics.series["loss"].steps.tolist() == list(range(1, 33))
    assert found.metrics.series["loss"].epochs[-1] == pytest.approx(32 * 80 / 1294, abs=1e-4)
    assert found.evaluation["knn"] == found.result["knn"]
    assert found.partition.counts.sum() == found.images
    assert found.partition.classes == tuple("0123456789")
    assert found.participation.tolist() == [128] * 20
    assert found.phases["server"] == pytest.approx(8)
    assert found.counted == {"a client": traffic.of_client(Plan(found.config, 1294, 8))}
    assert found.measured is None
    assert found.privacy["client"] == 0
    assert found.reconstructions.startswith(b"\x89PNG")


def test_a_run_that_has_just_begun_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    found = Reader(tmp_path).read()
    assert found.metrics.series == {}
    for name in (
        "result",
        "evaluation",
        "privacy",
        "reconstructions",
        "partition",
        "participation",
        "counted",
        "phases",
    ):
        assert isinstance(getattr(found, name), Missing), name
        assert getattr(found, name).why, name


def test_a_metric_has_one_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is made for a value alone: a long run has millions."""
    made: list[Series] = []

    class Counted(Series):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(report, "Series", Counted)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "epoch": 1, "loss": 2, "rate": 3}}\n' for step in range(50)))
    metrics = Metrics(path)
    metrics.update()
    assert len(metrics.series["loss"]) == 50
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["serve", "flower"])
def test_images_of_clients_elsewhere_stay_with_them(copied: Callable[[str], Path], kind: str) -> None:
    folder = copied("served")
    (folder / "data.json").write_text(json.dumps({"kind": kind, "images": 1294}))
    (folder / "partition.npz").unlink()
    assert "the clients' images stay with them" in Reader(folder).read().partition.why


def test_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run: it has no config"):
        Reader(tmp_path)


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.update()
    assert metrics.last("loss") is None
    path.write_bytes(b'{"step": 1, "epoch": 0.1, "seconds": 2, "loss": 7.0}\n{"step": 2, "epo')
    metrics.update()
    assert (metrics.step, metrics.seconds, metrics.last("loss")) == (1, 2, 7.0)
    with path.open("ab") as file:
        file.write(b'ch": 0.2, "seconds": 3, "loss": 6.0, "name": "text"}\n')
    metrics.update()
    assert metrics.series["loss"].values.tolist() == [7, 6]
    assert "name" not in metrics.series
    with path.open("ab") as file:  # a line that a crash has cut short, and that was written on behind
        file.write(b'{"step": 3, "ep\n[]\n{"step": 4, "epoch": 0.4, "loss": NaN}\n')
    metrics.update()
    assert metrics.series["loss"].steps.tolist() == [1, 2, 4]
    path.write_bytes(b'{"step": 1, "epoch": 0.1, "loss": 5.0}\n')  # as a resumed run rewinds it
    metrics.update()
    assert metrics.series["loss"].values.tolist() == [5]


def test_what_is_left_of_the_time_is_told_too(copied: Callable[[str], Path]) -> None:
    folder = copied("slow")
    Run.open(folder).log({"step": 33, "epoch": 2.1, "seconds": 100.0, "seconds/evaluate": 12.0})
    phases = Reader(folder).read().phases
    assert list(phases)[:4] == ["clients", "server", "synchronise", "evaluate"]
    assert list(phases)[-1] == "other"
    assert phases["evaluate"] >= 12
    assert sum(phases.values()) == pytest.approx(100)


@pytest.mark.parametrize(
    ("name", "content", "attribute"),
    [
        ("result.json", b'{"knn": 9', "result"),
        ("result.json", b"[]", "result"),
        ("result.json", b'{"knn": "high"}', "result"),
        ("evaluation.json", b"", "evaluation"),
        ("privacy.json", b"{}", "privacy"),
        ("partition.npz", b"PK", "partition"),
        ("participation.npy", b"\x93NUMPY", "participation"),
    ],
)
def test_damaged_files_are_named(copied: Callable[[str], Path], name: str, content: bytes, attribute: str) -> None:
    folder = copied("damaged")
    (folder / name).write_bytes(content)
    found = getattr(Reader(folder).read(), attribute)
    assert isinstance(found, Missing)
    assert name in found.why


def test_figures_that_are_null_are_left_out(copied: Callable[[str], Path]) -> None:
    folder = copied("null")
    (folder / "result.json").write_text('{"knn": null, "linear_probe": 80, "training_seconds": null, "steps": 32}')
    found = Reader(folder).read()
    assert isinstance(found.evaluation, Missing)
    text = page([Shown("null", found, Missing("not asked for"))]).state()["parts"]
    assert "no labelled training and test images" in text["evaluation"]
    (folder / "evaluation.json").write_text('{"knn": 70, "linear_probe": null, "test_images": null}')
    found = Reader(folder).read()
    assert "70.00 %" in page([Shown("null", found, Missing("not asked for"))]).state()["parts"]["evaluation"]


def test_figures_that_were_not_measured_again_are_those_of_the_end(copied: Callable[[str], Path]) -> None:
    folder = copied("again")
    Run.open(folder).write_json("result.json", {"knn": 60.0, "linear_probe": 80.0, "steps": 32})
    Run.open(folder).write_json("evaluation.json", {"knn": 70.0, "alignment": 0.5})
    found = Reader(folder).read().evaluation
    assert (found["knn"], found["linear_probe"], found["alignment"]) == (70, 80, 0.5)
    (row,) = compare.rows([folder])
    assert (row.figures["knn"], row.figures["linear_probe"]) == (70, 80)


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """Also by a longer one, as when a run is made anew in the same folder."""
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    path.write_text('{"step": 1, "epoch": 1, "loss": 1}\n')
    metrics = Metrics(path)
    metrics.update()
    other.write_text('{"step": 1, "epoch": 1, "loss": 11.0}\n{"step": 2, "epoch": 2, "loss": 12.0}\n')
    other.replace(path)
    metrics.update()
    assert metrics.series["loss"].values.tolist() == [11, 12]


def test_arrays_of_other_shapes_are_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("shapes")
    np.savez(folder / "partition.npz", images=np.ones(3, int), counts=np.ones((3, 2), int), classes=np.array(["a"]))
    np.save(folder / "participation.npy", np.ones((2, 2), int))
    found = Reader(folder).read()
    assert "counts of shape (3, 2): expected (3, 1)" in found.partition.why
    assert "shape (2, 2): expected (N,)" in found.participation.why


def test_only_what_has_changed_is_read_anew(copied: Callable[[str], Path]) -> None:
    folder = copied("again")
    reader = Reader(folder)
    first = reader.read()
    assert reader.read().partition is first.partition
    np.save(folder / "participation.npy", np.arange(20))
    second = reader.read()
    assert second.participation.tolist() == list(range(20))
    assert second.counted is first.counted


def test_counters_of_a_server_that_was_started_again_add_up(copied: Callable[[str], Path]) -> None:
    assert running_total(np.array([5.0, 9, 2, 2, 3])).tolist() == [5, 9, 11, 11, 12]
    folder = copied("served")
    run = Run.open(folder)
    for step, (into, out) in enumerate(((100, 10), (300, 30), (50, 5)), start=33):
        run.log({"step": step, "epoch": step / 16, "seconds": 1, "socket_bytes_in": into, "socket_bytes_out": out})
    assert Reader(folder).read().measured == (350, 35)


def test_a_run_of_pretraining_has_no_clients(copied: Callable[[str], Path]) -> None:
    folder = copied("pretrained")
    facts = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(facts | {"kind": "pretrain"}))
    found = Reader(folder).read()
    for part in (found.partition, found.participation, found.counted):
        assert "pre-trains alone" in part.why


def test_bytes_wait_for_the_size_of_the_images(copied: Callable[[str], Path]) -> None:
    folder = copied("unknown")
    config = Run.open(folder).config.updated({"data.source": "somewhere", "data.size": None})
    (folder / "config.yaml").write_text(config.to_yaml())
    assert Reader(folder).read().counted["a client"].step["query latents"] > 0  # encoder.json knows it
    (folder / "encoder.json").unlink()
    assert "bytes cannot be counted: data.size is not set" in Reader(folder).read().counted.why
    assert Reader(folder, size=8).read().counted["a client"].step["query latents"] > 0
