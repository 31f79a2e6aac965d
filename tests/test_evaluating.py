"""The evaluation of runs and of other encoders, from Python and from the command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mocosfl
from mocosfl.cli import main
from mocosfl.config import EvaluationSettings, ModelSettings
from mocosfl.data.sources import load
from mocosfl.encoder import Encoder
from mocosfl.errors import DataError, RunError, SettingError
from mocosfl.evaluating import evaluate
from mocosfl.evaluation import alignment, logistic_probe, uniformity
from mocosfl.evaluation.features import extract_from
from mocosfl.evaluation.finetune import labelled_rows
from mocosfl.foreign import open_encoder
from mocosfl.run import Run

IMAGES = torch.rand(3, 1, 8, 8)
QUICK = EvaluationSettings(k=20, probe_epochs=3, finetune_epochs=30)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real small run on digits."""
    changes = {"clients.number": 10, "clients.batch": 10, "partition.classes_per_client": 4, "model.width": 4}
    changes |= {"train.epochs": 6, "evaluation.every": 0, "evaluation.probe_epochs": 3, "seed": 2}
    folder = tmp_path_factory.mktemp("evaluating") / "run"
    mocosfl.train(mocosfl.recipe("digits").updated(changes), folder)
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """The same, to write to."""
    shutil.copytree(digits, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of colour images of two classes, with a test split: discs and squares."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    y, x = np.mgrid[:16, :16] - 7.5
    for number in range(100):
        kind = ("disc", "square")[number % 2]
        size = rng.uniform(3, 6)
        inside = x**2 + y**2 < size**2 if kind == "disc" else np.maximum(abs(x), abs(y)) < size
        image = np.where(inside[:, :, None], rng.integers(150, 255, 3), rng.integers(0, 100, 3)).astype(np.uint8)
        place = folder / ("train" if number < 60 else "test") / kind / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place)
    return folder


def test_fine_tuning_with_few_labels_beats_a_probe_of_the_untrained_encoder(run: Path) -> None:
    """On digits, with 144 of 1,438 labels. And all other figures are what their parts say."""
    figures = evaluate(run, settings=QUICK, semi_supervised=True)
    assert (figures["finetune_10_labels"], figures["finetune_1_labels"]) == (144, 14)
    config = Run.open(run).config
    splits, encoder = load(config.data, 2, lambda text: None), mocosfl.load_encoder(run)
    untrained = Encoder(config.model, 1, 8, seed=2)
    untrained.mean.copy_(encoder.mean)
    untrained.std.copy_(encoder.std)
    rows, tests = labelled_rows(splits.train.labels, 0.1, 2), np.arange(len(splits.test))
    of_rows, of_tests = (torch.from_numpy(s) for s in (splits.train.labels[rows], splits.test.labels))

    def probed(encoder: Encoder) -> float:
        bank, queries = extract_from(encoder, splits.train, rows, 500), extract_from(encoder, splits.test, tests, 500)
        return logistic_probe(bank, of_rows, queries, of_tests, 10).accuracy

    assert figures["finetune_10"] > probed(untrained) + 5
    assert figures["finetune_10"] > figures["finetune_1"]
    assert figures["finetune"] == {"epochs": 30, "lr": 0.01, "batch": 64, "seed": 2}

    whole = [extract_from(encoder, s, np.arange(len(s)), 500) for s in (splits.train, splits.test)]
    probe = logistic_probe(whole[0], torch.from_numpy(splits.train.labels), whole[1], of_tests, 10)
    assert figures["logistic_probe"] == probe.accuracy
    assert figures["logistic_probe_train"] == probe.train_accuracy
    result = json.loads((run / "result.json").read_text())
    for name in ("knn", "knn_untrained", "linear_probe", "linear_probe_train", "bank_images", "test_images"):
        assert figures[name] == result[name], name
    assert 0 < figures["alignment"] < 2
    assert -4 < figures["uniformity"] < 0
    assert json.loads((run / "evaluation.json").read_text()) == figures


