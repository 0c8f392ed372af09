"""`knowledge-base.json`: what a knowledge base is, apart from its pairs; and what lies beside it.

Layout of the folder::

    knowledge-base.json   this
    lock                  held by the process that has it open
    pairs/                the pair store: the source of truth
    bm25/                 the lexical index: a projection of it, which can be thrown away and is made again
    images/               the pictures, named after their content
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.corpus import CorpusError, Facet
from common.files import write_json
from common.service.errors import InvalidArgument
from retrieval_svc.embedding import Embedder
from retrieval_svc.pairs import has_control_characters
from retrieval_svc.query import Vocabulary

FORMAT = "reimagen-knowledge-base/1"
MANIFEST = "knowledge-base.json"
PAIRS, BM25, IMAGES = "pairs", "bm25", "images"
NAME_RULE = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_FACETS, MAX_FACET_VALUES, MAX_SCENE_PHRASES = 64, 10_000, 10_000
MAX_ALIKE = 32  # of a value: each is a search of its own where a tie is long
MAX_EMBEDDING_SIZE = 65_536  # Qdrant's own limit

_FACET_NAME = re.compile(r"[^\W=][^=]{0,63}")


class KnowledgeBaseError(ValueError):
    """The folder is missing, incomplete, damaged, of another format or in use; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a knowledge base is.

    Attributes:
        uuid: names it for good; a restored snapshot keeps it.
        created_at: RFC 3339.
        facets, scene_phrases: what prompts are understood with.
        embedding_model: name of the embedder; empty: unknown, embeddings come from outside.
        embedding_size: 0: it has no embeddings.
    """

    uuid: str
    name: str
    created_at: str
    facets: tuple[Facet, ...] = ()
    scene_phrases: tuple[str, ...] = ()
    embedding_model: str = ""
    embedding_size: int = 0

    def vocabulary(self) -> Vocabulary:
        """What prompts are understood with."""
        return Vocabulary(self.facets, self.scene_phrases)


def new_manifest(
    *,
    name: str,
    facets: Sequence[Facet] = (),
    scene_phrases: Sequence[str] = (),
    embedding_model: str = "",
    embedding_size: int = 0,
) -> Manifest:
    """The manifest of a knowledge base that is about to be made.

    Raises:
        InvalidArgument: a name, a facet, a scene phrase or the size cannot be.
    """
    check_name(name)
    if not 0 <= embedding_size <= MAX_EMBEDDING_SIZE:
        raise InvalidArgument("embedding_size", f"{embedding_size} is not between 0 and {MAX_EMBEDDING_SIZE}")
    _check_facets(facets)
    if len(scene_phrases) > MAX_SCENE_PHRASES:
        raise InvalidArgument("scene_phrases", f"holds {len(scene_phrases)}; at most {MAX_SCENE_PHRASES} are taken")
    manifest = Manifest(
        uuid=str(uuid.uuid4()),
        name=name,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        facets=tuple(facets),
        scene_phrases=tuple(scene_phrases),
        embedding_model=embedding_model,
        embedding_size=embedding_size,
    )
    try:
        manifest.vocabulary()
    except CorpusError as error:
        raise InvalidArgument("facets", str(error).removeprefix("corpus: ")) from None
    return manifest


def fitting_manifest(
    name: str,
    *,
    facets: Sequence[Facet],
    scene_phrases: Sequence[str],
    embedding_size: int | None,
    embedder: Embedder | None,
) -> Manifest:
    """The manifest of a new knowledge base; `embedding_size` None: the embedder's, 0 where there is none.

    Raises:
        InvalidArgument: a name, facet or size cannot be.
    """
    ours = embedder.size if embedder is not None else 0
    size = ours if embedding_size is None else embedding_size
    return new_manifest(
        name=name,
        facets=facets,
        scene_phrases=scene_phrases,
        embedding_model=embedder.name if embedder is not None and 0 < size == ours else "",
        embedding_size=size,
    )


def check_name(name: str) -> None:
    """The rule of names.

    Raises:
        InvalidArgument: it is broken.
    """
    if not NAME_RULE.fullmatch(name):
        raise InvalidArgument("name", f"{name!r} is not 1 to 63 of a-z, 0-9 and hyphen, beginning with a letter")


def facet_name_fault(name: str) -> str:
    """Why `name` cannot name a facet; empty: it can. The equals sign divides name and value in the indexes."""
    if _FACET_NAME.fullmatch(name) and not has_control_characters(name):
        return ""
    return f"{name!r} is no facet name: 1 to 64 characters, a letter or digit first, no equals sign"


def _check_facets(facets: Sequence[Facet]) -> None:
    names = [facet.name for facet in facets]
    if len(names) > MAX_FACETS:
        raise InvalidArgument("facets", f"holds {len(names)}; at most {MAX_FACETS} are taken")
    for facet in facets:
        fault = facet_name_fault(facet.name)
        if fault or names.count(facet.name) > 1:
            raise InvalidArgument("facets", fault or f"{facet.name!r} stands twice")
        if len(facet.values) > MAX_FACET_VALUES:
            raise InvalidArgument("facets", f"{facet.name!r} has more than {MAX_FACET_VALUES} values")
        for value, others in facet.alike.items():
            named = (value, *others)
            if len(others) > MAX_ALIKE:
                raise InvalidArgument(
                    "facets", f"alike of {value!r} holds {len(others)}; at most {MAX_ALIKE} are taken"
                )
            strange = next((one for one in named if one not in facet.values or named.count(one) > 1), None)
            if strange is not None:
                fault = "stands twice" if strange in facet.values else f"is no value of {facet.name!r}"
                raise InvalidArgument("facets", f"alike of {value!r}: {strange!r} {fault}")


def extended(manifest: Manifest, new_values: Mapping[str, Sequence[str]]) -> Manifest:
    """The same with more values of its facets."""
    facets = tuple(replace(f, values=(*f.values, *new_values.get(f.name, ()))) for f in manifest.facets)
    return replace(manifest, facets=facets)


def document_of(manifest: Manifest) -> dict[str, Any]:
    """It as JSON: what stands in the file, and beside a collection on a server."""
    embedding = {"model": manifest.embedding_model, "size": manifest.embedding_size}
    return {
        "format": FORMAT,
        "uuid": manifest.uuid,
        "name": manifest.name,
        "created_at": manifest.created_at,
        "facets": [facet.document() for facet in manifest.facets],
        "scene_phrases": list(manifest.scene_phrases),
        "embedding": embedding if manifest.embedding_size else None,
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it, atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_json(folder / MANIFEST, document_of(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read it.

    Raises:
        KnowledgeBaseError: there is none, or it is not of this format.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise KnowledgeBaseError(f"knowledge base: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise KnowledgeBaseError(f"knowledge base: {path} cannot be read ({error!r})") from None
    return manifest_of(document, str(path))


def manifest_of(document: Any, place: str) -> Manifest:
    """What `document_of` gives, read back; `place` says where it stood.

    Raises:
        KnowledgeBaseError: it is not of this format.
    """
    try:
        if document["format"] != FORMAT:
            raise KnowledgeBaseError(f"knowledge base: {place} has format {document['format']!r}, expected {FORMAT!r}")
        embedding = document["embedding"] or {"model": "", "size": 0}
        manifest = Manifest(
            uuid=str(uuid.UUID(document["uuid"])),
            name=document["name"],
            created_at=document["created_at"],
            facets=tuple(Facet.of(facet) for facet in document["facets"]),
            scene_phrases=tuple(document["scene_phrases"]),
            embedding_model=str(embedding["model"]),
            embedding_size=int(embedding["size"]),
        )
        manifest.vocabulary()
    except KnowledgeBaseError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KnowledgeBaseError(f"knowledge base: {place} cannot be read ({error!r})") from None
    return manifest
