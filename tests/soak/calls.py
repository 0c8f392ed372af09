"""The callers of a soak: who asks for what, how each call may end, and how it ended."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from client.generator import (
    Accepted,
    Event,
    GenerationFailed,
    GenerationRequest,
    GeneratorClient,
    Image,
    Reference,
    StageOverrides,
    StepDone,
)
from client.retry import NO_RETRY, RetryPolicy
from common.images import decode_rgb
from deploy.local.children import ROOT
from tests.soak.stack import kill

DEADLINE_S = 120.0
SLACK_S = 5.0  # of a busy machine, between a deadline and the moment at which a caller's thread hears of it
MAX_DIFFERENCE = 1  # of 255: another batch rounds otherwise
PATIENT = RetryPolicy(max_attempts=1000, max_backoff_s=1.0)
KINDS = {
    "ok": 0.36,
    "joined": 0.1,
    "cancel": 0.16,
    "deadline": 0.12,
    "killed": 0.04,
    "invalid": 0.16,
    "oversized": 0.06,
}
"""Shares of the calls."""

_LEFT, _DRAWN, _DEAD = "LEFT", "OK", "KILLED"
_ENDS = {
    "ok": {_DRAWN},
    "struck": {_DRAWN},
    "joined": {_DRAWN},
    "cancel": {_LEFT, _DRAWN},
    "deadline": {"DEADLINE_EXCEEDED", _DRAWN},
    "killed": {_DEAD},
    "invalid": {"INVALID_ARGUMENT"},
    "oversized": {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"},
}
"""How a call may end while everything runs."""
_IN_OUTAGE = {"UNAVAILABLE", "DEADLINE_EXCEEDED"}
"""And beside that, where something it needs is away at some time of it."""


def _short(steps: dict[int, int], **changes: object) -> GenerationRequest:
    stages = tuple(StageOverrides(stage=size, steps=count) for size, count in steps.items())
    return replace(GenerationRequest(stop_at=max(steps), stages=stages), **changes)  # pyright: ignore[reportArgumentType]


ASKED = (
    _short({64: 30}, prompt="a guide dog, noto style", seed=1),
    _short({64: 10}, prompt="a red apple, twemoji style", seed=2, num_pictures=2),
    _short({64: 6, 256: 10}, prompt="a steam locomotive", seed=3, without_neighbors=True),
    _short({64: 6, 256: 6}, prompt="an old oak tree, on a red background", seed=4),
    _short({64: 4, 256: 2, 1024: 2}, prompt="a guide dog, openmoji style", seed=5),
)
"""What is asked for; its pictures are known from the start."""

INVALID = (
    replace(ASKED[0], prompt=""),
    replace(ASKED[0], stages=(StageOverrides(stage=64, steps=5000),)),
    replace(ASKED[0], stop_at=65),
    replace(ASKED[0], request_id="7"),
    replace(ASKED[0], references=(Reference(image=b"no picture", caption="x"),)),
    replace(ASKED[0], k=1000),
)
OVERSIZED = (
    replace(ASKED[0], prompt="x" * 100_000),
    replace(ASKED[0], num_pictures=9),
    replace(ASKED[0], references=(Reference(image=b"\x89PNG" + bytes(5 << 20), caption="large"),)),
    replace(ASKED[0], references=(Reference(image=bytes(34 << 20), caption="too large for a message"),)),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended.

    Attributes:
        code: OK, LEFT, KILLED, or the name of a gRPC status.
        difference: of the pictures from the known ones, in 255ths; None: there were none.
        is_accepted: whether the service had taken it.
    """

    kind: str
    code: str
    started: float
    ended: float
    deadline_s: float
    reason: str = ""
    difference: int | None = None
    is_same: bool = False
    is_accepted: bool = False

    def unexplained(self, outages: Sequence[tuple[float, float]]) -> str:
        """Why this should not have happened; empty where it may."""
        took_s = self.ended - self.started
        if took_s > self.deadline_s + SLACK_S:
            return f"{took_s:.1f} s with a deadline of {self.deadline_s:g} s"
        if self.difference is not None and self.difference > MAX_DIFFERENCE:
            return f"the picture differs by {self.difference}/255"
        is_away = any(start <= self.ended and self.started <= end for start, end in outages)
        if self.code in _ENDS[self.kind] or (is_away and self.code in _IN_OUTAGE):
            return ""
        return f"{self.code}: {self.reason}"


