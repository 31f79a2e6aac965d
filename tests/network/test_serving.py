"""The commands serve, join and enroll, and what they tell."""

import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from peers import Commands, Host, Member, eventually, free_port, last_figures, lines

from mocosfl.cli import main
from mocosfl.errors import RunError, SettingError
from mocosfl.network.enrolment import Registry
from mocosfl.network.observe import COUNTERS, Observer, event_log, serve_prometheus
from mocosfl.network.settings import ServeSettings
from mocosfl.serving import serve
from tiny import digits

LARGE = {"model.width": 16, "clients.batch": 8, "train.epochs": 0.4, "train.log_every": 5, "sync.every": 50}
"""22 steps with latents of 64 KiB."""


def test_a_port_that_is_taken_is_named_before_a_folder_is_made(host: Callable[..., Host], tmp_path: Path) -> None:
    listen = f"127.0.0.1:{host().port}"
    with pytest.raises(RunError, match=f"cannot listen on {listen}: Address already in use"):
        serve(digits(), ServeSettings(listen=listen), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_certificates_and_ports_that_cannot_be_used_cost_no_run(host: Callable[..., Host], tmp_path: Path) -> None:
    run, nonsense = tmp_path / "run", tmp_path / "nonsense.pem"
    nonsense.write_text("no certificate")
    run.mkdir()
    (run / "config.yaml").write_text(digits().to_yaml())
    for settings, reason in (
        ({"tls_cert": tmp_path / "missing.pem", "tls_key": nonsense}, r"tls_cert=.*missing\.pem.* cannot be used"),
        ({"tls_cert": nonsense, "tls_key": nonsense}, r"tls_cert=.*nonsense\.pem.* cannot be used"),
        ({"metrics_port": host().port}, "cannot listen on 127"),
    ):
        with pytest.raises(RunError, match=reason):
            serve(digits(), ServeSettings(listen="127.0.0.1:0", **settings), run, overwrite=True)
        assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_figures_of_a_run(start: Commands, data: Callable[..., Path], tmp_path: Path) -> None:
    """A server and clients as a user starts them, with tokens and Prometheus."""
    port = free_port()
    enrol = start("enroll", "0-2", "--file", tmp_path / "clients.json", "--out", tmp_path / "tokens")
    enrol.ends_well()
    assert "3 clients are enrolled" in enrol.said
    for number in range(3):
        token = tmp_path / f"tokens/client-{number}.token"
        assert token.stat().st_mode & 0o777 == 0o600
        assert Registry(tmp_path / "clients.json").admits(token.read_text().strip()) == number
    server = start.serve(
        digits(**LARGE), "--metrics-port", port, "--clients-file", tmp_path / "clients.json", "--quorum", 1
    )
    folders, own = data(), server.port()

    def join(number: int) -> object:
        return start.join(own, folders / f"client-{number}", "--token-file", tmp_path / f"tokens/client-{number}.token")

    clients = [join(number) for number in (0, 1)]
    server.until("waiting for clients: 2 of 3")
    clients.append(join(2))
    text = ""

    def scraped() -> bool:
        nonlocal text
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                text = answer.read().decode()
        except OSError:
            assert server.process.poll() is None, server.said
            return False
        return "mocosfl_clients 3.0" in text

    eventually(scraped)
    for name in COUNTERS:
        assert f"mocosfl_{name}_total" in text
    assert "mocosfl_step" in text
    assert "mocosfl_joined_total 3.0" in text
    server.ends_well()
    for number, client in enumerate(clients):
        assert f"as client {number} with" in client.ends_well()
        assert "the run is over" in client.said
        traffic = client.said.partition("22 steps; ")[2]
        sent, received = (float(traffic.split(" MB ")[place].split()[-1]) for place in (0, 1))
        tensors_sent, tensors_received = traffic.partition("tensors alone are ")[2].split(" MB")[0].split(" and ")
        assert 0 < float(tensors_sent) <= sent <= 1.15 * float(tensors_sent)
        assert 0 < float(tensors_received) <= received <= 1.15 * float(tensors_received)

    figures = last_figures(tmp_path / "run")
    assert figures["clients"] == figures["joined"] == 3
    assert figures["latents"] == 3 * 22
    for way in ("in", "out"):
        tensors, socket = figures[f"tensor_bytes_{way}"], figures[f"socket_bytes_{way}"]
        assert tensors <= socket <= 1.15 * tensors
    latents = 22 * 3 * 2 * 8 * 16 * 8 * 8 * 4
    half = figures["tensor_bytes_in"] - latents
    assert 0 < half < 0.05 * latents  # the averages
    events = [line["event"] for line in lines(tmp_path / "run/events.jsonl")]
    assert events.count("joined") == events.count("left") == 3
    assert json.loads((tmp_path / "run/data.json").read_text())["kind"] == "serve"
    assert "sockets" in server.said  # the table


def test_a_server_evaluates_on_images_of_its_own(start: Commands, data: Callable[..., Path], tmp_path: Path) -> None:
    config = digits(**{"train.epochs": 0.1, "evaluation.k": 10})
    server = start.serve(config, "--evaluate-on", "digits")
    start.crew([server.port(), str(data()), 0, 3]).ends_well()
    server.ends_well()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["knn"] > 50
    assert "knn_held_out" in result


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"data.size": None}, {}, "data.size is not set: the server does not see the clients' images"),
        ({"clients.drop": 0.2}, {}, "clients.drop=0.2: clients elsewhere drop out by themselves; .* network is 0"),
        ({"sync.own": "ema"}, {}, "sync.own=ema: .* accepted over the network is none"),
        ({"defence.kind": "nopeek"}, {}, "defence.kind=nopeek: .* accepted over the network are none, noise"),
        ({"defence.kind": "ressfl"}, {}, "defence.kind=ressfl"),
        ({"clients.frozen": True}, {}, "clients.frozen=True: frozen clients need a trained half"),
        ({}, {"min_clients": 4}, r"min_clients=4: there are 3 clients \(clients.number\)"),
        (
            {"contrast.objective": "byol", "clients.batch": 1},
            {"quorum": 0.3},
            "quorum=0.3: one client .* needs two images",
        ),
        ({}, {"clients_file": "nobody.json"}, "no client is enrolled there; mocosfl enroll does it"),
        ({}, {"evaluate_on": "digit"}, "did you mean digits"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_served(changes: dict, settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message.replace("clients.number", r"clients\.number")):
        serve(digits(**changes), ServeSettings(**{"listen": "127.0.0.1:0"} | settings), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


def said(capsys: pytest.CaptureFixture) -> str:
    output = capsys.readouterr()
    return " ".join((output.out + output.err).split())


def test_errors_of_the_commands(
    host: Callable[..., Host], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "digits", "--listen", "0.0.0.0:7070"]) == 1
    assert "listen=0.0.0.0:7070: others can reach that address" in said(capsys)
    one = host()
    assert main(["join", f"127.0.0.1:{one.port}", "--data", "missing"]) == 1
    assert "missing" in said(capsys)
    assert not one.told  # before it connected
    (tmp_path / "empty").mkdir()
    assert main(["join", f"127.0.0.1:{one.port}", "--data", "empty"]) == 1
    assert "empty" in said(capsys)
    assert main(["join", "nowhere", "--data", "digits"]) == 1
    assert "server=nowhere: expected HOST:PORT" in said(capsys)
    assert not one.told
    assert not list(tmp_path.glob("runs/*"))


def test_enroll(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["enroll", "7", "0-2"]) == 0
    tokens = capsys.readouterr().out.split()
    registry = Registry("clients.json")
    assert [registry.admits(token) for token in tokens] == [7, 0, 1, 2]
    assert main(["enroll", "1", "--revoke"]) == 0
    assert "3 clients are enrolled" in said(capsys)
    assert [registry.admits(token) for token in tokens] == [7, 0, None, 2]
    assert main(["enroll", "5", "--revoke"]) == 1
    assert "client 5 is not enrolled" in said(capsys)
    for wrong in ("x", "3-1", "-1", "1-", "1.5"):
        assert main(["enroll", "--", wrong] if wrong.startswith("-") else ["enroll", wrong]) == 1, wrong
        assert f"clients={wrong}: expected a number such as 7, or a range such as 0-99" in said(capsys)
    assert registry.clients == [0, 2, 7]
    (tmp_path / "clients.json").write_text("{")
    assert main(["enroll", "1"]) == 1
    assert "is not a clients' file" in said(capsys)


def test_figures_count_connections_that_have_ended(host: Callable[..., Host], member: Callable[..., Member]) -> None:
    two = host({"clients.number": 2})

    observer = Observer(two.cohort, SimpleNamespace(latest={"loss": 1.5}))
    members = [member(two.port, client=number) for number in range(2)]
    two.begin(2)
    two.step()
    before = eventually(lambda: (f := observer.figures())["socket_bytes_in"] > 2 * 100 and f)
    assert before["clients"] == 2
    members[1].leave()
    eventually(lambda: two.cohort.present == 1)
    after = observer.figures()
    assert after["clients"] == 1
    assert after["socket_bytes_in"] >= before["socket_bytes_in"]
    assert after["socket_bytes_out"] >= before["socket_bytes_out"]
    rows = observer.table().row_count
    assert rows == 2  # the client that is there, and the sum
    port = free_port()
    stop = serve_prometheus(observer, port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    assert 'mocosfl_metric{name="loss"} 1.5' in text
    stop()


def test_events_are_one_line_each(tmp_path: Path) -> None:
    with event_log(tmp_path / "events.jsonl") as events:
        assert not (tmp_path / "events.jsonl").exists()
        events("sent away", client=None, why="a\nb\u2028\x1b[31m é", address="10.0.0.7")
        events("joined", client=3)
    found = lines(tmp_path / "events.jsonl")
    assert [line["event"] for line in found] == ["sent away", "joined"]
    assert found[0]["why"] == "a\nb\u2028\x1b[31m é"
    assert "client" not in found[0]
    assert len((tmp_path / "events.jsonl").read_bytes().split(b"\n")) == 3
    assert os.listdir(tmp_path) == ["events.jsonl"]
