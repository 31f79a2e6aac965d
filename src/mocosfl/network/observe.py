"""What happens at the server, for people and for machines: a table, metrics, Prometheus, a log of events."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from rich import box
from rich.table import Table

from mocosfl.errors import RunError
from mocosfl.network.cohort import RemoteCohort
from mocosfl_device.sockets import Peer, connections

TABLE_ROWS = 20
"""Clients that the table shows one by one."""

COUNTERS = {
    "joined": "clients that joined, returning ones again",
    "left": "clients that left",
    "replaced": "connections that gave way to a newer one of their client",
    "silent": "clients sent away because nothing was heard of them",
    "refused": "joins refused",
    "limited": "joins put off by the rate limits",
    "violations": "peers sent away because they broke a rule",
    "latents": "latents that came in time",
    "stragglers": "steps that went on without a client that was asked",
    "late": "latents and weights that came too late",
    "not_averaged": "weights that did not come in time for an average",
    "tensor_bytes_in": "bytes of latents and weights received",
    "tensor_bytes_out": "bytes of gradients and weights sent",
    "socket_bytes_in": "bytes received across the sockets",
    "socket_bytes_out": "bytes sent across the sockets",
}
"""What is counted, since the server was started."""


@contextmanager
def event_log(path: Path) -> Iterator[Callable[..., None]]:
    """A log of events, one JSON object a line, with time, event, client and address.

    Args:
        path: the file; at 10 MB it is moved aside, and two such are kept.

    Yields:
        Called as ``events("joined", client=3)``.
    """
    logger = logging.Logger("mocosfl.network")
    handler = RotatingFileHandler(path, maxBytes=10 * 10**6, backupCount=2, encoding="utf-8", delay=True)
    logger.addHandler(handler)

    def events(event: str, **facts: Any) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        known = {name: value for name, value in facts.items() if value is not None}
        logger.info("%s", json.dumps({"time": stamp, "event": event} | known, ensure_ascii=False))

    with closing(handler):
        yield events


CLIENT_COLUMNS = ("client", "address", "images", "MB in", "MB out", "late in a row", "heard")
"""What is told of each client."""


class Training(Protocol):
    """What is observed of the training: ``Trainer``."""

    latest: dict[str, float]


class Observer:
    """Figures of a server, read from its cohort.

    Args:
        cohort: the clients.
        training: its metrics. Unset: none.
    """

    def __init__(self, cohort: RemoteCohort, training: Training | None = None) -> None:
        self.cohort, self.training = cohort, training
        self._lock = threading.Lock()
        self._peers: dict[Peer, tuple[int, int]] = {}
        self._ended = [0, 0]

    def figures(self) -> dict[str, float]:
        """Clients that are there, and every counter. Of a connection that has ended, the bytes count that it had at
        the last call."""
        exchange = self.cohort.exchange
        counts = Counter(dict(exchange.counts)) + Counter(
            dict(exchange.service.counts)
        )  # copies: another thread counts
        with self._lock:  # Prometheus asks from a thread of its own
            now = connections(local_port=exchange.service.port)
            for peer in self._peers.keys() - now.keys():
                self._ended = [a + b for a, b in zip(self._ended, self._peers[peer], strict=True)]
            self._peers = now
            totals = [
                a + sum(column) for a, column in zip(self._ended, zip((0, 0), *now.values(), strict=True), strict=True)
            ]
        counts["socket_bytes_out"], counts["socket_bytes_in"] = totals
        return {"clients": float(self.cohort.present)} | {name: float(counts[name]) for name in COUNTERS}

    def clients(self) -> list[tuple[str, ...]]:
        """Those that are there, by number, in the columns of ``CLIENT_COLUMNS``."""
        now = time.monotonic()
        sessions = list(self.cohort.exchange.service.sessions.values())  # a copy: another thread lets clients in
        return [
            (
                str(session.client),
                session.address.partition(":")[2],
                f"{session.images:,}",
                f"{session.received / 1e6:,.2f}",
                f"{session.sent / 1e6:,.2f}",
                str(session.misses),
                f"{now - session.heard:.0f} s ago",
            )
            for session in sorted(sessions, key=lambda s: s.client)
        ]

    def table(self) -> Table:
        """The clients, one by one up to ``TABLE_ROWS``, and the counters."""
        figures = self.figures()
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            caption="  ".join(f"{name} {figures[name]:,.0f}" for name in COUNTERS if "bytes" not in name),
            caption_justify="left",
        )
        for title in CLIENT_COLUMNS:
            table.add_column(title, justify="left" if title == "address" else "right", no_wrap=True)
        clients = self.clients()
        for client in clients[:TABLE_ROWS]:
            table.add_row(*client)
        if len(clients) > TABLE_ROWS:
            table.add_row("...", f"and {len(clients) - TABLE_ROWS:,} more", *[""] * 5)
        table.add_row(
            "all",
            "sockets",
            "",
            f"{figures['socket_bytes_in'] / 1e6:,.2f}",
            f"{figures['socket_bytes_out'] / 1e6:,.2f}",
            "",
            "",
        )
        return table


class _Prometheus(Collector):
    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        figures = self.observer.figures()
        yield GaugeMetricFamily("mocosfl_clients", "clients that are there", figures.pop("clients"))
        yield GaugeMetricFamily("mocosfl_step", "step of the run", self.observer.cohort.exchange.step)
        for name, value in figures.items():
            yield CounterMetricFamily(f"mocosfl_{name}", COUNTERS[name], value)
        metric = GaugeMetricFamily("mocosfl_metric", "last logged metric of the training", labels=["name"])
        if self.observer.training is not None:
            for name, number in dict(self.observer.training.latest).items():
                metric.add_metric([name], number)
        yield metric


def serve_prometheus(observer: Observer, port: int) -> Callable[[], None]:
    """Answer at http://127.0.0.1:PORT/metrics.

    Returns:
        Ends it.

    Raises:
        RunError: the port is taken.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Prometheus(observer))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        raise RunError(f"metrics_port={port}: cannot listen there: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
