"""`python -m retrieval_svc import`: pictures with captions from elsewhere into a knowledge base."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from common.corpus import CorpusError
from common.service.config import ConfigError, add_flags, read_settings
from common.service.errors import ServiceError
from retrieval_svc.iconify import build_demonstration_corpus, main_progress
from retrieval_svc.imports.formats import FORMATS, open_source
from retrieval_svc.imports.importer import run_import
from retrieval_svc.imports.local_sink import LocalSink
from retrieval_svc.imports.progress import ImportProgress
from retrieval_svc.imports.records import Options, Source, SourceError
from retrieval_svc.imports.report import Journal
from retrieval_svc.imports.service_sink import ServiceLost, ServiceSink
from retrieval_svc.imports.sinks import Sink
from retrieval_svc.library import LibraryError
from retrieval_svc.opening import opened_library
from retrieval_svc.settings import PREFIX, StoreSettings
from retrieval_svc.worker_embedder import WorkerEmbedder

ICONIFY = "iconify"
EXPECTED = (ConfigError, CorpusError, LibraryError, ServiceError, ServiceLost, SourceError)
NO_CLIP = "none"
CLIP_TIMEOUT_S = 600.0  # to load the model, which may have to be fetched first


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the pairs go: a library's folder, or a service's address.

    Attributes:
        store: of a local library, what keeps its pairs.
        clip: of a local library: name or folder of a CLIP model; "packaged"; "none".
        api_key_file: of a service, holds an admin key; ca_file: its authority's certificates (TLS).
    """

    data: Path | None = None
    store: StoreSettings = field(default_factory=StoreSettings)
    clip: str = NO_CLIP
    device: str = "cpu"
    address: str = ""
    api_key_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None


def add_import_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `import` to the commands of the retrieval service; its body is `import_corpus`."""
    parser = commands.add_parser(
        "import",
        help="take pictures with captions into a knowledge base",
        description="Take pictures with captions into a knowledge base. May be interrupted and run again.",
    )
    parser.set_defaults(body=import_corpus)
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="a folder or file; for iconify a folder to build in"
    )
    parser.add_argument("--knowledge-base", required=True, metavar="NAME", help="made if it is not there")
    parser.add_argument("--format", choices=("auto", *FORMATS, ICONIFY), default="auto", help="default: %(default)s")
    add_flags(parser.add_argument_group("of a library", StoreSettings.__doc__), StoreSettings)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--data", type=Path, metavar="FOLDER", help="a library that no service has open")
    place.add_argument("--address", default="", metavar="HOST:PORT", help="a running retrieval service")
    service = parser.add_argument_group("of a service")
    service.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds an admin key")
    service.add_argument("--tls-ca-file", type=Path, metavar="FILE", help="PEM certificates of the service's authority")
    service.add_argument("--tls-certificate-file", type=Path, metavar="FILE", help="PEM certificate of this client")
    service.add_argument("--tls-key-file", type=Path, metavar="FILE", help="PEM key of this client")
    local = parser.add_argument_group("of a local library")
    local.add_argument(
        "--clip", default=NO_CLIP, metavar="MODEL", help="embeds pictures: a folder, a name, packaged or none (default)"
    )
    local.add_argument("--device", default="cpu", help="of the CLIP model: cpu, cuda or cuda:N (default: cpu)")
    reading = parser.add_argument_group("how the source is read")
    reading.add_argument("--images", type=Path, metavar="FOLDER", help="pictures, where they are not beside the source")
    reading.add_argument(
        "--captions", choices=("first", "all"), default="first", help="coco: a pair a picture, or one a caption"
    )
    reading.add_argument("--keep-uris", action="store_true", help="parquet: keep rows without a local picture")
    reading.add_argument("--facet", action="append", default=[], metavar="COLUMN", help="a column that becomes a facet")
    reading.add_argument("--name", default="", help="first part of pair ids (default: the source's name)")
    for part in ("author", "source", "license"):
        reading.add_argument(f"--default-{part}", default="", metavar="TEXT", help=f"{part} where none is told")
    reading.add_argument("--safe", action="store_true", help="pictures are safe where the source says nothing")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="rejected records as JSON lines (default: beside the data)"
    )


def import_corpus(flags: argparse.Namespace) -> None:
    """Run the import that the flags of `add_import_command` ask for, and print its summary.

    Raises:
        one of `EXPECTED`, or OSError: the source or the place cannot be used, the disk is full, the service is lost.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
    options = Options(
        name=flags.name,
        images=flags.images,
        captions=flags.captions,
        keep_uris=flags.keep_uris,
        facet_columns=tuple(flags.facet),
        author=flags.default_author,
        source=flags.default_source,
        license=flags.default_license,
        safe=flags.safe,
    )
    source = _opened(flags.source, flags.format, options)
    place = Place(
        data=flags.data,
        store=read_settings(StoreSettings, prefix=PREFIX, environ={}, flags=vars(flags)),
        clip=flags.clip,
        device=flags.device,
        address=flags.address,
        api_key_file=flags.api_key_file,
        ca_file=flags.tls_ca_file,
        certificate_file=flags.tls_certificate_file,
        key_file=flags.tls_key_file,
    )
    if place.data is None and place.store != StoreSettings():
        raise ConfigError("--bm25, --shared-pictures, --qdrant-...: are of a library; a running service has its own")
    report = flags.report or _default_report(place, flags.knowledge_base, source)
    with _sink(place, flags.knowledge_base, source) as sink:
        journal = Journal(report, fingerprint=f"{source.fingerprint} {sink.identity}")
        if journal.position:
            print(f"going on after {journal.position} records", file=sys.stderr, flush=True)
        with closing(ImportProgress(source.num_records)) as progress:
            summary = run_import(source, sink, options, journal, progress)
    print("\n".join([*summary.lines(), f"report: {report}"]))


