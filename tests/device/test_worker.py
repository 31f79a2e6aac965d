"""A client's computation in numpy, by itself: what it is told, and what it does not accept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocosfl.config import Config
from mocosfl.models import build
from mocosfl.models.description import describe
from mocosfl.network.welcome import client_settings
from mocosfl_device.errors import DataError, RunError
from mocosfl_device.images import Folder, Spool
from mocosfl_device.protocol_pb2 import Welcome
from mocosfl_device.wire import Violation, fingerprint
from mocosfl_device.worker import NumpyWorker

CONFIG = Config().updated({"model.width": 4, "model.bottleneck": "C4S2", "augment.crop_scale": (0.5, 1.0)})
SIZE = 8


def told(config: Config = CONFIG, batch: int = 2) -> dict[str, Any]:
    half = build(config.model, 3, SIZE, config.seed).client
    return client_settings(config, describe(half), half.state_dict(), 3, SIZE, batch)


def weights(config: Config = CONFIG) -> dict[str, np.ndarray]:
    half = build(config.model, 3, SIZE, config.seed).client.state_dict()
    both = {f"{part}.{name}": t.numpy() for part in ("online", "momentum") for name, t in half.items()}
    return both | {"mean": np.full(3, 0.5, np.float32), "std": np.full(3, 0.25, np.float32)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def worker(images: Path) -> Callable[..., NumpyWorker]:
    """A worker that has been told settings: ``worker(told())``."""

    def made(settings: Mapping[str, Any], frozen: bool = False) -> NumpyWorker:
        one = NumpyWorker(Folder(images), False, False, lambda text: None)
        one.prepare(Welcome(client=0, settings=json.dumps(settings), frozen=frozen))
        return one

    return made


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("data", "size", 5000, r"the server asks for data\.size=5000; accepted are 1 to 512"),
        ("data", "channels", 4, r"data\.channels=4; accepted are 1 and 3"),
        ("clients", "batch", 10**13, r"clients\.batch=10000000000000; accepted are 1 to 4096"),
        ("clients", "batch", 0, r"clients\.batch=0"),
        ("defence", "kind", "ressfl", r"does not know defence\.kind=ressfl; use mocosfl join"),
        ("half", "layers", [{"kind": "torch"}], r"cannot compute the run's client half .*'torch'.*; use mocosfl join"),
        ("half", "layers", [{"kind": "conv", "stride": 1}], "not understood"),
        ("half", "shapes", 7, "not understood"),
        ("train", "momentum", None, "not understood"),
    ],
)
def test_what_a_server_may_not_ask_for(
    group: str, name: str, value: object, message: str, worker: Callable[..., NumpyWorker]
) -> None:
    settings = told()
    settings[group] = settings[group] | {name: value}
    with pytest.raises(RunError, match=message):
        worker(settings)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"seed": Infinity}'])
def test_settings_that_are_none(text: str, images: Path) -> None:
    one = NumpyWorker(Folder(images), False, False, lambda text: None)
    with pytest.raises(RunError, match="not understood"):
        one.prepare(Welcome(client=0, settings=text))


def test_weights_that_do_not_fit(worker: Callable[..., NumpyWorker]) -> None:
    one = worker(told())
    with pytest.raises(Violation, match="before there is a half"):
        one.draw(1, 0)
    names = frozenset(weights())
    assert one.specification(names) == {name: (w.shape, "float32") for name, w in weights().items()}
    assert set(one.specification(frozenset(n for n in names if not n.startswith("momentum.")))) < names
    for wrong in (names - {"mean"}, names | {"online.more"}):
        with pytest.raises(Violation, match="missing or unknown"):
            one.specification(frozenset(wrong))


def test_the_hash_covers_all_that_a_server_sees(worker: Callable[..., NumpyWorker]) -> None:
    def found(**changes: object) -> str:
        settings = told()
        for name, value in changes.items():
            group, _, setting = name.partition("__")
            settings[group] = settings[group] | {setting: value}
        return fingerprint(worker(settings, frozen=True).description, weights())

    assert found() == found()
    for changes in (
        {"data__size": 16},
        {"augment__flip_p": 0.0},
        {"traffic__latents": "int8"},
        {"defence__kind": "noise"},
        {"half__layers": told()["half"]["layers"][:-1]},
    ):
        assert found(**changes) != found(), changes
    assert fingerprint(worker(told(), True).description, weights() | {"mean": np.zeros(3, np.float32)}) != found()


def test_defences(worker: Callable[..., NumpyWorker]) -> None:
    latents = {}
    for kind in ("none", "noise", "dropout"):
        settings = told(batch=6)
        settings["defence"] = settings["defence"] | {"kind": kind, "noise": 0.5, "dropout": 0.25}
        one = worker(settings)
        one.take(weights(), True)
        latents[kind], _ = one.draw(1, 0)
        one.learn(1, np.ones_like(latents[kind]), 0.1)
    plain = latents["none"]
    noise = (latents["noise"] - plain) / np.sqrt(np.square(plain).mean(axis=(0, 2, 3, 4), keepdims=True))
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(0.5, rel=0.15)
    on = plain > 0
    kept = latents["dropout"][on] > 0
    assert kept.mean() == pytest.approx(0.75, abs=0.12)
    np.testing.assert_allclose(latents["dropout"][on][kept], plain[on][kept] / 0.75, rtol=1e-5)


def test_what_a_step_takes_is_measured(worker: Callable[..., NumpyWorker]) -> None:
    one = worker(told())
    assert one.measure() == 0
    one.take(weights(), True)
    query, _ = one.draw(1, 0)
    one.learn(1, np.zeros_like(query), 0.1)
    assert one.measure() > 3 * sum(w.nbytes for name, w in weights().items() if name.startswith("online."))


def test_of_a_folder_that_grows_a_run_that_keeps_latents_uses_the_first(images: Path) -> None:
    one = NumpyWorker(Spool(images), False, True, lambda text: None)
    one.source._looked = -100.0  # type: ignore[attr-defined]
    for path in images.iterdir():
        os.utime(path, (1000 + int(path.stem), 1000 + int(path.stem)))
    one.source.look()
    assert one.images == 6
    for recalls, most, expected in ((False, 0, 6), (True, 0, 6), (True, 4, 4), (False, 0, 6)):
        settings = told() | {"recalls": recalls, "images": most}
        assert one.prepare(Welcome(client=0, settings=json.dumps(settings)))[0] == expected
    (images / "5.png").unlink()
    assert one.prepare(Welcome(client=0, settings=json.dumps(told() | {"recalls": True})))[0] == 5


def test_images_that_cannot_be_decoded(images: Path) -> None:
    (images / "3.png").write_bytes(b"no image")
    said: list[str] = []
    for skip in (False, True):
        one = NumpyWorker(Folder(images), skip, False, said.append)
        welcome = Welcome(client=0, settings=json.dumps(told()))
        if not skip:
            with pytest.raises(DataError, match=r"3\.png: cannot be decoded .*--skip-corrupt"):
                one.prepare(welcome)
        else:
            assert one.prepare(welcome)[0] == 5
    assert len(said) == 1
    for path in images.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image that can be decoded"):
        NumpyWorker(Folder(images), True, False, said.append).prepare(welcome)
