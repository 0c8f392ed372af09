"""A corpus becomes an index: what `python -m retrieval_svc build` does."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.corpus import CorpusError, CorpusManifest, Pair, iter_pairs, read_manifest
from common.files import replacing_folder, write_json
from retrieval_svc.bm25 import Bm25Writer, Entry, FacetCodes
from retrieval_svc.image_store import ImageStoreWriter
from retrieval_svc.index_folder import BM25, FORMAT, IMAGES, MANIFEST, IndexFolderError, open_index
from retrieval_svc.query import Vocabulary

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Report = Callable[[int, int], None]


def build_index(corpus: Path, index: Path, report: Report) -> bool:
    """Index `corpus` into `index`; gives False where an index of this very corpus is there already.

    The index takes its place by one rename; whatever fails, the former one stays as it was.

    Args:
        corpus: a corpus folder (`common.corpus`).
        index: the folder to make.
        report: called with (pairs done, pairs in all).

    Raises:
        CorpusError: the corpus is cut, altered or malformed; the message names the shard or the pair.
        IndexFolderError: `index` is a file, or a folder that holds something else.
        OSError: the disk is full, or the folder cannot be written.
    """
    manifest = read_manifest(corpus)
    fingerprint = hashlib.sha256(f"{FORMAT} {manifest.fingerprint}".encode()).hexdigest()
    if _is_complete(index, fingerprint):
        return False
    if index.exists() and not (index / MANIFEST).is_file() and not (index.is_dir() and not any(index.iterdir())):
        # It would be replaced, with all that is in it.
        raise IndexFolderError(f"index: {index} exists and is no index; remove it, or name another folder")
    if manifest.num_pairs == 0:
        raise CorpusError(f"corpus: {corpus} holds no pairs")
    try:
        with replacing_folder(index) as folder:
            _write_pairs(corpus, manifest, folder, report)
            write_json(
                folder / MANIFEST,
                {
                    "format": FORMAT,
                    "name": manifest.name,
                    "fingerprint": fingerprint,
                    "num_pairs": manifest.num_pairs,
                    "files": {
                        str(path.relative_to(folder)): path.stat().st_size
                        for path in sorted(folder.rglob("*"))
                        if path.is_file()
                    },
                    "facets": [
                        {"name": f.name, "template": f.template, "values": list(f.values)} for f in manifest.facets
                    ],
                    "scene_phrases": list(manifest.scene_phrases),
                },
            )
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            raise OSError(error.errno, os.strerror(error.errno), str(index)) from error
        raise
    return True


def _is_complete(index: Path, fingerprint: str) -> bool:
    try:
        opened = open_index(index)
    except IndexFolderError:
        return False
    opened.images.close()
    return opened.manifest.fingerprint == fingerprint


def _write_pairs(corpus: Path, manifest: CorpusManifest, folder: Path, report: Report) -> None:
    vocabulary = Vocabulary(manifest.facets, manifest.scene_phrases)
    codes = FacetCodes({facet.name: facet.values for facet in manifest.facets})
    keys: set[str] = set()
    (folder / BM25).mkdir()
    with (folder / IMAGES).open("wb") as stream, Bm25Writer(folder / BM25, codes) as writer:
        images = ImageStoreWriter(stream)
        for pair in iter_pairs(corpus):
            if pair.key in keys:
                raise CorpusError(f"corpus: {corpus} holds pair {pair.key!r} twice")
            keys.add(pair.key)
            offset, content = images.add(pair.image)
            try:
                writer.add(_entry(pair, vocabulary, codes, offset=offset, content=content))
            except KeyError as error:
                name, value = error.args[0]
                raise CorpusError(f"corpus: pair {pair.key!r} has {name} {value!r}, unknown to the manifest") from None
            report(len(keys), manifest.num_pairs)
    if len(keys) != manifest.num_pairs:
        raise CorpusError(f"corpus: {corpus} holds {len(keys)} pairs, its manifest says {manifest.num_pairs}")


def _entry(pair: Pair, vocabulary: Vocabulary, codes: FacetCodes, *, offset: int, content: bytes) -> Entry:
    """What is indexed of a pair: its entity, or where it has none its caption without facets and scene
    phrases.
    """
    entity, facets = pair.entity, pair.facets
    if not entity or not facets:
        caption = vocabulary.understand_caption(pair.caption)
        entity = entity or ", ".join((caption.entity, *caption.details))
        facets = facets or caption.facets
    payload: dict[str, Any] = {
        "pair_id": pair.key,
        "caption": pair.caption,
        "entity": entity,
        "image_format": pair.image_format,
        "offset": offset,
        "length": len(pair.image),
        "sha256": content.hex(),
        "facets": dict(facets),
        "author": pair.author,
        "source": pair.source,
        "license": pair.license,
    }
    ours = {name: value for name, value in facets.items() if name in codes.columns}
    return Entry(pair_id=pair.key, text=entity, facets=ours, content=content, payload=payload)
