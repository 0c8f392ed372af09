"""The demonstration knowledge base: made once, found the next time."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from client.display import Display
from common.corpus import CorpusError, CorpusManifest
from common.files import write_json
from retrieval_svc.embedding import Embedder
from retrieval_svc.iconify import build_demonstration_corpus
from retrieval_svc.imports.formats import open_source
from retrieval_svc.imports.importer import run_import
from retrieval_svc.imports.local_sink import LocalSink
from retrieval_svc.imports.records import Options
from retrieval_svc.imports.report import Journal
from retrieval_svc.library import Library

NAME = "demo"
LIBRARY = "knowledge-bases"
_MARK = "imported.json"  # which corpus and vocabulary the knowledge base is made of, and whether all of it is in


def ensure_knowledge_base(folder: Path, display: Display, *, embedder: Embedder | None = None) -> Path:
    """Make what is missing of the corpus and of the knowledge base "demo" in `folder`; gives the library.

    A first run that was interrupted goes on. Nothing is opened where everything is there.

    Raises:
        CorpusError: an icon set cannot be fetched, or the corpus is cut or altered.
        LibraryError: another process has the library open.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        manifest = build_demonstration_corpus(folder / "corpus", folder / "icons", display.built)
        model = embedder.name if embedder is not None else ""
        if _mark(folder) != _wanted(manifest, model, complete=True):
            _import(folder, manifest, embedder, display)
    return folder / LIBRARY


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two commands on a fresh machine build one after the other, and the second finds what the first has made."""
    with (folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _import(folder: Path, manifest: CorpusManifest, embedder: Embedder | None, display: Display) -> None:
    model = embedder.name if embedder is not None else ""
    source = open_source(folder / "corpus", "corpus", Options())
    with closing(Library.open(folder / LIBRARY, embedder=embedder)) as library:
        if _mark(folder) not in (_wanted(manifest, model, complete=False), {}) and _is_there(folder):
            library.delete(NAME)  # made of another corpus, some of whose pairs are no more
        write_json(folder / _MARK, _wanted(manifest, model, complete=False))
        sink = LocalSink(library, NAME, source)
        report = folder / "import.jsonl"
        journal = Journal(report, fingerprint=f"{source.fingerprint} {sink.identity}")

        def built(count: int) -> None:
            for _ in range(count):
                display.built("pairs", manifest.num_pairs, "")

        summary = run_import(source, sink, Options(), journal, built)
    if summary.num_rejected:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in summary.rejected.items())
        raise CorpusError(f"corpus: {folder / 'corpus'} holds pairs that cannot be taken ({reasons}); see {report}")
    write_json(folder / _MARK, _wanted(manifest, model, complete=True))


def _is_there(folder: Path) -> bool:
    return (folder / LIBRARY / NAME).is_dir()


def _wanted(manifest: CorpusManifest, model: str, *, complete: bool) -> dict[str, object]:
    facets = [facet.document() for facet in manifest.facets]
    return {"corpus": manifest.fingerprint, "facets": facets, "embedding_model": model, "complete": complete}


def _mark(folder: Path) -> dict[str, object]:
    """What the mark says; nothing where there is none, or no knowledge base."""
    try:
        said = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and _is_there(folder) else {}
