"""The page of a run that is under way, asked for as a browser does."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

import mocosfl
from mocosfl.cli import main
from mocosfl.errors import RunError, SettingError
from mocosfl.reporting import dashboard as module
from mocosfl.reporting.dashboard import Dashboard
from mocosfl.reporting.page import html
from mocosfl.reporting.report import Missing, Reader
from mocosfl.trainer import Callback, Trainer

CONFIG = mocosfl.recipe("digits").updated(
    {
        "model.width": 4,
        "model.head": "v1",
        "contrast.queue": 64,
        "clients.number": 20,
        "clients.batch": 4,
        "train.epochs": 0.6,
        "train.warmup": 0,
        "train.log_every": 1,
        "evaluation.every": 0,
        "evaluation.probe_epochs": 0,
    }
)
"""10 steps."""


def silent(text: str) -> None:
    pass


def ask(dashboard: Dashboard, path: str = "/state.json", method: str = "GET", **headers: str) -> tuple[int, Any, str]:
    """Status, body and version of an answer; JSON is read."""
    url = urlsplit(dashboard.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=60)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read().decode()
        kind = answer.headers.get("Content-Type", "")
        return answer.status, json.loads(body) if body and "json" in kind else body, answer.headers.get("ETag", "")
    finally:
        connection.close()


class Asking(Callback):
    """Asks in the middle of the training, from its thread: what is under way is known exactly."""

    def __init__(self, dashboard: Dashboard, at: int) -> None:
        self.dashboard, self.at = dashboard, at
        self.states: list[dict[str, Any]] = []

    def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        if trainer.step >= self.at:
            self.states.append(ask(self.dashboard)[1])


def test_a_run_under_way_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRESH", 0.0)
    monkeypatch.setattr("mocosfl.reporting.examples.IMAGES", 50)
    said: list[str] = []
    with Dashboard("0", tmp_path / "run", said.append) as dashboard:
        assert said == [f"dashboard: {dashboard.url}"]
        before = ask(dashboard)[1]
        assert "preparing" in before["parts"]["head"]
        assert before["figures"] == {}
        asking = Asking(dashboard, 8)
        mocosfl.train(CONFIG, tmp_path / "run", callbacks=(asking, dashboard))
        lengths = [len(state["figures"]["loss"]["data"][0]["x"]) for state in asking.states]
        assert lengths == [8, 9, 10]
        assert "step 8 of 10" in asking.states[0]["parts"]["head"]
        assert "appears when the run is over" in asking.states[0]["parts"]["map"]
        assert not asking.states[-1]["ended"]
        assert "evaluating" in ask(dashboard)[1]["parts"]["head"]

        fetched: list[dict[str, Any]] = []

        def follow() -> None:
            while not fetched or not fetched[-1]["ended"]:
                fetched.append(ask(dashboard)[1])
                time.sleep(0.05)

        browser = threading.Thread(target=follow, daemon=True)
        browser.start()
        dashboard.finish()  # waits until the browser has been told
        browser.join(60)
    assert "the run is over" in fetched[-1]["parts"]["head"]
    assert "map-0" in fetched[-1]["figures"]
    with pytest.raises(OSError, match="refused"):
        ask(dashboard)


def test_nobody_who_looks_costs_nothing(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither examples nor a wait at the end."""
    monkeypatch.setattr(module, "examples", lambda *args: pytest.fail("examples for nobody"))
    monkeypatch.setattr(threading.Event, "wait", lambda *args: pytest.fail("a wait for nobody"))
    dashboard = Dashboard("0", copied("run"), silent)
    try:
        dashboard.finish()
    finally:
        monkeypatch.undo()
        with dashboard:
            pass


def test_a_run_of_unknown_image_size_is_not_read_from_its_beginning_at_each_question(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a served run's images the server knows no size."""
    made: list[Path] = []

    class Counted(Reader):
        def __post_init__(self) -> None:
            made.append(self.path)
            super().__post_init__()

    monkeypatch.setattr(module, "Reader", Counted)
    monkeypatch.setattr(module, "FRESH", 0.0)
    dashboard = Dashboard("0", copied("run"), silent)
    with dashboard:
        dashboard._trainer = SimpleNamespace(cohort=SimpleNamespace(), step=5, steps=10)  # type: ignore[assignment]
        assert [ask(dashboard)[0] for _ in range(3)] == [200] * 3
        assert len(made) == 1
        views = SimpleNamespace(images=torch.zeros(2, 1, 8, 8))
        dashboard._trainer.cohort.views = views  # type: ignore[attr-defined]
        assert ask(dashboard)[0] == 200
        assert dashboard._reader is not None
        assert dashboard._reader.size == 8
        assert len(made) == 1


def test_what_is_asked_for_again_is_only_sent_if_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Dashboard("0", tmp_path / "run", silent) as dashboard:
        status, _, version = ask(dashboard)
        assert status == 200
        assert ask(dashboard, f"/state.json?have={version}")[:2] == (204, "")
        assert ask(dashboard, "/state.json?have=other")[0] == 200


def test_only_the_page_is_served_and_only_to_this_machine(tmp_path: Path) -> None:
    with Dashboard("0", tmp_path / "run", silent) as dashboard:
        port = urlsplit(dashboard.url).port
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "localhost"):
            assert ask(dashboard, "/", Host=host)[0] == 200
        for host in (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "", "[evil]", f"10.0.0.1:{port}"):
            for path in ("/", "/state.json"):
                assert ask(dashboard, path, Host=host)[:2] == (403, "this page is served to this machine alone")
        for path in ("/config.yaml", "/..", "/../../etc/passwd", "/state.json/", "/%2e%2e/"):
            assert ask(dashboard, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(dashboard, "/", method)[0] == 501


def test_an_error_in_a_request_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Reader) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "FRESH", 0.0)
    monkeypatch.setattr(Reader, "read", fail)
    with Dashboard("0", tmp_path / "run", silent) as dashboard:
        answers: list[tuple[int, Any, str]] = []

        class Asks(Callback):
            def after_step(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
                answers.append(ask(dashboard, "/state.json" if trainer.step % 2 else "/"))

        result = mocosfl.train(CONFIG, tmp_path / "run", callbacks=(Asks(), dashboard))
    assert result.finished
    assert [answer[:2] for answer in answers] == [(500, "the page could not be drawn: ZeroDivisionError: a bug")] * 10


def test_the_training_is_the_same(tmp_path: Path) -> None:
    mocosfl.train(CONFIG, tmp_path / "alone")
    with Dashboard("0", tmp_path / "shown", silent) as dashboard:
        mocosfl.train(CONFIG, tmp_path / "shown", callbacks=(Asking(dashboard, 0), dashboard))
    weights = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("alone", "shown")]
    assert weights[0] == weights[1]