class Callers:
    """Asks, and keeps how it ended."""

    def __init__(self, address: str, rng: random.Random) -> None:
        """First `expect` what is asked for, before anybody else asks."""
        self.outcomes: list[Outcome] = []
        self._address = address
        self._rng = rng
        self._hasty = GeneratorClient(address, retry=NO_RETRY)
        self._patient = GeneratorClient(address, retry=PATIENT)
        self._known: dict[GenerationRequest, list[bytes]] = {}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def expect(self, requests: Sequence[GenerationRequest]) -> None:
        """Draw what these have to look like from now on."""
        for request in requests:
            self._known[request] = [
                event.image
                for event in self._patient.generate(request, timeout_s=DEADLINE_S)
                if isinstance(event, Image)
            ]

    def start(self, count: int) -> None:
        """So many callers at once, each with chances of its own."""
        for number in range(count):
            rng = random.Random(self._rng.random())
            self._threads.append(
                threading.Thread(target=self._keep_calling, args=(rng,), name=f"caller {number}", daemon=True)
            )
            self._threads[-1].start()

    def stop(self) -> list[str]:
        """Wait for the calls under way; gives those that hang."""
        self._over.set()
        give_up = time.monotonic() + DEADLINE_S + 2 * SLACK_S
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def close(self) -> None:
        """End the connections."""
        self._hasty.close()
        self._patient.close()

    def _keep_calling(self, rng: random.Random) -> None:
        while not self._over.is_set():
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            outcome = getattr(self, f"_{kind}")(rng)
            if outcome.code in _IN_OUTAGE:
                self._over.wait(0.3)

    def draw(
        self,
        kind: str,
        request: GenerationRequest,
        *,
        deadline_s: float = DEADLINE_S,
        patient: bool = True,
        on_event: Callable[[Event], object] = lambda event: None,
    ) -> Outcome:
        """One call to its end; `on_event` leaves it by raising StopIteration."""
        started, pictures, code, reason, accepted = time.monotonic(), [], _DRAWN, "", False
        client = self._patient if patient else self._hasty
        try:
            with closing(client.generate(request, timeout_s=deadline_s)) as events:
                for event in events:
                    accepted = accepted or isinstance(event, Accepted)
                    if isinstance(event, Image):
                        pictures.append(event.image)
                    on_event(event)
        except GenerationFailed as error:
            code, reason = error.code, error.description
        except StopIteration:
            code = _LEFT
        ended = time.monotonic()  # a comparison of pictures is nothing that the service does
        difference, is_same = None, False
        if code == _DRAWN:
            known = self._known[replace(request, request_id="")]
            is_same = known == pictures
            difference = 0 if is_same else _difference(known, pictures)
        outcome = Outcome(
            kind=kind,
            code=code,
            started=started,
            ended=ended,
            deadline_s=deadline_s,
            reason=reason,
            difference=difference,
            is_same=is_same,
            is_accepted=accepted,
        )
        self.outcomes.append(outcome)
        return outcome

    def _ok(self, rng: random.Random) -> Outcome:
        return self.draw("ok", rng.choice(ASKED), patient=rng.random() < 0.7)

    def _joined(self, rng: random.Random) -> Outcome:
        request = replace(rng.choice(ASKED), request_id=str(uuid.UUID(int=rng.getrandbits(128), version=4)))
        with ThreadPoolExecutor(1) as other:
            beside = other.submit(self.draw, "joined", request)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.5))
            self.draw("joined", request)
            return beside.result()

    def _cancel(self, rng: random.Random) -> Outcome:
        left = rng.randrange(25)

        def leave(event: Event) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise StopIteration

        return self.draw("cancel", rng.choice(ASKED), on_event=leave)

    def _deadline(self, rng: random.Random) -> Outcome:
        return self.draw("deadline", rng.choice(ASKED), deadline_s=rng.choice((0.05, 0.2, 0.5, 1.0)), patient=False)

    def _invalid(self, rng: random.Random) -> Outcome:
        return self.draw("invalid", rng.choice(INVALID), patient=False)

    def _oversized(self, rng: random.Random) -> Outcome:
        return self.draw("oversized", rng.choice(OVERSIZED), patient=False)

    def _killed(self, rng: random.Random) -> Outcome:
        started = time.monotonic()
        command = [sys.executable, "-m", "tests.soak.doomed_caller", self._address, str(rng.getrandbits(32))]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONPATH": ":".join(sys.path)}
        ) as caller:
            assert caller.stdout is not None
            said = caller.stdout.readline()
            kill(caller.pid)
        ended = time.monotonic()
        # One that ends before it has begun has met an outage.
        code = _DEAD if said else "UNAVAILABLE"
        outcome = Outcome(kind="killed", code=code, started=started, ended=ended, deadline_s=DEADLINE_S)
        self.outcomes.append(outcome)
        return outcome


def _difference(known: Sequence[bytes], drawn: Sequence[bytes]) -> int:
    """Of pictures from the known ones, the largest of a channel; 255 where some are missing."""
    if len(known) != len(drawn):
        return 255
    pairs = zip(known, drawn, strict=True)
    return max(int(np.abs(decode_rgb(a).astype(int) - decode_rgb(b).astype(int)).max()) for a, b in pairs)


def in_stage(size: int, seed: int = 9) -> GenerationRequest:
    """What takes a while in one stage."""
    steps = {64: {64: 300}, 256: {64: 4, 256: 120}, 1024: {64: 4, 256: 2, 1024: 12}}[size]
    return _short(steps, prompt="a guide dog, noto style", seed=seed)


def is_in(event: Event, size: int) -> bool:
    """Whether a picture moves in a stage."""
    return isinstance(event, StepDone) and event.stage == size and event.step > 2
