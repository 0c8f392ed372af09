"""Our own corpora (`common.corpus`), such as the demonstration's: entities, facets and scene phrases are told.

The keys of a corpus are the ids of its pairs, so that a prompt's own pair can be excluded by the key that training and
evaluation know. Its manifest gives a knowledge base that is made for it its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common.corpus import read_manifest
from common.files import sha256_file
from retrieval_svc.imports.records import (
    Options,
    Record,
    Rejected,
    Source,
    Unreadable,
    attribute_text,
    plain,
    source_name,
)
from retrieval_svc.imports.webdataset import Sample, described, iter_samples, read_member

_KINDS = ("svg", "png", "jpg", "jpeg", "webp")
_TOLD = ("entity", "facets", "author", "source", "license", "caption", "extra")


def open_corpus(folder: Path, options: Options) -> Source:
    """The corpus in `folder`.

    Raises:
        CorpusError: there is none, or its manifest is malformed.
    """
    manifest = read_manifest(folder)
    return Source(
        name=options.name or source_name(manifest.name),
        fingerprint=f"{manifest.fingerprint} {options}",
        records=partial(_records, folder, manifest.shards),
        num_records=manifest.num_pairs,
        facets=manifest.facets,
        scene_phrases=manifest.scene_phrases,
    )


def _records(folder: Path, shards: tuple[Mapping[str, Any], ...]) -> Iterator[Record | Rejected]:
    for shard in shards:
        path = folder / str(shard["file"])
        if not path.is_file():
            yield Rejected(key=path.name, reason="shard missing")
            continue
        if sha256_file(path) != shard["sha256"]:
            # Its pairs may still be good: what is readable is taken, but it is told.
            yield Rejected(key=path.name, reason="shard altered", detail="its sha256 is not the manifest's")
        for item in iter_samples(path):
            yield _record(path, item) if isinstance(item, Sample) else item


def _record(shard: Path, sample: Sample) -> Record | Rejected:
    key = sample.key.replace("/", "--")
    try:
        picture = next((sample.members[kind] for kind in _KINDS if kind in sample.members), None)
        if picture is None:
            raise Unreadable("picture missing", f"only {', '.join(sorted(sample.members))}")
        told = described(shard, sample)
        caption = plain(told.get("caption"))
        if not caption and "txt" in sample.members:
            caption = plain(read_member(shard, sample.members["txt"]).decode("utf-8", "replace"))
        if not caption:
            raise Unreadable("no caption")
        facets, extra = told.get("facets"), told.get("extra")
        attributes = {str(k): attribute_text(v) for k, v in extra.items()} if isinstance(extra, Mapping) else {}
        return Record(
            key=key,
            pair_id=key,
            caption=caption,
            load=partial(read_member, shard, picture),
            entity=plain(told.get("entity")),
            facets={str(k): plain(v) for k, v in facets.items()} if isinstance(facets, Mapping) else {},
            author=plain(told.get("author")),
            source=plain(told.get("source")),
            license=plain(told.get("license")),
            attributes=attributes | {k: attribute_text(v) for k, v in told.items() if k not in _TOLD and v},
        )
    except Unreadable as error:
        return Rejected(key=key, reason=error.reason, detail=error.detail)
