"""Webdataset tar shards, as img2dataset writes them: `<key>.{jpg,png,webp,svg}`, `<key>.txt`, `<key>.json`.

The key is the member's path up to the first dot of its file's name; members of one key stand together. Only headers
and descriptions are read in passing: a picture is read from its place in the shard when its turn comes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common.pictures import MAX_IMAGE_BYTES
from retrieval_svc.imports.records import (
    IMAGE_SUFFIXES,
    Options,
    Record,
    Rejected,
    Source,
    SourceError,
    Unreadable,
    fingerprint_of,
    record_of,
    source_name,
)

CUT = "shard cut short or damaged"
_BLOCK = 512
_MAX_TEXT_BYTES = 1 << 20
_KINDS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where one file of a shard lies."""

    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The files of one key by kind, e.g. "jpg", "txt"."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)


def open_webdataset(path: Path, options: Options) -> Source:
    """One shard, or all `*.tar` of a folder in the order of their names.

    Raises:
        SourceError: there is no shard.
    """
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards or not all(shard.is_file() for shard in shards):
        raise SourceError(f"webdataset: {path} is no tar shard and no folder with *.tar in it")
    return Source(
        name=options.name or source_name(path.absolute().name.removesuffix(".tar")),
        fingerprint=fingerprint_of("webdataset", options, shards),
        records=partial(_all_records, shards, options),
    )


def _all_records(shards: list[Path], options: Options) -> Iterator[Record | Rejected]:
    for shard in shards:
        for item in iter_samples(shard):
            yield _record(shard, item, options) if isinstance(item, Sample) else item


def iter_samples(shard: Path) -> Iterator[Sample | Rejected]:
    """The samples of a shard, as far as it can be read, and one `Rejected` where it cannot be read on.

    The last sample before a break is given if it has all kinds that the sample before it had (the first of a shard: a
    description), so that none loses its author and licence.
    """
    size, end = shard.stat().st_size, 0
    before, sample = Sample(key=""), Sample(key="")
    broken = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile() and member.offset_data + member.size > size:
                    break
                # Files, links and folders: the next header follows the content, in whole blocks.
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isfile() else 0)
                if not member.isfile():
                    continue
                key, kind = _split(member.name)
                if key != sample.key:
                    if sample.members:
                        yield sample
                    before, sample = sample, Sample(key=key)
                sample.members[kind] = Member(offset=member.offset_data, size=member.size)
        broken = "" if _has_end_mark(shard, end) else f"no end mark at byte {end} of {size}"
    except (tarfile.TarError, EOFError, ValueError) as error:
        broken = f"after byte {end} of {size} ({error})"
    wanted = set(before.members) or {"json"}
    if sample.members and (not broken or wanted <= set(sample.members)):
        yield sample
    elif sample.members:
        yield Rejected(key=sample.key, reason=CUT, detail=f"{shard.name}: only {', '.join(sorted(sample.members))}")
    if broken:
        yield Rejected(key=shard.name, reason=CUT, detail=f"{broken}; what comes after is not read")


def _has_end_mark(shard: Path, end: int) -> bool:
    """A tar ends with blocks of zeros; a broken header, or none, in their place means that something is lost."""
    with shard.open("rb") as stream:
        stream.seek(end)
        return stream.read(_BLOCK) == bytes(_BLOCK)


def _split(name: str) -> tuple[str, str]:
    folder, _, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    folders = [part for part in folder.split("/") if part not in ("", ".")]
    return "/".join((*folders, stem)), kind.lower()


def read_member(shard: Path, member: Member, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The content of one file.

    Raises:
        Unreadable: it is larger than `limit` bytes, or no longer there.
    """
    if member.size > limit:
        raise Unreadable("picture too large", f"{member.size} bytes; at most {limit} are taken")
    try:
        with shard.open("rb") as stream:
            stream.seek(member.offset)
            content = stream.read(member.size)
    except OSError as error:
        raise Unreadable("picture unreadable", f"{shard.name} ({error.strerror})") from None
    if len(content) != member.size:
        raise Unreadable(CUT, shard.name)
    return content


def _record(shard: Path, sample: Sample, options: Options) -> Record | Rejected:
    try:
        picture = next((sample.members[kind] for kind in _KINDS if kind in sample.members), None)
        if picture is None:
            raise Unreadable("picture missing", f"{shard.name}: only {', '.join(sorted(sample.members))}")
        columns = described(shard, sample)
        caption = ""
        if "txt" in sample.members:
            caption = read_member(shard, sample.members["txt"], _MAX_TEXT_BYTES).decode("utf-8-sig", "replace")
        load = partial(read_member, shard, picture)
        return record_of(sample.key, columns, options=options, load=load, caption=caption, used=("key",))
    except Unreadable as error:
        return Rejected(key=sample.key, reason=error.reason, detail=error.detail)


def described(shard: Path, sample: Sample) -> dict[str, Any]:
    """What `<key>.json` says; empty where there is none.

    Raises:
        Unreadable: it is no JSON object.
    """
    if "json" not in sample.members:
        return {}
    try:
        columns = json.loads(read_member(shard, sample.members["json"], _MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:
        raise Unreadable("metadata unreadable", f"{sample.key}.json ({error})") from None
    if not isinstance(columns, dict):
        raise Unreadable("metadata unreadable", f"{sample.key}.json is no object")
    return columns
