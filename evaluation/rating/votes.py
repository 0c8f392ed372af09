"""Votes as they are kept: a file a rater, a line of JSON an event, each on the disk before it is acknowledged.

`VOTES/raters/<rater id>.jsonl`: first who it is, then votes and undoings in the order in which they were made::

    {"event": "rater", "rater": "5f0c...", "name": "Ada", "at": "2026-01-02T03:04:05.678Z"}
    {"event": "vote", "serial": 0, "item": ..., "system": ..., "prompt_id": ..., "category": ..., "entity": ...,
     "frequent": true, "check": null, "picture": <sha256 of the one judged>, "seed": 3, "photorealism": 1,
     "faithfulness": 0, "seconds": 4.2, "at": ...}
    {"event": "undo", "serial": 1, "item": ..., "at": ...}

`serial` counts a rater's votes and undoings. What is sent names the serial that it is meant to become, so that the same
thing sent twice, or from a page that is out of date, counts once.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from common.files import sync_folder
from evaluation.rating.items import CheckKind


class VotesError(ValueError):
    """A file of votes is not what it should be; the message names file and line."""


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a rater said of an item; see `Item` for what it was.

    Attributes:
        serial: place among the rater's events.
        check: kind of attention check, None of a real item.
        picture, seed: the one that was judged; the best one, as the rater found.
        seconds: from seeing it to the answer; None where the page did not say.
    """

    serial: int
    item: str
    system: str
    prompt_id: str
    category: str
    entity: str
    frequent: bool
    check: CheckKind | None
    picture: str
    seed: int
    photorealism: int
    faithfulness: int
    seconds: float | None
    at: str


@dataclass(frozen=True, kw_only=True)
class Undo:
    """The last vote that stood does not count."""

    serial: int
    item: str
    at: str


Event = Vote | Undo


def standing(events: Sequence[Event]) -> tuple[list[Vote], list[str]]:
    """The votes that count, in their order; and the items whose vote was undone and not made again, last undone last.

    Of two votes on one item the later one counts.
    """
    votes: dict[str, Vote] = {}
    undone: dict[str, None] = {}
    for event in events:
        votes.pop(event.item, None)
        undone.pop(event.item, None)
        if isinstance(event, Vote):
            votes[event.item] = event
        else:
            undone[event.item] = None
    return list(votes.values()), list(undone)


class RaterFile:
    """One rater's events. Made by `create` or `open_file`; one process writes it.

    Attributes:
        votes, undone: see `standing`.
        prompts: that the rater voted on, attention checks apart.
    """

    def __init__(self, *, path: Path, rater_id: str, name: str, events: list[Event]) -> None:
        self.path = path
        self.rater_id = rater_id
        self.name = name
        self.events = events
        self._settle()

    @classmethod
    def create(cls, folder: Path, name: str) -> RaterFile:
        """A new rater's file in `folder`; an OSError where it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        rater_id = secrets.token_hex(6)
        made = cls(path=folder / f"{rater_id}.jsonl", rater_id=rater_id, name=name, events=[])
        made._write({"event": "rater", "rater": rater_id, "name": name, "at": now()})
        sync_folder(folder)
        return made

    @classmethod
    def open_file(cls, path: Path) -> RaterFile | None:
        """Read a file to go on with it; None (and the file is removed) where a kill left not even its first line.

        A last line that was cut short was never acknowledged: it is cut off.
        """
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            path.unlink()
            return None
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        return _parsed(path, whole)

    @classmethod
    def read(cls, path: Path) -> RaterFile | None:
        """The same, for a reader: nothing is changed."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        return _parsed(path, whole) if whole else None

    def append(self, event: Event) -> None:
        """Add an event; it is on the disk when this returns.

        Raises:
            OSError: it could not be written; the file is as it was before.
        """
        assert event.serial == len(self.events)
        self._write({"event": "vote" if isinstance(event, Vote) else "undo", **asdict(event)})
        self.events.append(event)
        self._settle()

    def _settle(self) -> None:
        self.votes, self.undone = standing(self.events)
        self.prompts = {vote.prompt_id for vote in self.votes if vote.check is None}

    def _write(self, document: dict[str, Any]) -> None:
        line = (json.dumps(document, ensure_ascii=False) + "\n").encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)


def now() -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _parsed(path: Path, content: bytes) -> RaterFile:
    events: list[Event] = []
    head: dict[str, Any] = {}
    for number, line in enumerate(content.decode("utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            document = json.loads(line)
            kind = document.pop("event")
            if number == 1 and kind == "rater":
                head = {"rater_id": document["rater"], "name": document["name"]}
            elif head and kind in ("vote", "undo") and document["serial"] == len(events):
                events.append(_vote(document) if kind == "vote" else Undo(**document))
            else:
                raise ValueError(f"event {kind!r} is out of place")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise VotesError(f"votes: {path}:{number} is no event of a rater ({error})") from None
    return RaterFile(path=path, events=events, **head)


def _vote(document: dict[str, Any]) -> Vote:
    vote = Vote(**document)
    if {vote.photorealism, vote.faithfulness} - {0, 1} or vote.check not in (None, *get_args(CheckKind)):
        raise ValueError("an answer or a check is none of ours")
    return vote
