"""How a server listens and waits. None of it changes what is learned from the latents that arrive in time."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mocosfl.config import Count, Settings
from mocosfl.errors import SettingError

Seconds = Annotated[float, Field(gt=0)]


class ServeSettings(Settings):
    """What `mocosfl serve` does besides the settings of the run. They are no part of it: a run can be resumed with
    others."""

    listen: str = "127.0.0.1:7070"
    """Address and port to listen on. Anything but this machine's own needs TLS and a clients' file, or insecure."""
    min_clients: Count | None = None
    """The run begins when so many clients have joined. Unset: clients.number. Others may join at any time."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of min_clients (of clients.pool, if that is smaller) without whose latents no step is made."""
    step_timeout: Seconds = 30.0
    """Seconds after which a step no longer waits for clients beyond the quorum."""
    ahead: Count = 4
    """Steps that frozen clients may be ahead of the server."""
    heartbeat: Seconds = 10.0
    """Seconds between two signs of life of a client. After three times that without one it is sent away."""
    max_latent: Annotated[float, Field(gt=0)] = 100.0
    """Greatest root mean square of one image's latents; who sends larger ones is sent away."""
    clients_file: Path | None = None
    """File of `mocosfl enroll`: who may join. Unset: everybody who reaches the address."""
    tls_cert: Path | None = None
    """The server's certificate, PEM, with those that sign it."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    tls_client_ca: Path | None = None
    """Clients need a certificate signed by this one, PEM (mutual TLS)."""
    insecure: bool = False
    """Listen on any address without TLS or clients' file. For networks where everybody is trusted."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Figures for Prometheus at http://127.0.0.1:PORT/metrics. Unset: none."""
    evaluate_on: str | None = None
    """Labelled images of the server's own, as data.source, for kNN and linear probe. Unset: no evaluation."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        host, _ = address(self.listen, "listen")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"tls_cert={self.tls_cert} and tls_key={self.tls_key}: a certificate needs its key, and a key its "
                "certificate"
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(f"tls_client_ca={self.tls_client_ca}: mutual TLS needs tls_cert and tls_key too")
        missing = [
            name
            for name, given in (("tls_cert and tls_key", self.tls_cert), ("clients_file", self.clients_file))
            if given is None
        ]
        if missing and not self.insecure and not is_own(host):
            raise ValueError(
                f"listen={self.listen}: others can reach that address, and {' and '.join(missing)} are not set "
                "(docs/federate.md); accepted without are 127.0.0.1, localhost, [::1], or insecure=True"
            )
        return self


class JoinSettings(Settings):
    """Where a client finds its server, and how it shows who it is."""

    server: str
    """HOST:PORT."""
    token: str | None = None
    """Of `mocosfl enroll`. Unset: token_file's, or MOCOSFL_TOKEN in the environment, which other users of the machine
    cannot see in the list of processes."""
    token_file: Path | None = None
    """File that holds the token."""
    client: Annotated[int, Field(ge=0)] | None = None
    """Number to join as, where the server asks for no token. Unset: any free one."""
    tls_ca: Path | None = None
    """Certificate that signs the server's, PEM. Unset: those that the system trusts; for a server on this machine, no
    TLS."""
    tls_cert: Path | None = None
    """The client's own certificate, PEM, where the server asks for one."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    plain: bool = False
    """Join without TLS: whoever is on the way can read the token and the latents."""
    give_up: Seconds | None = None
    """Seconds without a run after which the client ends. Unset: it tries for ever."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        address(self.server, "server")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"tls_cert={self.tls_cert} and tls_key={self.tls_key}: a certificate needs its key, and a key its "
                "certificate"
            )
        if self.plain and self.tls_ca is not None:
            raise ValueError(f"plain=True and tls_ca={self.tls_ca}: a connection has TLS or it has not")
        return self

    def secret(self) -> str:
        """The token, wherever it is; empty for none.

        Raises:
            SettingError: the file cannot be read.
        """
        if self.token is not None:
            return self.token.strip()
        if self.token_file is not None:
            try:
                return self.token_file.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingError(f"token_file={self.token_file}: cannot be read: {error}") from error
        return os.environ.get("MOCOSFL_TOKEN", "").strip()


def address(text: str, what: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, an IPv6 host in brackets.

    Raises:
        ValueError: it is none; names ``what``.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]/\s]+):(\d{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ValueError(f"{what}={text}: expected HOST:PORT, such as 127.0.0.1:7070 or [::1]:7070")
    return match[1].strip("[]"), int(match[2])


def is_own(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
