"""An index on disk: a folder that is replaced as a whole and never written in place.

Layout::

    index.json      format, fingerprint, knowledge base name, facets, scene phrases, sizes of the other files
    images.bin      the pictures, back to back
    bm25/           the Tantivy index; each document holds its pair's offset, length and sha256 in images.bin
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.corpus import Facet
from retrieval_svc.bm25 import Bm25Index, FacetCodes
from retrieval_svc.image_store import ImageStore
from retrieval_svc.query import Vocabulary

FORMAT = "reimagen-index/1"  # to be raised whenever the same corpus would be indexed in another way
MANIFEST, IMAGES, BM25 = "index.json", "images.bin", "bm25"


class IndexFolderError(ValueError):
    """The folder is missing, incomplete, of another format, or no index at all; the message names it."""


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """What `index.json` says. `fingerprint` names the content: the corpus and the index format."""

    name: str
    fingerprint: str
    num_pairs: int
    files: Mapping[str, int]
    facets: tuple[Facet, ...]
    scene_phrases: tuple[str, ...]

    def facet_codes(self) -> FacetCodes:
        """The numbers of the facet values in the BM25 index."""
        return FacetCodes({facet.name: facet.values for facet in self.facets})

    def vocabulary(self) -> Vocabulary:
        """What prompts are understood with."""
        return Vocabulary(self.facets, self.scene_phrases)


@dataclass(frozen=True, kw_only=True)
class IndexFolder:
    """An index, opened."""

    manifest: IndexManifest
    bm25: Bm25Index
    images: ImageStore


def open_index(index: Path) -> IndexFolder:
    """Open an index: milliseconds, whatever its size.

    Raises:
        IndexFolderError: it is missing, incomplete or of another format.
    """
    manifest = read_index_manifest(index)
    try:
        for name, size in manifest.files.items():
            found = (index / name).stat().st_size
            if found != size:
                raise IndexFolderError(f"index: {index / name} has {found} bytes, expected {size}; build it again")
        images = ImageStore(index / IMAGES)
        bm25 = Bm25Index(index / BM25, manifest.facet_codes())
    except IndexFolderError:
        raise
    except (OSError, ValueError) as error:
        raise IndexFolderError(f"index: {index} cannot be opened ({error}); build it again") from error
    return IndexFolder(manifest=manifest, bm25=bm25, images=images)


def read_index_manifest(index: Path) -> IndexManifest:
    """Read `index.json`.

    Raises:
        IndexFolderError: there is none, or it is not of this format.
    """
    path = index / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise IndexFolderError(
                f"index: {path} has format {document['format']!r}, expected {FORMAT!r}; build it again"
            )
        return IndexManifest(
            name=document["name"],
            fingerprint=document["fingerprint"],
            num_pairs=document["num_pairs"],
            files={str(name): int(size) for name, size in document["files"].items()},
            facets=tuple(
                Facet(name=f["name"], template=f["template"], values=tuple(f["values"])) for f in document["facets"]
            ),
            scene_phrases=tuple(document["scene_phrases"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise IndexFolderError(f"index: {path} does not exist; build it with `python -m retrieval_svc build`") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise IndexFolderError(f"index: {path} cannot be read ({error!r}); build it again") from None
