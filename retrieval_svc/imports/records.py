"""What every source is read into: records, or the reason why there is none."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.corpus import Facet
from retrieval_svc.new_pairs import MAX_PAIR_ID_BYTES
from retrieval_svc.pairs import NewPair

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".svg", ".gif", ".bmp", ".tif", ".tiff")

CAPTION_COLUMNS = ("caption", "text", "prompt")
SOURCE_COLUMNS = ("source", "url", "image_url", "source_url")
AUTHOR_COLUMNS = ("author", "artist", "creator", "photographer")
LICENSE_COLUMNS = ("license", "licence", "license_name")
MAX_UNSAFE_PROBABILITY = 0.1  # of LAION's `punsafe`: what Stable Diffusion 2 was trained below (its model card)
_SAFE_WORDS = {"unlikely": True, "unsure": False, "nsfw": False}  # LAION-400M and LAION-5B, column NSFW

_UNSUITABLE = re.compile(r"[^0-9A-Za-z._=+@-]+")
_MARK_CHARACTERS = 10


class SourceError(ValueError):
    """The source as a whole cannot be read; the message names it."""


class Unreadable(Exception):
    """One record cannot be taken: `reason` is what the summary counts by, `detail` is of this record."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class Record:
    """One pair of a source, its picture not read yet.

    Attributes:
        key: names it within its source, the same on every run.
        load: reads the picture; raises `Unreadable` or OSError. None: the pair has an address alone.
        safe: None: the source does not say.
        pair_id: empty: made of the source's name and the key.
    """

    key: str
    caption: str
    load: Callable[[], bytes] | None = None
    image_uri: str = ""
    entity: str = ""
    facets: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    source: str = ""
    license: str = ""
    safe: bool | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    pair_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One record that is not taken."""

    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a source is read.

    Attributes:
        name: first part of the pairs' ids; empty: the source's own name.
        images: folder of the pictures, where they are not beside what describes them.
        captions: of a picture with several: "first" or "all" (a pair for each).
        keep_uris: a record without a local picture becomes a pair with its address; otherwise it is rejected.
        facet_columns: columns that become facets.
        author, source, license: of records that do not say.
        safe: of records that do not say.
    """

    name: str = ""
    images: Path | None = None
    captions: str = "first"
    keep_uris: bool = False
    facet_columns: tuple[str, ...] = ()
    author: str = ""
    source: str = ""
    license: str = ""
    safe: bool = False


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source that can be read, from its beginning, as often as need be, with the same records in the same order.

    Attributes:
        name: first part of pair ids.
        fingerprint: equal for equal files read with equal options.
        num_records: for a progress bar; None: not known before it is read.
        facets, scene_phrases: the vocabulary of a knowledge base that is made for it.
    """

    name: str
    fingerprint: str
    records: Callable[[], Iterator[Record | Rejected]]
    num_records: int | None = None
    facets: tuple[Facet, ...] = ()
    scene_phrases: tuple[str, ...] = ()


def fingerprint_of(kind: str, options: Options, files: Sequence[Path]) -> str:
    """Names the files by path, size and time of change, and how they are read."""
    described = [kind, repr(options)]
    for path in files:
        known = path.stat()
        described.append(f"{path.absolute()} {known.st_size} {known.st_mtime_ns}")
    return hashlib.sha256("\n".join(described).encode("utf-8", "backslashreplace")).hexdigest()


def pair_id_of(source: str, key: str) -> str:
    """`<source>--<key>` in at most 200 bytes of letters, digits and `._=+@-`.

    A key that has to be changed for that ends in a mark of its hash, so that two keys never share an id.
    """
    suited = _UNSUITABLE.sub("-", key)
    room = MAX_PAIR_ID_BYTES - len(source) - 2
    if suited == key and len(key) <= room:
        return f"{source}--{key}"
    mark = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:_MARK_CHARACTERS]
    return f"{source}--{suited[: room - _MARK_CHARACTERS - 1].strip('-')}-{mark}"


def source_name(text: str) -> str:
    """`text` as the first part of pair ids: at most 60 characters, never empty."""
    return _UNSUITABLE.sub("-", text).strip("-.")[:60] or "import"


def to_new_pair(record: Record, image: bytes, options: Options, name: str) -> NewPair:
    """The pair to store, with the defaults of `options` where the record says nothing."""
    return NewPair(
        pair_id=record.pair_id or pair_id_of(name, record.key),
        caption=record.caption,
        image=image,
        image_uri="" if image else record.image_uri,
        entity=record.entity,
        facets=record.facets,
        author=record.author or options.author,
        source=record.source or options.source,
        license=record.license or options.license,
        safe=options.safe if record.safe is None else record.safe,
        attributes=record.attributes,
    )


def plain(text: object) -> str:
    """`text` on one line, without control characters; "" for None and NaN."""
    if text is None or (isinstance(text, float) and text != text):
        return ""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in str(text)).split())


def record_of(
    key: str,
    columns: Mapping[str, Any],
    *,
    options: Options,
    load: Callable[[], bytes] | None,
    caption: str = "",
    used: Sequence[str] = (),
) -> Record:
    """A record of a table's row or a JSON object: columns are known by their names, whatever their case.

    `used` names columns that are told otherwise (the file's name, the key). What is not known goes into attributes.

    Raises:
        Unreadable: it has no caption.
    """
    lower = {str(name).lower(): name for name in columns}
    taken = {name.lower() for name in used}

    def first(names: Sequence[str]) -> str:
        for name in names:
            if name in lower:
                taken.add(name)
                if found := plain(columns[lower[name]]):
                    return found
        return ""

    own_caption = first(CAPTION_COLUMNS)
    record = Record(
        key=key,
        caption=plain(caption) or own_caption,
        load=load,
        entity=first(("entity",)),
        author=first(AUTHOR_COLUMNS),
        source=first(SOURCE_COLUMNS),
        license=first(LICENSE_COLUMNS),
        safe=_safety({name: columns[own] for name, own in lower.items()}),
    )
    if not record.caption:
        raise Unreadable("no caption")
    facets = _facets(columns, lower, options.facet_columns)
    taken |= {"facets", *(name.lower() for name in options.facet_columns)}
    attributes = {
        str(own): text for name, own in lower.items() if name not in taken and (text := attribute_text(columns[own]))
    }
    return replace(record, facets=facets, attributes=attributes)


def _facets(columns: Mapping[str, Any], lower: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    given = columns[lower["facets"]] if "facets" in lower else {}
    facets = {str(k): plain(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
    for name in names:
        if name.lower() in lower and (value := plain(columns[lower[name.lower()]])):
            facets[name] = value
    return {name: value for name, value in facets.items() if value}


def attribute_text(value: Any) -> str:
    """A value of a table or a JSON object as an attribute's text; "" for what says nothing."""
    if isinstance(value, Mapping | list | tuple):
        return plain(json.dumps(value, ensure_ascii=False, default=str)) if value else ""
    if isinstance(value, bool):
        return str(value).lower()
    return plain(value)


def _safety(columns: Mapping[str, Any]) -> bool | None:
    """What `safe`, LAION's `NSFW` and `punsafe` say: safe if all that are there do; None if none is there."""
    said: list[bool] = []
    declared = columns.get("safe")
    if isinstance(declared, bool):
        said.append(declared)
    elif plain(declared).lower() in ("true", "false", "1", "0"):
        said.append(plain(declared).lower() in ("true", "1"))
    if word := plain(columns.get("nsfw")).lower():
        said.append(_SAFE_WORDS.get(word, False))
    if text := plain(columns.get("punsafe")):
        try:
            said.append(float(text) < MAX_UNSAFE_PROBABILITY)
        except ValueError:
            said.append(False)
    return all(said) if said else None
