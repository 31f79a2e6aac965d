"""How a server listens and waits. None of it changes what is learned from the latents that arrive in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from mocosfl.config import Config, Count, Settings
from mocosfl.models.description import Description
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


def client_settings(
    config: Config, layers: Description, half: Mapping[str, Tensor], channels: int, size: int, batch: int
) -> dict[str, Any]:
    """What a client is told of a run when it is let in, ready for JSON.

    Args:
        config: the whole configuration.
        layers: of the client half.
        half: its weights by name; their shapes are told.
        channels, size: of the images.
        batch: of this client.

    Returns:
        Groups of settings, those of ``Config`` by their names. Beside them ``half``: layers and shapes; ``recalls``:
        whether the server keeps latents of each image; and ``images``: how many this client had then, or 0.
    """
    contrast = config.contrast.model_dump(mode="json", include={"momentum", "symmetric", "both_views"})
    return {
        "seed": config.seed,
        "data": {"size": size, "channels": channels},
        "augment": config.augment.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "contrast": contrast,
        "clients": {"batch": batch, "frozen": config.clients.frozen},
        "sync": {"momentum": config.sync.momentum},
        "traffic": config.traffic.model_dump(mode="json"),
        "defence": config.defence.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json", include={"momentum", "weight_decay", "precision"}),
        "half": {"layers": layers, "shapes": {name: list(tensor.shape) for name, tensor in half.items()}},
        "recalls": config.recalls,
        "images": 0,
    }
