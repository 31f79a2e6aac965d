"""How a server listens and waits. None of it changes what is learned from the latents that arrive in time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from mocosfl.config import Count, Settings
from mocosfl_device.settings import address, is_own

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
