"""The demonstration knowledge base: made once, found the next time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.local.display import Display
from retrieval_svc.iconify import build_demonstration_corpus
from retrieval_svc.index_build import build_index


def ensure_knowledge_base(folder: Path, display: Display) -> Path:
    """Make what is missing of the corpus and its index in `folder`; gives the index.

    Raises:
        CorpusError: an icon set cannot be fetched, or the corpus is cut or altered.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        build_demonstration_corpus(folder / "corpus", folder / "icons", display.built)
        build_index(folder / "corpus", folder / "index", lambda done, total: display.built("index", total, ""))
    return folder / "index"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands on a fresh machine build one after the other, and the second finds what the first has made."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
