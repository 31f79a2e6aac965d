"""What may listen where, and how a client shows who it is."""

from pathlib import Path
from typing import Any

import pytest

from mocosfl.errors import SettingError
from mocosfl.network.settings import ServeSettings
from mocosfl_device.settings import JoinSettings

TLS = {"tls_cert": "c.pem", "tls_key": "k.pem"}


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:7070", "[::1]:7070", "127.3.2.1:1"])
def test_this_machine_alone_needs_no_protection(listen: str) -> None:
    assert ServeSettings(listen=listen).listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:7070", "[::]:7070", "10.0.0.7:7070", "server.example.org:7070"])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "tls_cert and tls_key and clients_file are not set"),
        (TLS, "and clients_file are not set"),
        ({"clients_file": "clients.json"}, "and tls_cert and tls_key are not set"),
    ],
    ids=str,
)
def test_what_others_can_reach_needs_tls_and_a_clients_file(listen: str, given: dict[str, Any], missing: str) -> None:
    with pytest.raises(SettingError) as caught:
        ServeSettings(listen=listen, **given)
    assert f"listen={listen}: others can reach that address, " in str(caught.value)
    assert missing in str(caught.value)
    assert ServeSettings(listen=listen, **given, insecure=True).insecure
    assert ServeSettings(listen=listen, **TLS, clients_file="clients.json").tls_cert == Path("c.pem")


@pytest.mark.parametrize(
    "listen", ["", "7070", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70700", "::1:7070", "http://a:1"]
)
def test_addresses_that_are_none(listen: str) -> None:
    with pytest.raises(SettingError, match="expected HOST:PORT"):
        ServeSettings(listen=listen)
    with pytest.raises(SettingError, match=r"server=.*expected HOST:PORT"):
        JoinSettings(server=listen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert": "c.pem"}, "tls_key=None: a certificate needs its key"),
        ({"tls_key": "k.pem"}, "tls_cert=None and tls_key=k.pem"),
        ({"tls_client_ca": "ca.pem"}, "mutual TLS needs tls_cert and tls_key too"),
        ({"quorum": 0}, "quorum=0"),
        ({"quorum": 1.5}, "quorum=1.5"),
        ({"heartbeat": 0}, "heartbeat=0"),
        ({"step_timeout": -1}, "step_timeout=-1"),
        ({"ahead": 0}, "ahead=0"),
        ({"metrics_port": 70_000}, "metrics_port=70000"),
        ({"min_clients": 0}, "min_clients=0"),
        ({"max_latent": 0}, "max_latent=0"),
    ],
    ids=str,
)
def test_settings_of_a_server_that_are_not_accepted(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message.replace(".", r"\.")):
        ServeSettings(**settings)


def test_settings_of_a_client_that_are_not_accepted() -> None:
    with pytest.raises(SettingError, match="a certificate needs its key"):
        JoinSettings(server="a:1", tls_cert="c.pem")
    with pytest.raises(SettingError, match="a connection has TLS or it has not"):
        JoinSettings(server="a:1", tls_ca="ca.pem", plain=True)


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOCOSFL_TOKEN", raising=False)
    assert JoinSettings(server="a:1").secret() == ""
    monkeypatch.setenv("MOCOSFL_TOKEN", " of the environment\n")
    assert JoinSettings(server="a:1").secret() == "of the environment"
    (tmp_path / "token").write_text("of the file\n")
    assert JoinSettings(server="a:1", token_file=tmp_path / "token").secret() == "of the file"
    assert JoinSettings(server="a:1", token_file=tmp_path / "token", token="given").secret() == "given"
    with pytest.raises(SettingError, match=r"token_file=.*missing: cannot be read"):
        JoinSettings(server="a:1", token_file=tmp_path / "missing").secret()
