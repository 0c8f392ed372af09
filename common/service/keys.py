"""API keys: who may read, and who may change. Keys live in files, one a line, that may change while the service runs."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable
from pathlib import Path

from common.service.config import ConfigError
from common.service.errors import PermissionDenied, Unauthenticated

MIN_KEY_CHARACTERS = 16
METADATA_KEY = "authorization"
_SCHEME = "bearer"

log = logging.getLogger(__name__)


class ApiKeys:
    """The keys of a service. With no file nobody is asked; with any, every call needs a key."""

    def __init__(self, *, read: Path | None, admin: Path | None) -> None:
        """Read the files; `read` opens what changes nothing, `admin` opens everything.

        Raises:
            ConfigError: a file cannot be read, holds no key, or a key that is too short.
        """
        self._read = _KeyFile("--read-keys-file", read) if read else None
        self._admin = _KeyFile("--admin-keys-file", admin) if admin else None

    @property
    def are_asked_for(self) -> bool:
        """Whether calls need a key."""
        return bool(self._read or self._admin)

    def check(self, metadata: Iterable[tuple[str, str | bytes]], *, needs_admin: bool) -> None:
        """Let a call with this metadata pass.

        Raises:
            Unauthenticated: it has no key, or one that is unknown.
            PermissionDenied: its key may only read.
        """
        if not self.are_asked_for:
            return
        key = _key(metadata)
        # Both files are always looked through: the time it takes says nothing of which one knows the key.
        is_admin = bool(self._admin) and self._admin.holds(key)
        is_reader = bool(self._read) and self._read.holds(key)
        if not (is_admin or is_reader):
            raise Unauthenticated("authorization: the API key is unknown")
        if needs_admin and not is_admin:
            raise PermissionDenied("authorization: this API key may read, but not change anything")


class _KeyFile:
    """The keys of one file, by their digests; read again when the file has changed."""

    def __init__(self, setting: str, path: Path) -> None:
        self._path = path
        try:
            self._signature = _signature(path)
            self._digests = _read(path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{setting}: {path}: {reason}") from None
        if not self._digests:
            raise ConfigError(f"{setting}: {path} holds no key")

    def holds(self, key: str) -> bool:
        self._refresh()
        digest, found = _digest(key), False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found

    def _refresh(self) -> None:
        """A file that was emptied opens nothing; one that cannot be read leaves what was known."""
        try:
            signature = _signature(self._path)
            if signature == self._signature:
                return
            self._digests, self._signature = _read(self._path), signature
        except (OSError, ValueError) as error:
            log.error("API keys not reloaded", extra={"path": str(self._path), "error": type(error).__name__})
            return
        log.info("API keys reloaded", extra={"path": str(self._path), "keys": len(self._digests)})


def _key(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    for name, value in metadata:
        if name.lower() == METADATA_KEY and isinstance(value, str):
            scheme, _, key = value.strip().partition(" ")
            if scheme.lower() == _SCHEME and key.strip():
                return key.strip()
            raise Unauthenticated("authorization: is not 'Bearer KEY'", reason="API_KEY_MALFORMED")
    raise Unauthenticated("authorization: there is no API key; send it as 'Bearer KEY'", reason="API_KEY_MISSING")


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[bytes, ...]:
    """Digests of the keys; empty lines and lines that begin with # are none."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_CHARACTERS or not key.isascii():
            raise ValueError(f"key {number} has not {MIN_KEY_CHARACTERS} or more ASCII characters")
    return tuple(_digest(key) for key in keys)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
