"""Opens the library that the settings describe: in a folder, or on a Qdrant server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from common.service.config import ConfigError
from retrieval_svc.bm25 import Bm25Process
from retrieval_svc.embedding import Embedder
from retrieval_svc.library import Library
from retrieval_svc.new_pairs import UriReader
from retrieval_svc.qdrant_connection import Connection, connect
from retrieval_svc.replica import Server
from retrieval_svc.server_library import ServerLibrary
from retrieval_svc.settings import StoreSettings

_PICTURES = "pictures"  # in the data folder, where no other is given


@contextmanager
def opened_library(
    data: Path,
    settings: StoreSettings,
    *,
    embedder: Embedder | None = None,
    uri_reader: UriReader | None = None,
    bm25_process: Bm25Process = "off",
) -> Iterator[Library]:
    """The library in `data`, or the server's with this replica's part in `data`; closed at the end.

    Raises:
        ConfigError: a setting cannot be.
        LibraryError: the folder or the server cannot be used.
    """
    qdrant = settings.qdrant()
    if qdrant is None:
        opened = Library.open(
            data, embedder=embedder, uri_reader=uri_reader, bm25=settings.bm25, bm25_process=bm25_process
        )
        with closing(opened) as library:
            yield library
        return
    try:
        client = connect(qdrant)
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--qdrant-url, --qdrant-api-key-file, --qdrant-ca-file: {reason}") from None
    connection = Connection(client=client, settings=qdrant)
    server = Server(
        connection=connection,
        prefix=settings.qdrant_prefix,
        images=settings.shared_pictures or data / _PICTURES,
        bm25=settings.bm25,
        bm25_process=bm25_process,
        poll_s=settings.qdrant_poll_s,
    )
    with (
        closing(connection),
        closing(ServerLibrary.open_on(data, server, embedder=embedder, uri_reader=uri_reader)) as library,
    ):
        yield library
