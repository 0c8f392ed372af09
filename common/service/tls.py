"""TLS of a server: its certificate, and whose certificates it asks of clients. Renewed files are taken up as they are."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from common.service.config import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """PEM files: the server's certificate chain and key; with `client_ca`, clients must show a certificate of it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @classmethod
    def of(cls, certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
        """What the settings say; None: no TLS.

        Raises:
            ConfigError: one of certificate and key is missing, or client CAs are given without them.
        """
        if certificate and key:
            return cls(certificate=certificate, key=key, client_ca=client_ca)
        if certificate or key or client_ca:
            missing = "--tls-key-file" if certificate else "--tls-certificate-file"
            raise ConfigError(f"{missing}: missing; TLS needs a certificate and its key")
        return None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials that look at the files again at every handshake.

        Raises:
            ConfigError: a file cannot be read, or key and certificate do not belong together.
        """
        known = self._signature()
        try:
            first = self._read()
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(f"--tls-certificate-file, --tls-key-file: {reason_of(error)}") from None

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """None keeps what was used before: half-renewed files lock nobody out."""
            nonlocal known
            signature = self._signature()
            if signature == known:
                return None
            try:
                configuration = self._read()
            except (OSError, ssl.SSLError, ValueError) as error:
                log.error("TLS files not reloaded", extra={"error": reason_of(error)})
                return None
            known = signature
            log.info("TLS files reloaded", extra={"path": str(self.certificate)})
            return configuration

        return grpc.dynamic_ssl_server_credentials(
            first,
            renewed,  # pyright: ignore[reportArgumentType]  (None is documented: nothing new)
            require_client_authentication=self.client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)  # gRPC would tell a pair that does not fit at the handshake
        if self.client_ca:
            context.load_verify_locations(self.client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
        )

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(stat_of(path) for path in (self.certificate, self.key, self.client_ca) if path)


def stat_of(path: Path) -> tuple[int, int, int] | None:
    """What changes with a file's content; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def reason_of(error: Exception) -> str:
    """Why a file could not be used, in a few words: what OpenSSL calls it, or the file and what the system says."""
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    return f"{error.filename or ''}: {error.strerror}" if isinstance(error, OSError) else str(error)
