"""The Flower run config."""

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from mocosfl.errors import SettingError
from mocosfl.flower.settings import FlowerSettings
from mocosfl.recipes import recipe

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())


def test_pyproject_has_all_keys_with_their_defaults() -> None:
    assert FlowerSettings.of(PROJECT["tool"]["flwr"]["app"]["config"]) == FlowerSettings()
    keys = {field.alias for field in FlowerSettings.model_fields.values()}
    assert PROJECT["tool"]["flwr"]["app"]["config"].keys() == keys


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_the_bundle_is_small() -> None:
    """Nodes run the installed package; what Flower sends them only names it."""
    from flwr.cli.build import build_fab_from_disk

    assert len(build_fab_from_disk(Path(__file__).parents[2])) < 20_000


def test_settings_of_the_run() -> None:
    settings = FlowerSettings.of({"set": "clients.number=4 train.lr=1e-3 data.source='a b' clients.lr=null"})
    config = settings.config()
    assert config == recipe("digits").updated(
        {"clients.number": 4, "train.lr": 1e-3, "data.source": "a b", "clients.lr": None}
    )
    assert FlowerSettings(recipe="cifar10-small").config() == recipe("cifar10-small")


def test_a_run_that_starts_from_another_has_its_settings(half: str) -> None:
    config = FlowerSettings(changes=f"clients.init={half} clients.frozen=true").config()
    assert config.clients.init == half
    assert config.model.width == 4


@pytest.mark.parametrize(
    ("run_config", "message"),
    [
        ({"min-client": 3}, "unknown key min-client of the Flower run config"),
        ({"min_clients": 3}, "unknown key min_clients"),
        ({"min-clients": -1}, "min-clients=-1: input should be greater than or equal to 0"),
        ({"mode": "fast"}, "mode='fast': input should be 'latents' or 'average'"),
        ({"give-up": 0}, "give-up=0: input should be greater than 0"),
        ({"resume": True}, "out='': name the run folder to resume"),
        ({"resume": True, "overwrite": True, "out": "x"}, "overwrite=true: resume=true goes on"),
        ({"resume": True, "recipe": "digits", "out": "x"}, "recipe='digits': resume=true goes on with the settings of"),
        ({"recipe": "digit"}, "unknown recipe digit; did you mean digits"),
        ({"recipe": "missing.yaml"}, "cannot read the configuration missing.yaml"),
        ({"set": "train.epochs"}, "set=train.epochs: expected NAME=VALUE"),
        ({"set": "train.epoch=2"}, "unknown setting train.epoch; did you mean train.epochs"),
        ({"set": "train.epochs=-2"}, "train.epochs=-2: input should be greater than 0"),
        ({"set": "train.epochs='2"}, "set=train.epochs='2: No closing quotation"),
        ({"set": "train.epochs={"}, "set=train.epochs={: "),
    ],
    ids=str,
)
def test_errors_name_the_key(run_config: dict, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        FlowerSettings.of(run_config).config()
    assert message in str(caught.value)
