"""WebQA's JSON (Chang et al. 2022), from which Re-Imagen takes WikiImages, with the paper's caption filter.

Taken are: WebQA's own file (questions by id, whose `img_posFacts` and `img_negFacts` are the pictures), a list of such
facts, and {"images": [facts]}. A fact has `image_id`, `caption` or `title`, `url` and `imgUrl`; its picture is
`<image_id>.<suffix>` in the folder of pictures. A picture that several questions name is one record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retrieval_svc.imports.caption_filter import why_dropped
from retrieval_svc.imports.json_files import read_json
from retrieval_svc.imports.picture_files import file_by_key, file_within, reader
from retrieval_svc.imports.records import (
    Options,
    Record,
    Rejected,
    Source,
    SourceError,
    Unreadable,
    fingerprint_of,
    plain,
    record_of,
    source_name,
)

_KEYS = ("image_id", "id")
_FACTS = ("img_posFacts", "img_negFacts", "img_Facts")


def open_wikiimages(path: Path, options: Options) -> Source:
    """The facts of the file `path`.

    Raises:
        SourceError: it is no such file, or the folder of pictures is missing.
    """
    facts = _facts(read_json("wikiimages", path))
    if not facts:
        raise SourceError(f"wikiimages: {path} holds no facts with pictures")
    images = options.images or path.parent / "images"
    if not images.is_dir():
        raise SourceError(f"wikiimages: --images: {images} is not a folder")
    return Source(
        name=options.name or source_name(path.stem),
        fingerprint=fingerprint_of("wikiimages", options, [path]),
        records=partial(_records, facts, images, options),
        num_records=len(facts),
    )


def _facts(document: Any) -> list[Any]:
    """All facts, each picture once, in the order of the file."""
    entries: list[Any] = []
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        entries = document["images"]
    elif isinstance(document, list):
        entries = document
    elif isinstance(document, dict):
        entries = list(document.values())
    facts: list[Any] = []
    for entry in entries:
        lists = [entry[name] for name in _FACTS if isinstance(entry.get(name), list)] if isinstance(entry, dict) else []
        facts += [fact for group in lists for fact in group] if lists else [entry]
    unique: dict[tuple[str, str], Any] = {}
    for number, fact in enumerate(facts):
        key = _key(fact) if isinstance(fact, dict) else ""
        unique.setdefault((key, _caption(fact)) if key else ("", str(number)), fact)
    return list(unique.values())


def _records(facts: list[Any], images: Path, options: Options) -> Iterator[Record | Rejected]:
    for number, fact in enumerate(facts):
        key = (_key(fact) if isinstance(fact, dict) else "") or f"[{number}]"
        try:
            yield _record(fact, key, images, options)
        except Unreadable as error:
            yield Rejected(key=key, reason=error.reason, detail=error.detail)


def _record(fact: Any, key: str, images: Path, options: Options) -> Record:
    if not isinstance(fact, dict) or not _key(fact):
        raise Unreadable("metadata unreadable", "a fact without image_id")
    caption = _caption(fact)
    if caption and (dropped := why_dropped(caption)):
        raise Unreadable(dropped[0], "; ".join((*dropped, repr(caption))) if len(dropped) > 1 else caption)
    path = (
        file_within(images, fact["file_name"]) if isinstance(fact.get("file_name"), str) else file_by_key(images, key)
    )
    used = (*_KEYS, "file_name", "imgurl")
    record = record_of(key, fact, options=options, load=reader(path), caption=caption, used=used)
    return replace(record, source=record.source or plain(fact.get("imgUrl")))


def _key(fact: Mapping[str, Any]) -> str:
    return next((plain(fact[name]) for name in _KEYS if plain(fact.get(name))), "")


def _caption(fact: Any) -> str:
    """The caption, or the title where there is none; WebQA puts captions in quotation marks."""
    text = (plain(fact.get("caption")) or plain(fact.get("title"))) if isinstance(fact, dict) else ""
    return text.strip("\"' ")
