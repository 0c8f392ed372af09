"""A corpus: a folder of webdataset tar shards with one documented manifest.

Layout (the one img2dataset writes, plus `corpus.json`)::

    corpus.json     format, name, version, facets, scene phrases, sources, and per shard its sha256 and number of pairs
    00000.tar       for each pair: <key>.{svg,png,jpg,webp}  <key>.txt (caption)  <key>.json (entity, facets, author, ...)

Keys hold no dot, so that everything after the first dot is the member's kind (the webdataset rule).
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.files import replacing_folder, sha256_file, write_json

FORMAT = "reimagen-corpus/1"
MAX_KEY_BYTES = 95  # a portable tar names a member in 100 bytes: key, dot and kind
IMAGE_FORMATS = ("svg", "png", "jpg", "webp")


class CorpusError(ValueError):
    """The corpus is missing, cut short, altered or malformed; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Facet:
    """A closed vocabulary that prompts may name and that is not the entity: `template` holds `{value}`.

    Attributes:
        alike: of a value, others that look like it, the most alike first: whose pairs stand in for its own.
    """

    name: str
    template: str
    values: tuple[str, ...]
    alike: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Facet:
        """Read it from JSON.

        Raises:
            KeyError, TypeError, AttributeError: it is not of this shape.
        """
        alike = {str(value): tuple(others) for value, others in document.get("alike", {}).items()}
        if isinstance(document["values"], str) or any(isinstance(o, str) for o in document.get("alike", {}).values()):
            raise TypeError("facets: a text where a list is due")
        return cls(name=document["name"], template=document["template"], values=tuple(document["values"]), alike=alike)

    def document(self) -> dict[str, Any]:
        """It as JSON; what is empty takes no room."""
        alike = {value: list(others) for value, others in self.alike.items()}
        own = {"name": self.name, "template": self.template, "values": list(self.values)}
        return own | ({"alike": alike} if alike else {})


@dataclass(frozen=True, kw_only=True)
class CorpusManifest:
    """What `corpus.json` says."""

    name: str
    version: str
    fingerprint: str
    num_pairs: int
    shards: tuple[Mapping[str, Any], ...]
    facets: tuple[Facet, ...] = ()
    scene_phrases: tuple[str, ...] = ()
    sources: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One (image, caption) of a corpus with where it comes from."""

    key: str
    caption: str
    image: bytes
    image_format: str
    entity: str = ""
    facets: Mapping[str, str] = field(default_factory=dict)
    author: str = ""
    source: str = ""
    license: str = ""
    held_out: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> CorpusManifest:
    """Read `corpus.json` of `folder`.

    Raises:
        CorpusError: there is none, it is not JSON, or its format is not this one.
    """
    path = folder / "corpus.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorpusError(f"corpus: {path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorpusError(f"corpus: {path} is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CorpusError(f"corpus: {path} has format {found!r}, expected {FORMAT!r}")
    try:
        return CorpusManifest(
            name=document["name"],
            version=document["version"],
            fingerprint=document["fingerprint"],
            num_pairs=int(document["num_pairs"]),
            shards=tuple(_check_shard(shard) for shard in document["shards"]),
            facets=tuple(Facet.of(facet) for facet in document.get("facets", ())),
            scene_phrases=tuple(document.get("scene_phrases", ())),
            sources=tuple(document.get("sources", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorpusError(f"corpus: {path} lacks or mistypes {error}") from None


def _check_shard(shard: Mapping[str, Any]) -> Mapping[str, Any]:
    name = shard["file"]
    if not isinstance(name, str) or Path(name).name != name or not isinstance(shard["sha256"], str):
        raise ValueError(f"shard {name!r}: its file is outside the folder, or its sha256 no text")
    return shard


def iter_pairs(folder: Path) -> Iterator[Pair]:
    """Every pair of the corpus in shard order. Each shard's sha256 is checked before its first pair is given.

    Raises:
        CorpusError: a shard is missing, cut or altered, or a pair in it lacks a part; the message names the shard.
    """
    for shard in read_manifest(folder).shards:
        yield from iter_shard(folder, shard)


def iter_shard(folder: Path, shard: Mapping[str, Any]) -> Iterator[Pair]:
    """The pairs of one of the manifest's shards; see `iter_pairs`."""
    path = folder / str(shard["file"])
    if not path.is_file():
        raise CorpusError(f"corpus: shard {path} does not exist")
    digest = sha256_file(path)
    if digest != shard["sha256"]:
        raise CorpusError(
            f"corpus: shard {path} is cut short or altered (sha256 {digest[:12]}…, manifest {shard['sha256'][:12]}…,"
            f" {path.stat().st_size} bytes)"
        )
    yield from _read_shard(path)


