"""TLS of a channel: whose certificates are trusted, and the one that is shown. Renewed files are taken up as they are."""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc

from common.service.config import ConfigError
from common.service.tls import reason_of, stat_of

_FAULTS = (  # by what gRPC says of a connection that failed
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of the authority that is trusted here, or has expired"),
    ("Hostname Verification Check failed", "its certificate does not bear the name by which it is asked"),
    ("WRONG_VERSION_NUMBER", "it speaks no TLS"),
    ("failed to connect.*Socket closed", "it hangs up: it wants TLS, or another certificate than it is shown"),
)

log = logging.getLogger(__name__)


def fault_of(text: str) -> str:
    """What a message of gRPC's says of TLS, where a connection was not made because of it; empty otherwise."""
    return next((fault for pattern, fault in _FAULTS if re.search(pattern, text)), "")


class ChannelTls:
    """PEM files of the connections to one peer."""

    def __init__(self, peer: str, *, ca: Path, certificate: Path | None = None, key: Path | None = None) -> None:
        """
        Args:
            peer: of whom the flags speak: `--PEER-ca-file`, `--PEER-certificate-file`, `--PEER-key-file`.
            ca: certificates of the authority that the peer's certificate is of.
            certificate, key: the chain that is shown to the peer (mTLS), and its key; both or none.
        """
        self.peer = peer
        self.ca = ca
        self.certificate = certificate
        self.key = key
        self._known: tuple[object, ...] = ()
        self._credentials: grpc.ChannelCredentials | None = None

    @classmethod
    def of(cls, peer: str, ca: Path | None, certificate: Path | None, key: Path | None) -> ChannelTls | None:
        """What the settings say; None: the connection is in the clear.

        Raises:
            ConfigError: one of certificate and key is missing, or they are given without a CA.
        """
        if bool(certificate) != bool(key):
            raise ConfigError(f"--{peer}-{'key' if certificate else 'certificate'}-file: missing; each needs the other")
        if certificate and not ca:
            raise ConfigError(f"--{peer}-ca-file: missing; a certificate is shown over TLS alone")
        return cls(peer, ca=ca, certificate=certificate, key=key) if ca else None

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC makes of the files: the same object for as long as they are the same.

        Files that cannot be used in place of those that could change nothing: half-renewed, they cut nobody off.

        Raises:
            ConfigError: a file cannot be read, holds no PEM, or key and certificate do not belong together; never once
                there have been credentials.
        """
        known = tuple(stat_of(path) for _, path in self._files())
        if self._credentials is not None and known == self._known:
            return self._credentials
        try:
            made = self._read()
        except ConfigError as error:
            if self._credentials is None:
                raise
            if known != self._known:
                log.error("TLS files not reloaded", extra={"error": str(error)})
            made = self._credentials
        else:
            if self._credentials is not None:
                log.info("TLS files reloaded", extra={"path": str(self.ca)})
        self._known, self._credentials = known, made
        return made

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Each file, and its flag."""
        for name, path in (("ca", self.ca), ("certificate", self.certificate), ("key", self.key)):
            if path is not None:
                yield f"--{self.peer}-{name}-file", path

    def _read(self) -> grpc.ChannelCredentials:
        contents: dict[Path, bytes] = {}
        for flag, path in self._files():
            try:
                contents[path] = path.read_bytes()
                if not flag.endswith("key-file"):
                    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            except ssl.SSLError:
                raise ConfigError(f"{flag}: {path} holds no PEM certificate") from None
            except OSError as error:
                raise ConfigError(f"{flag}: {reason_of(error)}") from None
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(contents[self.ca])
        try:  # gRPC would tell a pair that does not fit at the handshake, and OpenSSL ask a terminal for a password
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.certificate, self.key, password="")
        except (ssl.SSLError, OSError, ValueError) as error:
            said = f"{self.key} is no PEM key of the certificate in {self.certificate} ({reason_of(error)})"
            raise ConfigError(f"--{self.peer}-key-file: {said}") from None
        return grpc.ssl_channel_credentials(contents[self.ca], contents[self.key], contents[self.certificate])