def test_a_run_that_ends_by_an_error_says_so(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def run() -> None:
        with Dashboard("0", tmp_path, silent) as dashboard:
            ask(dashboard)  # somebody is looking

            def follow() -> None:
                while not seen or not seen[-1]["ended"]:
                    seen.append(ask(dashboard)[1])

            threading.Thread(target=follow, daemon=True).start()
            raise RunError("the loss at step 3 is not finite")

    with pytest.raises(RunError, match="not finite"):
        run()
    assert "ended by an error: the loss at step 3 is not finite" in seen[-1]["parts"]["head"]


def test_a_port_that_is_taken_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in ("train", "serve"):
            assert main([command, "digits", "--out", "run", "--dashboard", str(port)]) == 1
            assert f"dashboard={port}: cannot listen there: Address already in use" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listen", ["eighty", "70000", "127.0.0.1:", "http://127.0.0.1:80", "-1"])
def test_addresses_that_are_none(listen: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="expected PORT, such as 8080, or HOST:PORT"):
        Dashboard(listen, tmp_path, silent)


def test_who_can_reach_it_is_told_and_others_see_no_pictures(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with Dashboard("0.0.0.0:0", copied("run"), said.append) as dashboard:
        assert "others can reach it, and need no password" in said[0]
        assert not dashboard.page().images
        url = urlsplit(dashboard.url)
        assert url.hostname == "0.0.0.0"
        for host in ("192.168.1.7:80", "[fe80::1]:80", "0.0.0.0", "localhost:80"):
            assert ask(dashboard, "/", Host=host)[0] == 200
        for host in ("evil.example", "192.168.1.7.evil.example", ""):
            assert ask(dashboard, "/", Host=host)[0] == 403
        assert "ask for it by this machine's IP address" in ask(dashboard, Host="evil.example")[1]
        dashboard._host = "My-Machine.example"
        assert ask(dashboard, "/", Host="my-machine.example:80")[0] == 200
        monkeypatch.setattr(module, "examples", lambda *args: pytest.fail("pictures for others"))
        monkeypatch.setattr(module, "PATIENCE", 0.0)
        dashboard._observer = SimpleNamespace(clients=list, figures=lambda: dict.fromkeys(module.COUNTERS, 0))
        dashboard.finish()
        state = ask(dashboard)[1]
        assert (
            f"pictures are shown to this machine alone; mocosfl report {dashboard.path} draws" in state["parts"]["map"]
        )


def test_the_page_is_put_together_once_for_all_who_ask(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(*args: Any) -> str:
        made.append("page")
        return html(*args)

    monkeypatch.setattr(module, "html", counted)
    monkeypatch.setattr(module, "FRESH", 1e9)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with Dashboard("0", copied("run"), silent) as dashboard:
        pages = {ask(dashboard, "/")[1] for _ in range(3)}
        assert len(pages) == len(made) == 1
        dashboard._end("over")  # the next one is another
        assert ask(dashboard, "/")[1] not in pages
        assert len(made) == 2


def test_too_many_who_ask_at_once_are_turned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUESTS", 2)
    with Dashboard("0", tmp_path / "run", silent) as dashboard:
        url = urlsplit(dashboard.url)
        held = [socket.create_connection((url.hostname, url.port)) for _ in range(2)]
        assert ask(dashboard)[0] == 503
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 60
        while ask(dashboard)[0] != 200:
            assert time.monotonic() < deadline


def test_other_pages_that_make_a_browser_ask_are_nobody_who_looks(tmp_path: Path) -> None:
    with Dashboard("0", tmp_path / "run", silent) as dashboard:
        dashboard._ended = True
        for site in ("cross-site", "same-site"):
            ask(dashboard, **{"Sec-Fetch-Site": site})
        assert not dashboard._watched
        assert not dashboard._told_all.is_set()
        ask(dashboard, **{"Sec-Fetch-Site": "same-origin"})
        assert dashboard._watched
        assert dashboard._told_all.wait(60)


def test_examples_that_fail_do_not_make_the_run_fail(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "examples", fail)
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    with Dashboard("0", copied("run"), silent) as dashboard:
        ask(dashboard)
        dashboard.finish()
        assert dashboard._examples == Missing("examples could not be drawn (ZeroDivisionError: a bug)")


def test_one_process_of_several_shows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The others do not even try the port."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(mocosfl.experiment, "train", lambda config, **more: pytest.fail(f"{more['callbacks']}"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(pytest.fail.Exception, match=r"^\(\)$"):
        main(["train", "digits", "--dashboard", str(taken.getsockname()[1])])
    assert torch.get_num_threads() == 1
