"""Who may join: a file of clients with a hash of each one's token."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from mocosfl.errors import RunError
from mocosfl.files import write_atomically

TOKEN = re.compile(r"(\d{1,9})-([A-Za-z0-9_-]{43})")
"""NUMBER-SECRET, the secret being 256 random bits. So a plain SHA-256 keeps it safe at rest: there is nothing to
guess, and a slow hash would only let strangers keep the server busy."""


class Registry:
    """The file of clients that may join: JSON, client number to SHA-256 of its token.

    The file is read anew when it has changed, so clients can be enrolled and struck off while a server runs.

    Args:
        path: the file; it need not exist yet.

    Raises:
        RunError: it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, int] | None = None
        self._hashes: dict[int, str] = {}
        self._refresh()

    def _refresh(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._hashes, self._stamp = {}, None
            return
        except OSError as error:
            raise RunError(f"cannot read the clients' file {self.path}: {error.strerror}") from error
        if (stamp := (status.st_mtime_ns, status.st_size)) == self._stamp:
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            hashes = {int(number): str(digest) for number, digest in content["clients"].items()}
            if wrong := [number for number, digest in hashes.items() if not re.fullmatch("[0-9a-f]{64}", digest)]:
                raise ValueError(f"client {wrong[0]} has no hash of a token")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{self.path} is not a clients' file as `mocosfl enroll` writes it: {error}") from error
        self._hashes, self._stamp = hashes, stamp

    def __len__(self) -> int:
        self._refresh()
        return len(self._hashes)

    @property
    def clients(self) -> list[int]:
        """Numbers of all enrolled clients, ascending."""
        self._refresh()
        return sorted(self._hashes)

    def enrol(self, clients: Iterable[int]) -> dict[int, str]:
        """Give clients new tokens; older ones of theirs are void.

        Args:
            clients: their numbers.

        Returns:
            Token by client. This is the only place where it can be seen: the file holds its hash.

        Raises:
            RunError: the file cannot be written; it is untouched.
        """
        self._refresh()
        tokens = {number: f"{number}-{secrets.token_urlsafe(32)}" for number in clients}
        self._write(self._hashes | {number: _digest(token) for number, token in tokens.items()})
        return tokens

    def strike_off(self, clients: Iterable[int]) -> None:
        """Void the tokens of clients.

        Raises:
            RunError: a client is not enrolled, or the file cannot be written; it is untouched.
        """
        self._refresh()
        clients = set(clients)
        if unknown := sorted(clients - self._hashes.keys()):
            raise RunError(f"client {unknown[0]} is not enrolled in {self.path}")
        self._write({number: digest for number, digest in self._hashes.items() if number not in clients})

    def admits(self, token: str) -> int | None:
        """The client whose token this is; None if it is nobody's.

        A file that cannot be read now, half-edited by hand, leaves the clients as they were.
        """
        with contextlib.suppress(RunError):
            self._refresh()
        match = TOKEN.fullmatch(token)
        expected = self._hashes.get(int(match[1]), "") if match else ""
        found = _digest(token)  # always hashed and compared, so that time tells nothing
        return int(match[1]) if hmac.compare_digest(found, expected) and match else None

    def _write(self, hashes: dict[int, str]) -> None:
        content = {"format": 1, "clients": {str(number): hashes[number] for number in sorted(hashes)}}
        text = json.dumps(content, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise RunError(f"cannot write the clients' file {self.path}: {error.strerror}") from error
        self._refresh()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