def check_replaced(folder: Path) -> None:
    """Whether a corpus may take the place of `folder`: there is none, it is empty, or holds a corpus.

    Raises:
        CorpusError: it is anything else, somebody's pictures, say.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / "corpus.json").is_file():
        raise CorpusError(f"corpus: {folder} holds something else than a corpus, and is not replaced by one")


def write_corpus(
    folder: Path,
    pairs: Iterable[Pair],
    *,
    name: str,
    version: str,
    facets: tuple[Facet, ...] = (),
    scene_phrases: tuple[str, ...] = (),
    sources: tuple[Mapping[str, Any], ...] = (),
    pairs_per_shard: int = 4096,
) -> CorpusManifest:
    """Write `pairs` as a corpus that takes `folder`'s place in one rename; nothing is left behind on failure.

    The same pairs in the same order give the same bytes (times and owners in the tar are fixed), so that the
    fingerprint names the content.

    Raises:
        CorpusError: `folder` holds something else than a corpus, which would be lost; or a pair cannot be of one.
    """
    check_replaced(folder)
    with replacing_folder(folder) as temporary:
        shards: list[dict[str, Any]] = []
        keys: set[str] = set()
        batch: list[Pair] = []

        def close_shard() -> None:
            path = temporary / f"{len(shards):05d}.tar"
            _write_shard(path, batch)
            shards.append({"file": path.name, "sha256": sha256_file(path), "num_pairs": len(batch)})
            batch.clear()

        for pair in pairs:
            _check_pair(pair, keys)
            batch.append(pair)
            if len(batch) == pairs_per_shard:
                close_shard()
        if batch:
            close_shard()
        document = {
            "format": FORMAT,
            "name": name,
            "version": version,
            "num_pairs": len(keys),
            "facets": [facet.document() for facet in facets],
            "scene_phrases": list(scene_phrases),
            "sources": [dict(source) for source in sources],
            "shards": shards,
        }
        # It names what is trained on: in which order values stand in for one another is not of that.
        named = {**document, "facets": [replace(facet, alike={}).document() for facet in facets]}
        canonical = json.dumps(named, sort_keys=True, ensure_ascii=False).encode()
        document["fingerprint"] = hashlib.sha256(canonical).hexdigest()
        write_json(temporary / "corpus.json", document)
    return read_manifest(folder)


def _check_pair(pair: Pair, keys: set[str]) -> None:
    if not pair.key or "." in pair.key or "/" in pair.key or pair.key in keys:
        raise CorpusError(f"corpus: key {pair.key!r} is empty, used twice, or holds a dot or a slash")
    if len(pair.key.encode()) > MAX_KEY_BYTES:
        raise CorpusError(f"corpus: key {pair.key!r} is longer than {MAX_KEY_BYTES} bytes")
    if pair.image_format not in IMAGE_FORMATS:
        raise CorpusError(
            f"corpus: pair {pair.key!r} has image format {pair.image_format!r}, not one of {IMAGE_FORMATS}"
        )
    keys.add(pair.key)


def _write_shard(path: Path, pairs: list[Pair]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            described = {
                "caption": pair.caption,
                "entity": pair.entity,
                "facets": dict(pair.facets),
                "author": pair.author,
                "source": pair.source,
                "license": pair.license,
                "held_out": pair.held_out,
                "extra": dict(pair.extra),
            }
            for kind, content in (
                (pair.image_format, pair.image),
                ("txt", pair.caption.encode()),
                ("json", json.dumps(described, ensure_ascii=False, sort_keys=True).encode()),
            ):
                member = tarfile.TarInfo(f"{pair.key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _read_shard(path: Path) -> Iterator[Pair]:
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                # webdataset: the key is the path up to the first dot of the file's name; ours hold no slash.
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                stem = "--".join((*(part for part in folder.split("/") if part not in ("", ".")), stem))
                if stem != key and parts:
                    yield _to_pair(path, key, parts)
                    parts = {}
                stream = tar.extractfile(member)
                assert stream is not None
                key = stem
                parts[kind.lower().replace("jpeg", "jpg")] = stream.read()
    except (tarfile.TarError, EOFError) as error:
        raise CorpusError(f"corpus: shard {path} cannot be read after pair {key!r} ({error})") from None
    if parts:
        yield _to_pair(path, key, parts)


def _to_pair(path: Path, key: str, parts: Mapping[str, bytes]) -> Pair:
    image_format = next((f for f in IMAGE_FORMATS if f in parts), None)
    if image_format is None:
        raise CorpusError(f"corpus: pair {key!r} of shard {path} has no image (found {sorted(parts)})")
    try:
        described = json.loads(parts.get("json", b"{}"))
        caption = parts["txt"].decode() if "txt" in parts else described["caption"]
        if not isinstance(caption, str) or not isinstance(described, dict):
            raise KeyError("caption")
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorpusError(f"corpus: pair {key!r} of shard {path} has no readable caption ({error})") from None
    return Pair(
        key=key,
        caption=caption,
        image=parts[image_format],
        image_format=image_format,
        entity=described.get("entity", ""),
        facets=described.get("facets", {}),
        author=described.get("author", ""),
        source=described.get("source", ""),
        license=described.get("license", ""),
        held_out=bool(described.get("held_out", False)),
        extra=described.get("extra", {}),
    )
