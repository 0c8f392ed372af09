"""Callers of all kinds, so that every figure moves: some draw, some look up, some change pairs, some ask for what cannot be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from client import NO_RETRY, Client, GenerationFailed, RetrievalFailed, StageOverrides
from client.message_fields import FieldError
from client.retrieval_types import Lookup, Pair
from deploy.local.knowledge_base import NAME

DEADLINE_S = 120.0
SQUARE = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="#%06x"/></svg>'
REFUSED = (GenerationFailed, RetrievalFailed, FieldError)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the callers ask.

    Attributes:
        steps: of each stage, by its size: small ones draw soon.
        callers: of each generator.
        methods: of lookups.
        prompts: what is asked for.
        pause_s: mean time between an answer and the next question.
    """

    steps: dict[int, int]
    callers: tuple[int, int]
    methods: Sequence[str]
    prompts: Sequence[str]
    pause_s: float


class Caller:
    """One of them: draws in its own thread until told to stop."""

    def __init__(self, generator: str, retrieval: str, mix: Mix, seed: int) -> None:
        self._client = Client(generator, retrieval=retrieval, retry=NO_RETRY)
        self._mix, self._rng = mix, random.Random(seed)

    def run(self, over: threading.Event) -> None:
        """Ask for each kind of thing, then for one at random after the other, whatever becomes of it."""
        kinds, weights = zip(*self._kinds(), strict=True)
        due = list(kinds)
        with self._client:
            while not over.wait(self._rng.expovariate(1 / self._mix.pause_s)):
                kind = due.pop() if due else self._rng.choices(kinds, weights)[0]
                with suppress(*REFUSED):  # what was refused or failed is in the figures
                    kind()

    def _kinds(self) -> list[tuple[Callable[[], object], float]]:
        return [
            (lambda: self._draw(64), 6),
            (lambda: self._draw(64, preview_every=1, priority="high"), 2),
            (lambda: self._draw(64, num_pictures=2, priority="low"), 2),
            (lambda: self._draw(256), 2),
            (lambda: self._draw(1024), 0.7),
            (lambda: self._draw(65), 0.3),  # a size that there is not
            (lambda: self._draw(64, timeout_s=0.001), 0.5),
            (self._leave, 0.5),
            (self._look_up, 10),
            (self._change, 0.5),
        ]

    def _draw(self, size: int, *, timeout_s: float = DEADLINE_S, **knobs: Any) -> None:
        stages = tuple(StageOverrides(stage=s, steps=n) for s, n in self._mix.steps.items() if s <= size)
        self._client.generate(self._prompt(), stop_at=size, stages=stages, timeout_s=timeout_s, **knobs)

    def _leave(self) -> None:
        with closing(self._client.events(self._prompt(), stop_at=64, timeout_s=DEADLINE_S)) as events:
            next(events)

    def _look_up(self) -> None:
        for method in self._mix.methods:
            self._client.knowledge_bases.retrieve(
                Lookup(prompt=self._prompt(), k=3, knowledge_base=NAME, method=method)
            )

    def _change(self) -> None:
        number = self._rng.randrange(1 << 24)
        pair = Pair(pair_id=f"square-{number}", caption="a plain square", image=SQUARE % number, entity="square")
        list(self._client.knowledge_bases.upsert(NAME, [pair]))

    def _prompt(self) -> str:
        return self._rng.choice(self._mix.prompts)


@contextmanager
def asked(generators: Sequence[str], retrieval: str, mix: Mix) -> Iterator[None]:
    """Both generators are asked, by so many callers each, for as long as the block lasts."""
    over = threading.Event()
    callers = [
        Caller(address, retrieval, mix, seed=100 * which + number)
        for which, address in enumerate(generators)
        for number in range(mix.callers[which])
    ]
    threads = [threading.Thread(target=caller.run, args=(over,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
