"""Reading pictures from addresses, and only from those that the operator allowed."""

from __future__ import annotations

import http.client
import os
import posixpath
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import SplitResult, unquote, urlsplit

from common.service.config import ConfigError

MAX_IMAGE_BYTES = 20_000_000
FETCH_TIMEOUT_S = 10.0
_HTTPS_PORT = 443
_CHUNK_BYTES = 1 << 16


class ImageAddressError(OSError):
    """An address that leaves what is allowed, or holds no picture that can be taken; the message says why."""


@dataclass(frozen=True, kw_only=True)
class _Prefix:
    """`host` and `port` are empty for files."""

    scheme: str
    host: str
    port: int
    path: str  # ends with a slash


class AllowedImages:
    """Reads pictures below `file://` folders and `https://` prefixes that an operator named."""

    def __init__(self, prefixes: Sequence[str], *, timeout_s: float = FETCH_TIMEOUT_S) -> None:
        """No prefix allows nothing.

        Raises:
            ConfigError: a prefix is neither an absolute file:// folder that exists nor https://HOST/...
        """
        self._prefixes = tuple(_prefix(text) for text in prefixes)
        self._timeout_s = timeout_s
        # No proxy from the environment, no other schemes: what is asked is what is named.
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(self._is_allowed),
        ):
            self._opener.add_handler(handler)

    def read(self, uri: str) -> bytes:
        """The bytes at `uri`; empty where no prefix allows it.

        Raises:
            ImageAddressError: it tries to leave its prefix, is too large, or is no file.
            OSError: it cannot be read.
        """
        parts = _parts(uri)
        if parts is None or not self._is_of_a_prefix(parts):
            return b""
        if not self._is_allowed(uri):
            raise ImageAddressError("leaves the folder that is allowed")
        return self._read_file(parts) if parts.scheme == "file" else self._fetch(uri)

    def _is_allowed(self, uri: str) -> bool:
        parts = _parts(uri)
        if parts is None or not self._is_of_a_prefix(parts):
            return False
        path = unquote(parts.path)
        climbs = any(segment in ("..", ".") for segment in path.split("/"))
        return not (climbs or "\\" in path or "\0" in path or "%" in path)

    def _is_of_a_prefix(self, parts: SplitResult) -> bool:
        try:
            port = parts.port or (_HTTPS_PORT if parts.scheme == "https" else 0)
        except ValueError:
            return False
        origin = (parts.scheme, parts.hostname or "", port)
        path = unquote(parts.path)
        return not (parts.username or parts.password) and any(
            origin == (prefix.scheme, prefix.host, prefix.port) and path.startswith(prefix.path)
            for prefix in self._prefixes
        )

    def _read_file(self, parts: SplitResult) -> bytes:
        """Read it if, all links resolved, it still lies in an allowed folder."""
        real = os.path.realpath(unquote(parts.path))
        roots = [os.path.realpath(prefix.path) for prefix in self._prefixes if prefix.scheme == "file"]
        if not any(real.startswith(root.rstrip("/") + "/") for root in roots):
            raise ImageAddressError("leaves the folder that is allowed")
        # Whoever swaps a folder for a link between the look and the opening writes into the allowed folder already.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageAddressError("is no file")
            return _read_limited(stream, self._timeout_s)

    def _fetch(self, uri: str) -> bytes:
        try:
            with self._opener.open(urllib.request.Request(uri), timeout=self._timeout_s) as answer:
                return _read_limited(answer, self._timeout_s)
        except urllib.error.HTTPError as error:
            raise ImageAddressError(f"is answered with HTTP status {error.code}") from None
        except http.client.HTTPException as error:
            raise ImageAddressError(f"is answered with no HTTP ({type(error).__name__})") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where a request could have gone in the first place."""

    max_redirections = 3

    def __init__(self, is_allowed: Any) -> None:
        self._is_allowed = is_allowed

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not self._is_allowed(newurl):
            raise ImageAddressError("redirects to where nothing is allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _prefix(text: str) -> _Prefix:
    parts = _parts(text)
    if parts is None or parts.query or parts.fragment or parts.username or parts.password:
        raise ConfigError(f"--image-prefixes: {text!r} is neither file:///FOLDER/ nor https://HOST/...")
    path = posixpath.normpath(unquote(parts.path) or "/").rstrip("/") + "/"
    if parts.scheme == "file":
        if parts.netloc or not Path(path).is_dir():
            raise ConfigError(f"--image-prefixes: {text!r} is no folder of this machine")
        return _Prefix(scheme="file", host="", port=0, path=path)
    if not parts.hostname:
        raise ConfigError(f"--image-prefixes: {text!r} names no host")
    return _Prefix(scheme="https", host=parts.hostname, port=parts.port or _HTTPS_PORT, path=path)


def _parts(uri: str) -> SplitResult | None:
    """The address taken apart; None for other schemes and what is no address."""
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError:
        return None
    has_spaces = any(character.isspace() or ord(character) < 32 for character in uri)
    return None if has_spaces or parts.scheme not in ("file", "https") else parts


def _read_limited(stream: Any, limit_s: float) -> bytes:
    """All of it, if it is neither too large nor too slow: a time-out of the socket alone lets a drip go on for ever."""
    received, give_up = bytearray(), time.monotonic() + limit_s
    while chunk := stream.read1(_CHUNK_BYTES):
        received += chunk
        if len(received) > MAX_IMAGE_BYTES:
            raise ImageAddressError(f"has more than {MAX_IMAGE_BYTES} bytes")
        if time.monotonic() > give_up:
            raise ImageAddressError(f"takes longer than {limit_s:g} s")
    return bytes(received)
