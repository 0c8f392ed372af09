"""`python -m trainer corpus | knn`: a knowledge base as a corpus, and the neighbors of a corpus' pairs."""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
from pathlib import Path

from client.channel import Tls
from client.knowledge_base import KnowledgeBases
from trainer.dataset import Progress
from trainer.knn import CANDIDATES, ask_shard, asked_of, names_of, write_neighbors
from trainer.knn_corpus import HELD_OUT_OF, corpus_of_knowledge_base
from trainer.knn_lookup import METHODS, Service
from trainer.knn_merge import merge

log = logging.getLogger(__name__)
JOB_INDEX = "JOB_COMPLETION_INDEX"  # Kubernetes tells it to each pod of an indexed Job


def add_knn_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `knn`, beside `--data`."""
    command.add_argument("--corpus", type=Path, required=True)
    command.add_argument("--retrieval", help="address of the retrieval service, e.g. unix:/path or HOST:PORT")
    command.add_argument("--knowledge-base", default="", help="empty: the only one that the service holds")
    command.add_argument("--k", type=int, default=CANDIDATES, help="neighbors of each pair (default: %(default)s)")
    command.add_argument("--method", choices=METHODS, default="bm25", help="default: %(default)s")
    command.add_argument("--shards", type=int, default=1, help="parts that many workers share (default: %(default)s)")
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--shard",
        type=int,
        default=os.environ.get(JOB_INDEX),
        help=f"ask this part alone, 0 to N - 1 (default: ${JOB_INDEX}; without it all parts are asked and merged)",
    )
    what.add_argument("--merge", action="store_true", help="ask nothing: check the parts, write what training reads")
    add_service_flags(command)


def add_service_flags(command: argparse.ArgumentParser) -> None:
    """How a secured retrieval service is reached."""
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds a read key")
    command.add_argument("--tls-ca-file", type=Path, metavar="FILE", help="PEM certificates of the service's authority")
    command.add_argument("--tls-certificate-file", type=Path, metavar="FILE", help="PEM certificate of this client")
    command.add_argument("--tls-key-file", type=Path, metavar="FILE", help="PEM key of this client")


def ask_for_neighbors(flags: argparse.Namespace, progress: Progress) -> Path:
    """Carry out `knn`; gives the file that was written."""
    asked = asked_of(
        flags.corpus,
        knowledge_base=flags.knowledge_base,
        method=flags.method,
        k=flags.k,
        num_shards=flags.shards,
    )
    if flags.merge:
        return _reported(merge(flags.data, asked, partial(names_of, flags.corpus)))
    service = service_of(flags)
    if flags.shard is not None:
        return ask_shard(flags.corpus, flags.data, service, asked, flags.shard, progress)
    return _reported(write_neighbors(flags.corpus, flags.data, service, asked, progress))


def _reported(path: Path) -> Path:
    log.info("report: %s", path.with_suffix(".html"))
    return path


def add_corpus_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `corpus`."""
    command.add_argument("--corpus", type=Path, required=True, help="folder to write")
    command.add_argument("--retrieval", help="address of the retrieval service, e.g. unix:/path or HOST:PORT")
    command.add_argument("--knowledge-base", required=True)
    command.add_argument("--hold-out", action="store_true", help=f"hold out one entity in {HELD_OUT_OF}")
    add_service_flags(command)


def make_corpus(flags: argparse.Namespace, progress: Progress) -> Path:
    """Carry out `corpus`; gives the folder."""
    service = service_of(flags)
    with KnowledgeBases(service.address, api_key=service.api_key, tls=service.tls) as bases:
        corpus_of_knowledge_base(bases, flags.knowledge_base, flags.corpus, hold_out=flags.hold_out, progress=progress)
    return flags.corpus


def service_of(flags: argparse.Namespace) -> Service:
    """Where the service is.

    Raises:
        ValueError: no address is given.
        FileNotFoundError: a file of keys or certificates is not there.
    """
    if not flags.retrieval:
        raise ValueError("--retrieval: is needed to ask the retrieval service")
    files = (flags.tls_ca_file, flags.tls_certificate_file, flags.tls_key_file)
    roots, certificate, key = (path.read_bytes() if path else b"" for path in files)
    return Service(
        address=flags.retrieval,
        api_key=flags.api_key_file.read_text().split()[0] if flags.api_key_file else "",
        tls=Tls(roots=roots, certificate=certificate, key=key) if any(files) else None,
    )