def _opened(path: Path, kind: str, options: Options) -> Source:
    if kind == ICONIFY:
        build_demonstration_corpus(path / "corpus", path / "icons", main_progress())
        return open_source(path / "corpus", "corpus", options)
    return open_source(path, kind, options)


def _default_report(place: Place, knowledge_base: str, source: Source) -> Path:
    if place.data is not None:
        return place.data / knowledge_base / "imports" / f"{source.name}.jsonl"
    return Path(f"{knowledge_base}--{source.name}.import.jsonl")


@contextmanager
def _sink(place: Place, knowledge_base: str, source: Source) -> Iterator[Sink]:
    if place.data is not None:
        with (
            _embedder(place) as embedder,
            opened_library(place.data, place.store, embedder=embedder) as library,
        ):
            yield LocalSink(library, knowledge_base, source)
        return
    with _channel(place) as channel:
        yield ServiceSink(channel, knowledge_base, source, api_key=_api_key(place.api_key_file))


@contextmanager
def _embedder(place: Place) -> Iterator[WorkerEmbedder | None]:
    """The CLIP model in a process of its own: no other command pays for torch."""
    if place.clip == NO_CLIP:
        yield None
        return
    with closing(WorkerEmbedder(place.clip, device=place.device)) as embedder:
        embedder.wait_loaded(CLIP_TIMEOUT_S)
        yield embedder


def _channel(place: Place) -> grpc.Channel:
    if not place.ca_file:
        return grpc.insecure_channel(place.address)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_text(place.ca_file),
        private_key=_text(place.key_file) or None,
        certificate_chain=_text(place.certificate_file) or None,
    )
    return grpc.secure_channel(place.address, credentials)


def _api_key(path: Path | None) -> str:
    """The first key of a file such as the service itself reads; "" where no file is given."""
    if path is None:
        return ""
    lines = (line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    key = next((line for line in lines if line and not line.startswith("#")), "")
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(f"--api-key-file: {path} does not begin with a key of printable ASCII characters")
    return key


def _text(path: Path | None) -> bytes:
    return path.read_bytes() if path else b""
