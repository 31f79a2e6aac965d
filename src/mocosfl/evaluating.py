"""How good an encoder is, whoever trained it: all that `mocosfl evaluate` measures."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from mocosfl.config import AugmentSettings, DataSettings, EvaluationSettings
from mocosfl.data.augment import augment, policy_of
from mocosfl.data.images import ImageSet
from mocosfl.data.sources import balanced, load
from mocosfl.distributed import World
from mocosfl.embedding import own_words
from mocosfl.encoder import Encoder
from mocosfl.errors import DataError, RunError, SettingError
from mocosfl.evaluation import alignment, extract, logistic_probe, uniformity
from mocosfl.evaluation.finetune import SHARES, finetune, labelled_rows
from mocosfl.experiment import choose_device, prepared
from mocosfl.files import write_atomically
from mocosfl.foreign import open_encoder
from mocosfl.reporting.examples import IMAGES, placed
from mocosfl.reporting.feature_map import draw_map
from mocosfl.reporting.report import Missing
from mocosfl.run import TRANSFER, Run
from mocosfl.scoring import Labelled, frozen_figures
from mocosfl_device.augment import AugmentParameters
from mocosfl_device.randomness import stream

Method = Literal["tsne", "umap"]


def evaluate(
    source: str | Path | Encoder,
    console: Console | None = None,
    device: str = "auto",
    *,
    data: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    settings: EvaluationSettings | None = None,
    semi_supervised: bool = False,
    feature_map: Method | None = None,
    out: str | Path | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Evaluate an encoder on labelled images: on the test images of its run, or on those of another set.

    Features of all training and test images are computed once, and serve kNN (beside that of an untrained encoder of
    the same kind), a linear probe by SGD and one by L-BFGS, and the map. Alignment and uniformity are those of two
    augmented views of every test image. Every figure is that of the last epoch, or of the minimum; nothing is chosen on
    test images.

    Figures of a run on its own images are put into ``evaluation.json`` in its folder, where those of earlier calls that
    are not measured again stay, with their settings (``probe``, ``finetune``); figures on another set into the same
    file, under ``transfer`` and the set's name.

    Args:
        source: a run folder, a folder that `mocosfl export` has written, one of their files of weights, or an encoder
            as ``load_encoder``, ``Encoder.from_pretrained`` and ``mocosfl.foreign.load_weights`` return it; the latter
            is put on the device.
        console: where messages go. Unset: nowhere.
        device: as ``train.device``.
        data: other images, as ``data.source``, brought to the encoder's size and channels. Unset: those of the run.
        image_column, label_column: as in ``data``, for other images.
        settings: of the evaluation. Unset: those of the run.
        semi_supervised: also fine-tune the whole encoder with 10 % and with 1 % of the labels.
        feature_map: also draw up to 1,000 test images as points, placed by t-SNE or UMAP; the picture lies beside the
            figures, as ``evaluation.png`` or ``evaluation-transfer-SET.png`` in a run folder.
        out: file for the figures instead (.json). Without it and without a run nothing is written.
        seed: of the probe, the choice of labelled images, fine-tuning, views, and the untrained encoder. Unset: the
            run's, or 0. Without a run it also draws the test images of a set that has no test split, and is needed
            for that: of an encoder of a run, give that run's.

    Returns:
        Figures by name, as written; accuracies in percent.

    Raises:
        RunError: there is no trained encoder, or a served run has no images of the server's own.
        DataError: the images have no labels, or cannot be used.
        SettingError: the arguments do not fit together, or to the encoder; or the seed is needed.
    """
    console = console or Console(quiet=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    run, encoder = (None, source) if isinstance(source, Encoder) else _opened(Path(source))
    file = _file(out, run)
    if feature_map is not None and file is None:
        raise SettingError(f"map={feature_map}: there is no run folder for the picture; name a file with --out")
    if feature_map == "umap" and importlib.util.find_spec("umap") is None:
        raise SettingError("map=umap: needs the package umap-learn; pip install 'mocosfl[umap]', or use map=tsne")
    chosen = choose_device(device)
    images_of = _images_of(run, encoder, data, image_column, label_column)
    settings = settings or (run.config.evaluation if run else EvaluationSettings())
    augmentation = run.config.augment if run else AugmentSettings()
    given_seed, seed = seed, (run.config.seed if run else 0) if seed is None else seed
    began = time.monotonic()
    with prepared(chosen):
        with own_words() if data else nullcontext():
            # Of a run always by its own seed: by another one, images that it was trained on might become test images.
            splits = load(images_of, run.config.seed if run else seed, say).scored
        if splits.drawn and run is None and given_seed is None:
            raise SettingError(
                f"seed: {images_of.source} has no test split, so test images are drawn from it by a seed, and nothing "
                "here says by which: an encoder whose run had these images may be tested on some that it was trained "
                "on. Give the seed of that run with --seed (it is in its config.yaml); for any other encoder, any seed"
            )
        encoder.to(chosen)
        images = Labelled.of(splits, chosen)
        if isinstance(images, str):
            name, hint = ("--data ", "") if data else ("data.source=", "; name labelled images with --data")
            raise DataError(
                f"{name}{images_of.source}: an evaluation needs training and test images with labels, "
                f"and {images}{hint}"
            )
        expected = (encoder.channels, encoder.size, encoder.size)
        if images.train.shape != expected:
            raise DataError(
                f"data.source={images_of.source}: the images are now {images.train.shape}; the encoder takes {expected}"
            )
        figures: dict[str, Any] = {"data": images_of.source, "classes": images.classes}
        frozen, (bank, queries) = frozen_figures(encoder, images, settings, seed, World())
        if settings.probe_epochs:
            figures["probe"] = {"epochs": settings.probe_epochs, "lr": settings.probe_lr, "seed": seed}
        figures |= frozen | _logistic(bank, queries, images, settings, say)
        figures |= _sphere(encoder, images.test, augmentation, settings.batch, seed)
        if semi_supervised:
            figures |= _semi_supervised(encoder, images, settings, augmentation, seed, say)
    if feature_map is not None and file is not None:
        transfer = data is not None and out is None
        picture = file.with_name(_transfer_map(data or "")) if transfer else file.with_suffix(".png")
        title = f"{images_of.source}, {len(images.test):,} test images"
        _draw(feature_map, queries, images.test, picture, title, say)
    figures["how"] = {
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if file is not None:
        _keep(figures, file, run if out is None else None, data)
    return figures


def _opened(source: Path) -> tuple[Run | None, Encoder]:
    encoder = open_encoder(source)
    return (Run.open(source) if (source / "config.yaml").is_file() else None), encoder


def _file(out: str | Path | None, run: Run | None) -> Path | None:
    """Where figures are written, if anywhere."""
    if out is None:
        return None if run is None else run.path / "evaluation.json"
    if Path(out).suffix != ".json":
        raise SettingError(f"out={out}: expected a file whose name ends in .json")
    return Path(out)


def _transfer_map(data: str) -> str:
    """File name of the map of another set; of a path only the end, as names of files cannot be long."""
    return f"{TRANSFER}-{re.sub(r'[^A-Za-z0-9_]+', '-', data)[-100:].strip('-') or 'set'}.png"


def _images_of(
    run: Run | None, encoder: Encoder, data: str | None, image_column: str | None, label_column: str | None
) -> DataSettings:
    """Which images to evaluate on, and how they are decoded."""
    if data is not None:
        return DataSettings(
            source=data,
            size=encoder.size,
            channels=1 if encoder.channels == 1 else 3,
            image_column=image_column,
            label_column=label_column,
        )
    if run is None:
        raise SettingError("data: only a run knows its images; name labelled images with --data")
    if image_column or label_column:
        name = "image_column" if image_column else "label_column"
        raise SettingError(f"{name}={image_column or label_column}: is of other images; name them with --data")
    if run.clients_elsewhere:  # the clients' images are not here; those of the server may be
        own = (run.data_facts() or {}).get("evaluate_on")
        if own is None:
            raise RunError(f"{run.path} was served without evaluate_on: there are no images here to evaluate on")
        return run.config.data.model_copy(update={"source": own})
    return run.config.data


def _logistic(
    bank: Tensor, queries: Tensor, images: Labelled, settings: EvaluationSettings, say: Callable[[str], None]
) -> dict[str, Any]:
    found = logistic_probe(
        bank, images.train_labels, queries, images.test_labels, images.classes, settings.probe_penalty
    )
    if not found.converged:
        say(f"logistic probe: not at its minimum after {found.iterations} iterations; raise evaluation.probe_penalty")
    return {"logistic_probe": found.accuracy, "logistic_probe_train": found.train_accuracy}


def _sphere(encoder: Encoder, test: ImageSet, settings: AugmentSettings, batch: int, seed: int) -> dict[str, Any]:
    """Alignment and uniformity of two views of every test image, as the encoder's clients would have made them."""
    policy, key = policy_of(settings), stream(seed, "views")

    def views(number: int) -> Iterator[Tensor]:
        for start in range(0, len(test), batch):
            rows = np.arange(start, min(start + batch, len(test)))
            parameters = AugmentParameters.draw(policy, encoder.size, key, 0, rows, number)
            yield augment(test.take(rows, encoder.mean.device), parameters, policy)

    first, second = extract(encoder, views(0)), extract(encoder, views(1))
    both = (uniformity(first) + uniformity(second)) / 2 if len(test) > 1 else None
    return {"alignment": alignment(first, second), "uniformity": both}


def _semi_supervised(
    encoder: Encoder,
    images: Labelled,
    settings: EvaluationSettings,
    augmentation: AugmentSettings,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracy after fine-tuning with few labels, and how many."""
    labels = images.train.labels
    assert labels is not None
    figures: dict[str, Any] = {}
    for share in SHARES:
        rows = labelled_rows(labels, share, seed)
        say(f"fine-tuning with {len(rows):,} of {len(labels):,} labels, {settings.finetune_epochs} epochs")
        figures[f"finetune_{100 * share:g}"] = finetune(
            encoder,
            images.train,
            rows,
            images.test,
            images.classes,
            settings.finetune_epochs,
            settings.finetune_lr,
            settings.finetune_batch,
            augmentation,
            seed,
            settings.batch,
        )
        figures[f"finetune_{100 * share:g}_labels"] = len(rows)
    used = {name: getattr(settings, f"finetune_{name}") for name in ("epochs", "lr", "batch")}
    return figures | {"finetune": used | {"seed": seed}}


def _draw(
    method: Method, features: Tensor, test: ImageSet, picture: Path, title: str, say: Callable[[str], None]
) -> None:
    """Draw the map of some test images, of every class alike."""
    assert test.labels is not None
    assert test.classes is not None
    rows = balanced(np.arange(len(test)), test.labels, min(IMAGES, len(test)), np.random.default_rng(0))
    places = placed(F.normalize(features[torch.from_numpy(rows)], dim=1).cpu().numpy(), method)
    if isinstance(places, Missing):
        say(f"map: there is none: {places.why}")
        return
    title += f" ({len(rows):,} shown)" if len(rows) < len(test) else ""
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_map(places, test.labels[rows], test.classes, picture, f"{'t-SNE' if method == 'tsne' else 'UMAP'} of {title}")
    say(f"map: {picture}")


def _keep(figures: dict[str, Any], file: Path, run: Run | None, data: str | None) -> None:
    """Write figures; in a run's own file beside those that are there."""
    before = (run.read_json(file.name) or {}) if run else {}
    if run and data:
        sets = before.get("transfer", {})
        figures = {"transfer": sets | {data: sets.get(data, {}) | figures}}
    text = json.dumps(before | figures, indent=2, ensure_ascii=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: opened.write(text.encode()))