def test_alignment_is_that_of_views_and_less_where_views_differ_less(run: Path) -> None:
    usual = evaluate(run, settings=QUICK)
    assert evaluate(run, settings=QUICK, seed=9)["alignment"] != usual["alignment"]
    still = {"crop_scale": (1.0, 1.0), "jitter_p": 0, "blur_p": 0, "flip_p": 0}
    config = Run.open(run).config
    config = config.updated({f"augment.{name}": value for name, value in still.items()})
    (run / "config.yaml").write_text(config.to_yaml())
    found = evaluate(run, settings=QUICK)
    splits, encoder = load(config.data, 2, lambda text: None), mocosfl.load_encoder(run)
    features = extract_from(encoder, splits.test, np.arange(len(splits.test)), 500)
    assert found["alignment"] == pytest.approx(0, abs=1e-9)
    assert found["alignment"] == pytest.approx(alignment(features, features), abs=1e-9)
    assert found["uniformity"] == pytest.approx(uniformity(features), rel=1e-5)
    assert usual["alignment"] > 0.01


def test_figures_of_other_images_are_kept_beside_its_own(run: Path, shapes: Path) -> None:
    own = evaluate(run, settings=QUICK, semi_supervised=False)
    other = evaluate(run, settings=QUICK, data=str(shapes), feature_map="tsne")
    assert (other["bank_images"], other["test_images"], other["classes"]) == (60, 40, 2)
    assert other["knn"] > 60  # discs and squares; in grey and at 8x8 pixels
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept.pop("transfer") == {str(shapes): other}
    assert kept == own
    assert own["probe"] == {"epochs": 3, "lr": 0.1, "seed": 2}
    (picture,) = run.glob("evaluation-transfer-*.png")
    assert picture.stem.endswith(shapes.name)
    assert picture.stat().st_size > 5000
    evaluate(run, settings=QUICK, data="digits", feature_map="tsne")
    assert set(run.glob("evaluation-transfer*")) == {picture, run / "evaluation-transfer-digits.png"}
    assert not (run / "evaluation.png").exists()
    # What is not measured again stays, and neither figures nor a picture keep the run from being replaced.
    evaluate(run, settings=QUICK.model_copy(update={"probe_epochs": 0}))
    again = json.loads((run / "evaluation.json").read_text())
    assert again["linear_probe"] == own["linear_probe"]
    assert (again["probe"], again["how"]["settings"]["probe_epochs"]) == (own["probe"], 0)
    assert again["transfer"][str(shapes)] == other
    Run.create(run, Run.open(run).config, overwrite=True)
    assert not list(run.glob("evaluation*"))


def test_a_run_that_was_evaluated_on_other_images_alone_keeps_its_report(run: Path, shapes: Path) -> None:
    from mocosfl.exporting.export import export
    from mocosfl.reporting.report import Reader

    evaluate(run, settings=QUICK, data=str(shapes))
    result = json.loads((run / "result.json").read_text())
    assert Reader(run).read().evaluation["knn"] == result["knn"]
    export(run, formats=("huggingface",))
    card = (run / "export/README.md").read_text()
    assert f"{result['knn']:.2f} %" in card
    assert str(shapes) not in card


