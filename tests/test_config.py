from pathlib import Path

import pytest

from mocosfl.config import ClientSettings, Config, setting_names
from mocosfl.errors import SettingError


def test_yaml_there_and_back(tmp_path: Path) -> None:
    config = Config().updated({"augment.crop_scale": (0.2, 0.9), "clients.pool": 10, "train.lr": 1e-3})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert Config.from_yaml(path) == config
    for name in setting_names():  # complete: nothing depends on a default that may change
        assert f"{name.rsplit('.', 1)[-1]}:" in path.read_text()


def test_settings_left_out_take_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("clients:\n  number: 7\n")
    assert Config.from_yaml(path) == Config().updated({"clients.number": 7})
    path.write_text("")
    assert Config.from_yaml(path) == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients.number": 0}, r"clients\.number=0: input should be greater than or equal to 1"),
        ({"clients.nunber": 3}, r"unknown setting clients\.nunber; did you mean clients\.number\?"),
        ({"client.number": 3}, r"unknown setting client\.number; did you mean clients\.number\?"),
        ({"train.lr": float("nan")}, r"train\.lr=nan: input should be"),
        ({"train.epochs": "many"}, r"train\.epochs='many': input should be a valid number"),
        ({"model.backbone": "resnet19"}, r"model\.backbone='resnet19': input should be 'resnet18', 'resnet34' or"),
        ({"model.width": 18}, r"model\.width=18: input should be a multiple of 4"),
        ({"augment.crop_scale": (0.9, 0.2)}, r"augment\.crop_scale=\[0\.9, 0\.2\]: the first number must not exceed"),
        ({"clients.pool": 200}, r"clients\.pool=200: there are 100 clients"),
        ({"model.client_norm": "batch"}, r"model\.client_norm=batch: .* clients\.batch=1"),
        ({"contrast.feature_sharing": False, "contrast.queue": 50}, r"contrast\.queue=50: without feature sharing"),
        ({"contrast.both_views": True, "contrast.symmetric": False}, r"contrast\.both_views=True: only the symmetric"),
        ({"train.warmup": 1.0}, r"train\.warmup=1\.0: input should be less than 1"),
        ({"sync.own": "ema", "clients.frozen": True}, r"sync\.own=ema: frozen clients are handed no average"),
        ({"sync.own": "ema", "sync.tau": 1.5}, r"sync\.tau=1\.5: input should be less than or equal to 1"),
        ({"clients.pool": 10, "clients.pool_share": 0.1}, r"clients\.pool_share=0\.1: clients\.pool=10 is set too"),
        ({"clients.pool_share": 1.5}, r"clients\.pool_share=1\.5: input should be less than or equal to 1"),
        (
            {"clients.rich_data_share": 0.5},
            r"clients\.rich_data_share=0\.5: no client is rich; set clients\.rich_share",
        ),
        ({"clients.drop": 1.0}, r"clients\.drop=1\.0: input should be less than 1"),
        ({"clients.drop": 0.1, "traffic.loss_threshold": 1}, r"clients\.drop=0\.1: traffic\.loss_threshold keeps the"),
        ({"partition.quantity_skew": 0.5}, r"partition\.quantity_skew=0\.5: partition\.kind=classes gives all"),
        ({"clients.drop": 0.1, "model.head": "large"}, r"clients\.drop=0\.1: one client may be all that is left"),
        ({"seed": -1}, r"seed=-1: input should be greater"),
    ],
    ids=str,
)
def test_bad_settings_are_named_with_value_and_what_is_accepted(changes: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Config().updated(changes)


def test_every_bad_setting_is_named_at_once() -> None:
    with pytest.raises(SettingError) as caught:
        Config().updated({"clients.number": 0, "clients.batch": -1, "train.lr": 0})
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "clients.number=0",
        "clients.batch=-1",
        "train.lr=0",
    ]


def test_a_group_alone_names_its_settings_in_full() -> None:
    with pytest.raises(SettingError, match=r"^clients\.batch=0: "):
        ClientSettings(batch=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clients: [", "is not valid YAML"),
        ("- 1\n- 2\n", "expected settings by name, found list"),
        ("clients:\n  numbers: 3\n", r"unknown setting clients\.numbers; did you mean clients\.number\?"),
        ("clients: 3\n", "clients"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(SettingError, match=message):
        Config.from_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"cannot read the configuration .*none\.yaml: No such file"):
        Config.from_yaml(tmp_path / "none.yaml")


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 3


@pytest.mark.parametrize(("share", "number", "pool"), [(0.1, 1000, 100), (1, 7, 7), (0.25, 10, 2), (0.001, 100, 1)])
def test_the_pool_may_be_a_share_of_the_clients(share: float, number: int, pool: int) -> None:
    config = Config().updated({"clients.pool_share": share, "clients.number": number})
    assert config.pool == pool
    assert config.step_images == pool
