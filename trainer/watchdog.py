"""Finding the rank that hangs: without this, the others would wait for it in an exchange, for hours."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.distributed import Ranks
from trainer.endings import HUNG

BEAT_S = 1.0
SHORTEST_S = 3.0

# In the order in which a step goes through them. Ranks wait for one another from "backward" on.
PHASES = ("batch", "forward", "backward", "end")
LED = "first rank's work"  # evaluating and saving take their time: only whether its process lives is asked


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is: taking `step`, in `phase`."""

    step: int
    phase: str

    @property
    def order(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else len(PHASES)


@dataclass(kw_only=True)
class _Seen:
    text: str
    beat_s: float
    place: Place
    moved_s: float


class Watchdog:
    """Tells the other ranks where this one is, and ends this one when another neither lives nor moves for `limit_s`."""

    def __init__(self, ranks: Ranks, store: TCPStore, limit_s: float, *, name: str = "watchdog") -> None:
        """`store` is one that all ranks reach and that this watchdog alone uses here."""
        self.ranks = ranks
        self.limit_s = limit_s
        self.here = Place(step=0, phase=LED)
        self._store = store
        self._name = name
        self._seen: dict[int, _Seen] = {}
        self._done = threading.Event()

    def at(self, step: int, phase: str) -> None:
        """This rank begins `phase` of `step` (counted from 1)."""
        self.here = Place(step=step, phase=phase)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a `with` block."""
        self._tell(0)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        beat = 0
        while not self._done.wait(BEAT_S):
            beat += 1
            try:
                self._tell(beat)
                self._look(time.monotonic())
            except RuntimeError as error:  # the store is gone: torchrun has ended, and ends this rank
                if not self._done.is_set():
                    logging.warning("watchdog: the ranks' store does not answer (%s)", str(error).splitlines()[0])
                return
            said = self.verdict(time.monotonic())
            if said and not self._done.is_set():
                logging.error(said)
                os._exit(HUNG)  # the main thread waits in an exchange, which nothing interrupts

    def _tell(self, beat: int) -> None:
        self._store.set(f"{self._name}/{self.ranks.rank}", f"{beat} {self.here.step} {self.here.phase}")

    def _look(self, now: float) -> None:
        for rank in range(self.ranks.world):
            if rank not in self._seen and not self._store.check([f"{self._name}/{rank}"]):
                continue  # it has not come this far; the exchange that opens a run has its own time limit
            text = self._store.get(f"{self._name}/{rank}").decode()
            _, step, phase = text.split(" ", 2)
            self.saw(rank, text, Place(step=int(step), phase=phase), now)

    def saw(self, rank: int, text: str, place: Place, now: float) -> None:
        """Note what a rank says of itself."""
        before = self._seen.get(rank)
        if before is None:
            self._seen[rank] = _Seen(text=text, beat_s=now, place=place, moved_s=now)
            return
        if text != before.text:
            before.text, before.beat_s = text, now
        if place != before.place:
            before.place, before.moved_s = place, now

    def verdict(self, now: float) -> str:
        """Which ranks hang, in one line; empty: none.

        A rank hangs whose process is not heard of, or else, when no rank moves, the ranks that have come least far: all
        others are waiting for them.
        """
        silent = [rank for rank, seen in self._seen.items() if now - seen.beat_s > self.limit_s]
        if silent:
            return self._named(silent, now)
        if any(now - seen.moved_s <= self.limit_s or seen.place.phase == LED for seen in self._seen.values()):
            return ""
        least = min((seen.place.order for seen in self._seen.values()), default=(0, 0))
        return self._named([rank for rank, seen in self._seen.items() if seen.place.order == least], now)

    def _named(self, ranks: list[int], now: float) -> str:
        who = "rank " + ", ".join(map(str, ranks)) + (" has" if len(ranks) == 1 else " have")
        seen = self._seen[ranks[0]]
        where = f"step {seen.place.step}" + (f" ({seen.place.phase})" if seen.place.phase in PHASES else "")
        return f"{who} not finished {where} for {now - max(seen.moved_s, 0.0):.0f} s; this rank ends"


def open_watchdog(ranks: Ranks, limit_s: float, environment: Mapping[str, str]) -> Watchdog:
    """A watchdog over the store of torchrun, which outlives every rank.

    Raises:
        ValueError: the limit is too short for ranks that tell of themselves once a second.
    """
    if limit_s < SHORTEST_S:
        raise ValueError(f"--hang-timeout: {limit_s} is not at least {SHORTEST_S:g} s")
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit_s))
    return Watchdog(ranks, store, limit_s, name=f"watchdog-{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}")
