"""Raters and their votes: who sees what next, and what is kept of an answer."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import os
import secrets
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common.files import write_atomic
from evaluation.rating.checks import make_check, possible_kinds
from evaluation.rating.items import Item, Shown
from evaluation.rating.order import Order, Rank, end_of, is_check_due
from evaluation.rating.votes import RaterFile, Undo, Vote, VotesError, now

MAX_RATERS = 1000
MAX_NAME = 40  # characters
MAX_SECONDS = 86_400.0
_KEPT_TOKENS = 200  # pictures that a rater's browser may still ask for


class Refused(ValueError):
    """What a rater sent cannot be taken; the message names the field."""


@dataclass(kw_only=True)
class Rater:
    """A rater, and what is on the rater's screen.

    Attributes:
        link: the unguessable last part of the rater's address.
        screen: the item that is shown; None before the first, and after the last.
        tokens: by the name in its address, the pictures that the rater's browser may ask for.
    """

    file: RaterFile
    link: str
    screen: Item | None = None
    tokens: dict[str, Shown] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def serial(self) -> int:
        """Of the rater's next event."""
        return len(self.file.events)


class Rating:
    """All raters of a folder of votes. One process has a folder at a time; one thread calls this."""

    def __init__(self, items: Sequence[Item], folder: Path, *, check_every: int, wanted: int) -> None:
        """Open the folder, or make it.

        Args:
            check_every: one item of so many is an attention check; 0: none is.
            wanted: raters that a prompt should get before others are begun.

        Raises:
            ValueError: a number cannot be, or another process has the folder.
            VotesError: a file in it is damaged.
        """
        if check_every < 0 or check_every == 1:
            raise ValueError(f"check_every: {check_every} is neither 0 nor at least 2")
        if wanted < 1:
            raise ValueError(f"raters: {wanted}, at least 1 is needed")
        self._items = {item.item_id: item for item in items}
        self._order = Order(items=items, wanted=wanted)
        self._check_every = check_every
        self._unshown: set[str] = set()
        self._kinds = possible_kinds(items)
        self._raters_folder = folder / "raters"
        self._raters_folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self._key = _key(folder / "key")
        self._raters = {rater.link: rater for rater in self._found()}

    def close(self) -> None:
        """Give the folder back."""
        self._lock.close()

    @property
    def raters(self) -> list[Rater]:
        """All there are, by name."""
        return sorted(self._raters.values(), key=lambda rater: rater.file.name.casefold())

    def rater(self, link: str) -> Rater | None:
        """Whose link it is."""
        return self._raters.get(link)

    def join(self, name: object) -> Rater:
        """A new rater; Refused where the name cannot be, or is taken."""
        wanted = _name(name)
        if any(rater.file.name.casefold() == wanted.casefold() for rater in self.raters):
            raise Refused(f"name: {wanted} is taken; open your own link again, or choose another name")
        if len(self._raters) >= MAX_RATERS:
            raise Refused(f"name: there are {MAX_RATERS} raters, no more are taken")
        rater = self._rater(RaterFile.create(self._raters_folder, wanted))
        self._raters[rater.link] = rater
        return rater

    def show(self, rater: Rater) -> Item | None:
        """The item on the rater's screen: the same one until it is voted on."""
        if rater.screen is None:
            rater.screen = self._following(rater, [vote.item for vote in rater.file.votes], rater.file.undone)
        return rater.screen

    def after(self, rater: Rater) -> Item | None:
        """The item that would come after the one on the screen, to have its pictures ready."""
        if rater.screen is None:
            return None
        shown = rater.screen.item_id
        voted = [*(vote.item for vote in rater.file.votes), shown]
        return self._following(rater, voted, [item for item in rater.file.undone if item != shown])

    def drop(self, rater: Rater, item: Item) -> None:
        """Never show an item again: its pictures cannot be read."""
        self._unshown.add(item.item_id)
        self._items.pop(item.item_id, None)
        self._order = Order(items=list(self._items.values()), wanted=self._order.wanted)
        rater.screen = None

    def screen(self, rater: Rater) -> dict[str, Any]:
        """What the rater's page shows, without any name of a system."""
        votes = rater.file.votes
        item, done = self.show(rater), len(votes)
        left = len(self._items.keys() - {vote.item for vote in votes})
        last = votes[-1] if votes else None
        return {
            "name": rater.file.name,
            "serial": rater.serial,
            "done": done,
            "total": end_of(self._rank(rater), done, left, self._check_every) if item else done,
            "last": {"photorealism": last.photorealism, "faithfulness": last.faithfulness} if last else None,
            "item": self._described(rater, item) if item else None,
        }

    async def vote(self, rater: Rater, given: dict[str, Any]) -> bool:
        """Keep a vote; gives whether it is new. One that was kept already, or is out of date, is not.

        Raises:
            Refused: a field is missing or cannot be.
            OSError: it could not be written: nothing of it is kept.
        """
        for name in ("photorealism", "faithfulness"):
            if type(given.get(name)) is not int or given[name] not in (0, 1):
                raise Refused(f"{name}: {given.get(name)!r} is neither 0 nor 1")
        async with rater.lock:
            if not _is_current(rater, given):
                return False
            item = self._named(rater, given.get("item"))
            if item is None:
                return False
            number = given.get("picture")
            if type(number) is not int or not 0 <= number < len(item.pictures):
                raise Refused(f"picture: {number!r} is not one of {len(item.pictures)}")
            picture = self._shuffled(rater, item)[number]
            vote = Vote(
                serial=rater.serial,
                item=item.item_id,
                system=item.system,
                prompt_id=item.prompt_id,
                category=item.category,
                entity=item.entity,
                frequent=item.frequent,
                check=item.check,
                picture=picture.sha256,
                seed=picture.seed,
                photorealism=given["photorealism"],
                faithfulness=given["faithfulness"],
                seconds=_seconds(given.get("seconds")),
                at=now(),
            )
            await asyncio.to_thread(rater.file.append, vote)
            rater.screen = None
            return True

    async def undo(self, rater: Rater, given: dict[str, Any]) -> bool:
        """Take the last vote back; its item is shown again. Gives whether there was one, and the page was up to date."""
        async with rater.lock:
            votes = rater.file.votes
            if not votes or not _is_current(rater, given):
                return False
            await asyncio.to_thread(rater.file.append, Undo(serial=rater.serial, item=votes[-1].item, at=now()))
            rater.screen = None
            return True

    def _following(self, rater: Rater, voted: Sequence[str], undone: Sequence[str]) -> Item | None:
        rank, position = self._rank(rater), len(voted)
        check = self._check(rater, position // self._check_every) if self._check_every else None
        for item_id in reversed(undone):
            if item_id in self._items:
                return self._items[item_id]
            if check and check.item_id == item_id:
                return check
        item = self._order.next_item(rank, voted, self._raters_of(rater))
        return check if check and item and is_check_due(rank, position, self._check_every) else item

    def _check(self, rater: Rater, window: int) -> Item | None:
        """Kinds take turns, in another order for each rater and round."""
        if not self._items:
            return None
        turn, place = divmod(window, len(self._kinds))
        rank = self._rank(rater)
        kinds = sorted(self._kinds, key=lambda kind: rank(f"{kind} {turn}"))
        check = make_check(self._order.items, f"{rater.file.rater_id}-{window}", kinds[place])
        return None if check.item_id in self._unshown else check

    def _named(self, rater: Rater, token: object) -> Item | None:
        """The item that a page means: the one on the screen, or one that it showed before this process began."""
        voted = {vote.item for vote in rater.file.votes}
        candidates = [rater.screen, *self._items.values()]
        if self._check_every:
            candidates.append(self._check(rater, len(voted) // self._check_every))
        for item in candidates:
            if item is not None and item.item_id not in voted and self._token(rater, item.item_id) == token:
                return item
        return None

    def _described(self, rater: Rater, item: Item) -> dict[str, Any]:
        pictures = [(f"{item.item_id}/{i}", shown) for i, shown in enumerate(self._shuffled(rater, item))]
        references = [(f"reference/{path}", Shown(path=path)) for path in item.references]
        for name, shown in (*pictures, *references):
            token = self._token(rater, name)
            rater.tokens.pop(token, None)
            rater.tokens[token] = shown
        for token in list(rater.tokens)[:-_KEPT_TOKENS]:
            del rater.tokens[token]
        return {
            "item": self._token(rater, item.item_id),
            "entity": item.entity,
            "category": item.category,
            "prompt": item.prompt,
            "pictures": [self._token(rater, name) for name, _ in pictures],
            "references": [self._token(rater, name) for name, _ in references],
        }

    def _shuffled(self, rater: Rater, item: Item) -> list[Shown]:
        rank = self._rank(rater)
        return sorted(item.pictures, key=lambda shown: rank(f"{item.item_id} {shown.seed} {shown.change}"))

    def _raters_of(self, rater: Rater) -> dict[str, int]:
        """By prompt, how many others voted on it."""
        found: dict[str, int] = defaultdict(int)
        for other in self._raters.values():
            if other is not rater:
                for prompt_id in other.file.prompts:
                    found[prompt_id] += 1
        return found

    def _rank(self, rater: Rater) -> Rank:
        return lambda text: int.from_bytes(self._mac(f"rank/{rater.file.rater_id}/{text}")[:8], "big")

    def _token(self, rater: Rater, text: str) -> str:
        return self._mac(f"token/{rater.file.rater_id}/{text}").hex()[:32]

    def _mac(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(), hashlib.sha256)

    def _rater(self, file: RaterFile) -> Rater:
        secret = self._mac(f"link/{file.rater_id}").hex()[:32]
        return Rater(file=file, link=f"{file.rater_id}-{secret}")

    def _found(self) -> list[Rater]:
        files = [RaterFile.open_file(path) for path in sorted(self._raters_folder.glob("*.jsonl"))]
        return [self._rater(file) for file in files if file is not None]


def _is_current(rater: Rater, given: dict[str, Any]) -> bool:
    if type(given.get("serial")) is not int:
        raise Refused(f"serial: {given.get('serial')!r} is not a number")
    return given["serial"] == rater.serial


def _seconds(given: object) -> float | None:
    """As the page measured; nothing is refused for it."""
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= MAX_SECONDS:
        return None
    return round(float(given), 3)


def _name(given: object) -> str:
    if not isinstance(given, str):
        raise Refused(f"name: {type(given).__name__} is no text")
    name = " ".join("".join(c if c.isprintable() else " " for c in given).split())
    if not 1 <= len(name) <= MAX_NAME:
        raise Refused(f"name: {len(name)} characters, 1 to {MAX_NAME} are allowed")
    return name


def _locked(folder: Path) -> IO[str]:
    """A lock that ends with the process."""
    stream = (folder / "lock").open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ValueError(f"votes: {folder} is in use by another process") from None
    return stream


def _key(path: Path) -> bytes:
    """The secret behind links, orders and names of pictures; made once."""
    if not path.exists():
        write_atomic(path, secrets.token_hex(32) + "\n")
        os.chmod(path, 0o600)
    try:
        key = bytes.fromhex(path.read_text().strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise VotesError(f"votes: {path} is not 64 hexadecimal digits")
    return key
