"""The page of a run while it is under way, over HTTP.

The server runs in threads of the run's own process and reads what the run has written or knows anyway: the training
loop does nothing for it and never waits for it, and nothing is read off the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import torch

from mocosfl.errors import RunError, SettingError
from mocosfl.network.cohort import RemoteCohort
from mocosfl.network.observe import CLIENT_COLUMNS, COUNTERS, Observer
from mocosfl.reporting.examples import Examples, examples
from mocosfl.reporting.page import Page, dumps, html, names_of, page
from mocosfl.reporting.report import Missing, Reader
from mocosfl.reporting.sections import Live, Shown
from mocosfl.trainer import Callback, Trainer
from mocosfl_device.settings import address, is_own

CLIENTS = 200
"""Clients that the table shows one by one."""
FRESH = 2.0
"""Seconds for which a page that has been put together is given to all who ask."""
WATCHED = 10.0
"""Seconds without a question after which nobody is taken to be looking."""
PATIENCE = 10.0
"""Seconds, at the end, for which somebody who is looking may take to fetch the last state."""
POLL = "state.json"
REQUESTS = 16
"""Requests that are answered at the same time; more are turned away."""


@dataclass
class _Made:
    """A page that has been put together, for all who ask within ``FRESH`` seconds."""

    when: float
    page: Page
    state: bytes
    version: str
    document: bytes | None = None


class Dashboard(Callback):
    """Shows a run while it is under way.

    ::

        with Dashboard("8080", "runs/mine", print) as dashboard:
            mocosfl.train(config, "runs/mine", callbacks=(dashboard,))
            dashboard.finish()

    Args:
        listen: PORT, for this machine alone, or HOST:PORT. Port 0: any free one.
        path: the run folder; it need not be there yet.
        say: told the address, and what takes time at the end.

    Raises:
        SettingError: ``listen`` is no address.
        RunError: it cannot be listened on.

    Attributes:
        url: of the page.
    """

    def __init__(self, listen: str, path: str | Path, say: Callable[[str], None]) -> None:
        self.path, self._say = Path(path), say
        try:
            host, port = address(f"127.0.0.1:{listen}" if listen.isdecimal() else listen, "dashboard")
        except ValueError as error:
            raise SettingError(f"dashboard={listen}: expected PORT, such as 8080, or HOST:PORT") from error
        self.own, self._host = is_own(host), host
        try:
            self._server = _Server(host, port, self)
        except OSError as error:
            raise RunError(f"dashboard={listen}: cannot listen there: {error.strerror or error}") from error
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, name="mocosfl dashboard", daemon=True)
        self._lock = threading.Lock()
        self._doing, self._ended = "preparing", False
        self._reader: Reader | None = None
        self._trainer: Trainer | None = None
        self._observer: Observer | None = None
        self._began: tuple[float, int] = (0.0, 0)
        self._examples: Examples | Missing = Missing("the run has not finished")
        self._made: _Made | None = None
        self._asked = -WATCHED
        self._told_all = threading.Event()

    # The run's side

    def __enter__(self) -> Self:
        self._thread.start()
        self._say(f"dashboard: {self.url}" + ("" if self.own else " (others can reach it, and need no password)"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception):
                self._end(f"ended by an error: {error}")
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def observe(self, cohort: RemoteCohort) -> None:
        """Show the clients that are connected; the run folder is there by now."""
        self._observer = Observer(cohort)
        self._doing = "waiting for clients"

    def before_training(self, trainer: Trainer) -> None:
        """Show the training."""
        self._trainer, self._began = trainer, (time.monotonic(), trainer.step)
        self._doing = "training"

    def after_training(self, trainer: Trainer) -> None:
        """Say what comes next."""
        self._doing = "evaluating" if trainer.step == trainer.steps else "stopping"

    def finish(self) -> None:
        """The run has ended. If somebody is looking, show all that there is, before this process goes."""
        finished = (self.path / "result.json").exists()
        if finished and not self.own:
            why = f"pictures are shown to this machine alone; mocosfl report {self.path} draws them"
            self._examples = Missing(why)
        elif finished and self._watched:
            self._doing = "drawing examples and the map of features"
            try:
                self._examples = examples(self.path, torch.device("cpu"), self._say)
            except Exception as error:  # the run is over, and well: a page must not make it fail
                self._examples = Missing(f"examples could not be drawn ({type(error).__name__}: {error})")
        self._end("the run is over" if finished else "the run was stopped; it can be resumed")

    @property
    def _watched(self) -> bool:
        return time.monotonic() - self._asked < WATCHED

    def _end(self, how: str) -> None:
        with self._lock:
            self._doing, self._ended, self._made = how, True, None
        if self._watched:
            self._told_all.wait(PATIENCE)

    # The page's side, in threads of the server

    def page(self) -> Page:
        """The page as it is now."""
        trainer, observer = self._trainer, self._observer
        if trainer is None and observer is None:  # what is in the folder now may be of another run
            return Page(self.path.name, [self.path.name], ["being prepared"], [], [], self._live(), images=False)
        if self._reader is None:
            self._reader = Reader(self.path)
        if self._reader.size is None:  # of a served run it never becomes known
            self._reader.size = _size(trainer)
        contents = self._reader.read()
        return page([Shown(names_of([self.path])[0], contents, self._examples)], self._live(), images=self.own)

    def state(self) -> tuple[bytes, str]:
        """The page's state as JSON, and a name for this version of it."""
        with self._lock:
            made = self._current()
            return made.state, made.version

    def document(self) -> bytes:
        """The page as HTML."""
        with self._lock:
            made = self._current()
            if made.document is None:
                made.document = html(made.page, POLL).encode()
            return made.document

    def _current(self) -> _Made:
        now = time.monotonic()
        if self._made is None or now - self._made.when > FRESH:
            made = self.page()
            state = dumps(made.state())
            self._made = _Made(now, made, state, hashlib.sha256(state).hexdigest()[:16])
        return self._made

    def answers_to(self, host: str) -> bool:
        """Whether a Host header is one under which this page is asked for on purpose.

        A page elsewhere whose name has been made to point here (DNS rebinding) asks under that name.
        """
        name = host.rpartition("]")[0].strip("[]") if host.startswith("[") else host.partition(":")[0]
        if self.own or not name:
            return is_own(name)
        return name.lower() in ("localhost", self._host.lower()) or _is_address(name)

    def heard(self) -> None:
        """Somebody is looking."""
        self._asked = time.monotonic()

    def told(self) -> None:
        """Somebody has been given the state."""
        if self._ended:
            self._told_all.set()

    def _live(self) -> Live:
        trainer, observer = self._trainer, self._observer
        live: dict[str, Any] = {"doing": self._doing, "ended": self._ended}
        if trainer is not None:
            live |= {"step": trainer.step, "steps": trainer.steps, "left": self._left(trainer)}
        if observer is not None:
            rows = observer.clients()
            figures = observer.figures()
            live |= {"clients": (CLIENT_COLUMNS, rows[:CLIENTS]), "more": max(0, len(rows) - CLIENTS)}
            live["counts"] = [(what, f"{figures[name]:,.0f}") for name, what in COUNTERS.items()]
        return Live(**live)

    def _left(self, trainer: Trainer) -> float | None:
        began, first = self._began
        done = trainer.step - first
        return None if done <= 0 else (time.monotonic() - began) / done * (trainer.steps - trainer.step)


