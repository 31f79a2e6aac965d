"""Where a client finds its server, and how it shows who it is."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mocosfl_device.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """Where a client finds its server, and how it shows who it is.

    Raises:
        SettingError: names the setting, the value found and what would be accepted.
    """

    server: str
    """HOST:PORT."""
    token: str | None = None
    """Of `mocosfl enroll`. Unset: token_file's, or MOCOSFL_TOKEN in the environment, which other users of the machine
    cannot see in the list of processes."""
    token_file: Path | None = None
    """File that holds the token."""
    client: int | None = None
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
    give_up: float | None = None
    """Seconds without a run after which the client ends. Unset: it tries for ever."""
    half: str | None = None
    """SHA-256 of a frozen client half, as the server prints it: no other one gets to see an image."""

    def __post_init__(self) -> None:
        try:
            address(self.server, "server")
        except ValueError as error:
            raise SettingError(str(error)) from error
        if self.client is not None and not 0 <= self.client < 2**32:
            raise SettingError(f"client={self.client}: clients are numbered from 0, below 2**32")
        if self.give_up is not None and not self.give_up > 0:
            raise SettingError(f"give_up={self.give_up}: expected a number of seconds greater than 0")
        if self.half is not None and not re.fullmatch("[0-9a-f]{64}", self.half):
            raise SettingError(f"half={self.half}: expected a SHA-256, 64 digits 0 to 9 and a to f")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingError(
                f"tls_cert={self.tls_cert} and tls_key={self.tls_key}: a certificate needs its key, and a key its "
                "certificate"
            )
        if self.plain and self.tls_ca is not None:
            raise SettingError(f"plain=True and tls_ca={self.tls_ca}: a connection has TLS or it has not")

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
