"""The whole table: for every recipe, and for the paper's schemes."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mocosfl import cli
from mocosfl.errors import SettingError
from mocosfl.footprint import cost, published, traffic
from mocosfl.footprint.devices import DEVICES, device
from mocosfl.footprint.fl_byol import FLBYOL
from mocosfl.footprint.plan import Plan
from mocosfl.footprint.published import PAPER
from mocosfl.footprint.traffic import DOWN, UP, way
from mocosfl.recipes import RECIPES, recipe


@pytest.mark.parametrize("scheme", list(PAPER)[1:])
def test_the_papers_way_of_counting_gives_the_papers_figures(scheme: str) -> None:
    plan, paper = published.plan_of(scheme), PAPER[scheme]
    assert published.scheme_of(plan) == scheme
    found = published.as_published(plan)
    assert found.weights == pytest.approx(paper.weights, abs=0.05)
    assert found.latents == pytest.approx(paper.latents, abs=0.05)
    if paper.operations is not None:
        assert found.operations == pytest.approx(paper.operations, abs=0.5)


def test_the_papers_way_of_counting_gives_its_fl_ssl() -> None:
    plan = published.plan_of("MocoSFL-1")
    found, paper = published.fl_as_published(FLBYOL(plan, 10_000), plan), PAPER["FL-SSL"]
    assert found.weights == pytest.approx(paper.weights, abs=0.05)
    assert found.operations == pytest.approx(paper.operations, abs=500)


def test_the_papers_device() -> None:
    """1,000 clients, 50 images each, 200 epochs, cut 3, C4S2, frozen."""
    found = cost.of_recipe(recipe("cifar10-device"), device("pi4"))
    ours, same, full = found.columns
    assert (ours.images, ours.epochs, ours.steps, ours.batch) == (50, 200, 10_000, 1)
    assert ours.run["query latents"] == ours.run["key latents"] == 10_000 * 4096
    assert ours.run["gradients"] == ours.run["halves up"] == 0
    assert ours.run["halves down"] == 4 * 78_148 + 24
    assert ours.macs_of_run == 2 * 10_000 * 77_856_768
    assert ours.paper is PAPER["MocoSFL-3+TAResSFL"]
    assert ours.seconds == 2 * ours.macs_of_run / 11.889e9
    assert ours.joules == pytest.approx(7.2 * (ours.seconds + ours.seconds_to_send))
    assert (full.images, full.batch, full.averages, full.paper) == (10_000, 128, 100, PAPER["FL-SSL"])
    assert (same.images, same.paper) == (50, None)
    assert way(full.run, UP) == way(full.run, DOWN) == 100 * 4 * (full.parameters + buffers()) + 100 * 8 * 22
    assert not full.fits
    assert ours.fits


def buffers() -> int:
    """Running means and variances of ResNet-18's 20 BatchNorms and those of projector and predictor."""
    return 2 * (64 * 5 + 128 * 5 + 256 * 5 + 512 * 5 + 2 * 4096)


def counted_recipes() -> list[str]:
    """One of each kind, by what bytes depend on besides the number of clients and averages; none of baselines."""
    found = {}
    for name in RECIPES:
        config = recipe(name)
        clients = config.clients
        if clients.holds == "half" and clients.number > 1:
            found[config.model, clients.frozen, clients.batch > 1, clients.pool, config.cache, config.traffic] = name
    return list(found.values())


@pytest.mark.parametrize("name", counted_recipes())
def test_bytes_of_recipes(name: str) -> None:
    config = recipe(name)
    plan = Plan.of(config, 12_370 if config.data.source == "imagenet12" else None)
    found = traffic.of_client(plan)
    assert way(found.run, UP) <= found.messages[0] <= found.socket[0] < 1.1 * way(found.run, UP)


@pytest.mark.parametrize(
    "name", ["digits", "taressfl-small", pytest.param("cifar10-noniid-1000", marks=pytest.mark.soak)]
)
def test_the_whole_table_of_a_recipe(name: str) -> None:
    found = cost.of_recipe(recipe(name), device("pi5"))
    assert json.loads(json.dumps(found.facts()))["columns"][0]["memory"] > 0
    assert found.server is not None
    assert found.server.memory > found.columns[0].memory


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--clients.rich-share", "0.5", "--clients.rich-batch-factor", "3", "--model.width", "8"]
    out = tmp_path / "new" / "cost.json"
    assert cli.main(["cost", "digits", "--device", "jetson-nano", "--json", str(out), *changes]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA Jetson Nano" in said
    facts = json.loads(out.read_text())
    assert [column["batch"] for column in facts["columns"][:2]] == [1, 3]
    assert facts["columns"][0]["name"] == "digits"
    assert facts["device"]["watts"] == {"value": 10.0, "basis": "datasheet"}
    assert facts["server"]["batch"] == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "pi9"], "device=pi9: did you mean pi"),
        (["--link", "0"], "link=0"),
        (["--data.source", "owner/set", "--data.size", "32"], "images is not set, and how many owner/set has"),
        (["--images", "20"], "clients.number=100: there are only 20"),
        (["--data.source", "owner/set", "--data.size", "None", "--images", "500"], "data.size is not set"),
    ],
)
def test_what_is_not_known_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cost", "digits", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_of_images(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / f"{number}.png")
    config = recipe("digits").updated({"data.source": str(tmp_path), "data.size": 16, "clients.number": 3})
    assert Plan.of(config).images == 22  # without 6 to test on, and 2 that are held out
    assert Plan.of(config, images=90).each == 30


def test_devices_say_where_figures_are_from() -> None:
    for found in DEVICES.values():
        assert found.source
        assert {f.basis for f in (found.flops, found.watts, found.memory, found.link)} <= {
            "measured",
            "datasheet",
            "paper",
        }
    assert device("pi4", 8.0).link.basis == "given"
    assert device("pi4", 8.0).seconds_to_send(1e6) == 1
    with pytest.raises(SettingError, match="pi4"):
        device("toaster")
