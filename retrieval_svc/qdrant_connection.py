"""The connection to a Qdrant server or cluster: where it is, how collections are made there, what its errors mean here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import grpc
from qdrant_client import QdrantClient
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.context_headers import headers

from common.service.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    ServiceError,
    Unavailable,
)

_GRPC_PORT = 6334
_KEY_HEADER = "api-key"
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED)
_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


@dataclass(frozen=True, kw_only=True)
class QdrantSettings:
    """Where the Qdrant server is, and how collections are made there (OPERATIONS 1.6); a collection keeps those.

    Attributes:
        url: http://host[:port] or https://host[:port] (TLS); the port is that of gRPC, 6334 if it is not given.
        api_key_file: holds the key; read at each call, so that it may be renewed. None: none is sent.
        ca_file: PEM certificates of the server's authority; None: those that the system trusts.
        timeout_s: deadline of each call; build_timeout_s: of waiting for graphs to be built.
        replication_factor: copies of each shard. write_consistency_factor: copies that must have confirmed a write.
        shard_number: shards of the collection; None: one for each node.
        quantization: what searches run over, held in memory: int8 (1/4 of float32), turbo4 (1/8); None: the originals.
        on_disk_originals: originals are read from disk, as float16, to compare the best once more.
        oversampling: so many times the asked number are taken from the quantized search.
        m, ef_construct, hnsw_ef: see `VectorSettings`.
    """

    url: str
    api_key_file: Path | None = None
    ca_file: Path | None = None
    timeout_s: int = 10
    build_timeout_s: float = 3600.0
    replication_factor: int = 2
    write_consistency_factor: int = 1
    shard_number: int | None = None
    quantization: Literal["int8", "turbo4"] | None = "turbo4"
    on_disk_originals: bool = True
    oversampling: float = 2.0
    m: int = 16
    ef_construct: int = 128
    hnsw_ef: int = 128

    def api_key(self) -> str:
        """The key as the file says it now; "" where there is no file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no key of printable ASCII characters.
        """
        if self.api_key_file is None:
            return ""
        key = self.api_key_file.read_text(encoding="utf-8", errors="replace").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ValueError(f"{self.api_key_file} holds no key of printable ASCII characters")
        return key


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A client for the server, and how it is used."""

    client: QdrantClient
    settings: QdrantSettings

    def collections(self) -> list[str]:
        """Names of all collections. Raises ServiceError: the server cannot be asked."""
        with asking(self.settings, "listing collections"):
            return [described.name for described in self.client.get_collections().collections]

    def drop(self, collection: str) -> None:
        """Delete a collection; none is no error. Raises ServiceError: the server cannot be asked."""
        with asking(self.settings, f"deleting collection {collection!r}"):
            self.client.delete_collection(collection)

    def close(self) -> None:
        """Let go of the server."""
        self.client.close()


def connect(settings: QdrantSettings) -> QdrantClient:
    """A client for the server; it connects with the first call.

    Raises:
        OSError: a file cannot be read.
        ValueError: the url is not one, or would send the key without TLS to another machine.
    """
    parts = urlsplit(settings.url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"url {settings.url!r} is not http://host[:port] or https://host[:port]")
    if settings.api_key() and parts.scheme == "http" and parts.hostname not in _THIS_MACHINE:
        raise ValueError(f"url {settings.url!r} would send the API key unencrypted: use https")
    if settings.ca_file and parts.scheme == "http":
        raise ValueError(f"url {settings.url!r} has no TLS, for which an authority is given: use https")
    return QdrantClient(
        host=parts.hostname,
        grpc_port=parts.port or _GRPC_PORT,
        https=parts.scheme == "https",
        prefer_grpc=True,
        timeout=settings.timeout_s,
        grpc_options={"root_certificates": settings.ca_file.read_bytes()} if settings.ca_file else None,
        check_compatibility=False,  # it would ask over REST, which need not be open
    )


@contextmanager
def asking(settings: QdrantSettings, attempt: str) -> Iterator[None]:
    """Around every call: it carries the key of now, and what went wrong is said in the service's words.

    gRPC's message stays in the cause: it may hold payload.
    """
    try:
        key = settings.api_key()
    except (OSError, ValueError) as error:
        raise Unavailable(f"{attempt}: the file of the API key cannot be used ({type(error).__name__})") from error
    try:
        with headers({_KEY_HEADER: key} if key else {}):
            yield
    except ResourceExhaustedResponse as error:
        raise ResourceExhausted(f"{attempt}: Qdrant is busy", retry_after_s=float(error.retry_after_s)) from error
    except grpc.RpcError as error:
        told = _told(attempt, error)
        if told is None:
            raise
        raise told from error


def code_of_call(error: BaseException) -> grpc.StatusCode:
    """The status that a call ended with; OK for what is no error of a call."""
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.OK


def _told(attempt: str, error: grpc.RpcError) -> ServiceError | None:
    """None: nothing that the service foresees."""
    code = code_of_call(error)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{attempt}: Qdrant did not answer in time")
    if code in _LOST:
        return Unavailable(f"{attempt}: Qdrant cannot be reached ({code.name})")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ResourceExhausted(f"{attempt}: Qdrant is at a limit")
    if code in _REFUSED:
        return FailedPrecondition(f"{attempt}: Qdrant refuses the API key ({code.name})")
    if code == grpc.StatusCode.NOT_FOUND:
        return NotFound(f"{attempt}: Qdrant has no such collection")
    if code == grpc.StatusCode.INTERNAL:
        return Unavailable(f"{attempt}: Qdrant failed")
    return None