def test_an_export_gives_the_figures_of_its_run(digits: Path, tmp_path: Path) -> None:
    from mocosfl.exporting.export import export

    figures = evaluate(digits, settings=QUICK, out=tmp_path / "run.json")
    export(digits, tmp_path / "export", formats=("huggingface",))
    files = [tmp_path / "export", tmp_path / "export/model.safetensors", digits / "encoder.safetensors"]
    assert all(torch.equal(open_encoder(file)(IMAGES), open_encoder(digits)(IMAGES)) for file in files)
    for source in (files[0], open_encoder(files[1])):
        found = evaluate(source, settings=QUICK, data="digits", seed=2)
        for name in ("knn", "knn_untrained", "linear_probe", "logistic_probe"):
            assert found[name] == figures[name], source
    assert not (digits / "evaluation.json").exists()
    assert [path.name for path in tmp_path.glob("*.json")] == ["run.json"]


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"data": "nowhere/at/all"}, DataError, r"^--data nowhere/at/all: there is no such file or folder"),
        ({"label_column": "fine"}, SettingError, r"label_column=fine: is of other images; name them with --data"),
        ({"out": "figures.txt"}, SettingError, r"out=figures\.txt: expected a file whose name ends in \.json"),
        ({"device": "cuda:77"}, SettingError, r"cuda:77: not available here"),
    ],
)
def test_rejects(digits: Path, told: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(digits, settings=QUICK, **told)


def test_a_set_with_a_test_split_needs_no_seed(shapes: Path) -> None:
    figures = evaluate(Encoder(ModelSettings(width=4), 3, 8), data=str(shapes), settings=QUICK)
    assert (figures["test_images"], figures["how"]["seed"]) == (40, 0)


def test_images_without_labels_and_encoders_without_images_are_refused(
    digits: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        (tmp_path / "flat").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 50 * number, np.uint8)).save(tmp_path / f"flat/{number}.png")
    with pytest.raises(
        DataError, match=r"^--data .*flat: an evaluation needs .* labels, and its training images have no labels$"
    ):
        evaluate(digits, data=str(tmp_path / "flat"))
    encoder = Encoder(ModelSettings(width=4), 1, 8)
    with pytest.raises(SettingError, match="only a run knows its images; name labelled images with --data"):
        evaluate(encoder)
    with pytest.raises(SettingError, match=r"^seed: digits has no test split, .* the seed of that run with --seed"):
        evaluate(encoder, data="digits")
    with pytest.raises(SettingError, match="map=tsne: there is no run folder for the picture; name a file with --out"):
        evaluate(encoder, data="digits", feature_map="tsne")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"needs the package umap-learn; pip install 'mocosfl\[umap\]'"):
        evaluate(digits, feature_map="umap")
    facts = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(facts | {"kind": "serve", "evaluate_on": None}))
    with pytest.raises(RunError, match="was served without evaluate_on"):
        evaluate(run)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its defaults are the run's settings; what it prints is what it writes."""
    assert main(["evaluate", str(run), "--map", "tsne", "--evaluation.probe-penalty", "0.01"]) == 0
    printed = capsys.readouterr().out
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["how"]["settings"]["probe_epochs"] == 3
    assert figures["how"]["settings"]["probe_penalty"] == 0.01
    assert re.search(rf"linear probe by L-BFGS +{figures['logistic_probe']:.2f} %", printed)
    assert f"alignment {figures['alignment']:.4f}, uniformity {figures['uniformity']:.4f}" in printed
    assert (run / "evaluation.png").exists()

    weights = torch.nn.Module()
    encoder = Encoder(ModelSettings(width=4, stem="32", client_norm="batch", server_norm="batch"), 1, 8)
    from mocosfl.exporting.torchvision import by_their_names

    for name, module in by_their_names(encoder).items():
        weights.register_module(name.replace(".", "/"), module)
    state = {f"backbone.{name.replace('/', '.')}": tensor for name, tensor in weights.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pth")
    status = main(
        [
            *("evaluate", str(tmp_path / "theirs.pth"), "--arch", "resnet18", "--size", "8", "--mean", "0.5"),
            *("--std", "0.3", "--data", "digits", "--evaluation.probe-epochs", "0", "--out", str(tmp_path / "t.json")),
            *("--seed", "0"),
        ]
    )
    assert status == 0
    theirs = json.loads((tmp_path / "t.json").read_text())
    assert f"{theirs['knn']:.2f} %" in capsys.readouterr().out
    assert "linear_probe" not in theirs
    assert main(["evaluate"]) == 2