def _size(trainer: Trainer | None) -> int | None:
    """Height and width of the images, as simulated clients know them."""
    views = getattr(getattr(trainer, "cohort", None), "views", None)
    return None if views is None else int(views.images.shape[-1])


ALONE = b"this page is served to this machine alone"
OTHER_NAME = b"this page has no such name: ask for it by this machine's IP address, or the HOST that it listens on"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a browser may keep its connection

    def __init__(self, host: str, port: int, dashboard: Dashboard) -> None:
        self.address_family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.dashboard = dashboard
        self._free = threading.BoundedSemaphore(REQUESTS)
        super().__init__(where[:2], _Request)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, unless there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As its parent's."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def server_bind(self) -> None:
        """As its parent's, without asking the network for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no news."""


class _Request(BaseHTTPRequestHandler):
    """GET / and the page's state; anything else is refused."""

    server: _Server
    timeout = 10
    server_version, sys_version = "mocosfl", ""

    def do_GET(self) -> None:
        dashboard = self.server.dashboard
        url = urlsplit(self.path)
        if not dashboard.answers_to(self.headers.get("Host", "")):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", ALONE if dashboard.own else OTHER_NAME)
            return
        if url.path not in ("/", f"/{POLL}"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"there is nothing here")
            return
        # Any other page may make a browser ask, without being shown the answer: that is nobody who looks.
        looks = self.headers.get("Sec-Fetch-Site", "none") in ("same-origin", "none")
        if looks:
            dashboard.heard()
        try:
            if url.path == "/":
                self._answer(HTTPStatus.OK, "text/html", dashboard.document())
                return
            state, version = dashboard.state()
        except Exception as error:  # whatever it is, the run goes on, and who asked is told
            text = f"the page could not be drawn: {type(error).__name__}: {error}"
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", text.encode())
            return
        if parse_qs(url.query).get("have") == [version]:
            self._answer(HTTPStatus.NO_CONTENT, "application/json", b"", version)
        else:
            self._answer(HTTPStatus.OK, "application/json", state, version)
        if looks:
            dashboard.told()

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, version: str | None = None) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the browser has gone
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Referrer-Policy", "no-referrer")
            if version is not None:
                self.send_header("ETag", version)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not worth a line in the run's output."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
