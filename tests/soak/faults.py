"""What breaks in a soak: each fault strikes while a picture is in a certain stage, and is over when health is back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from client.generator import Event, GenerationRequest
from tests.soak.calls import Callers, in_stage, is_in
from tests.soak.stack import SoakStack, kill
from tests.soak.watching import HealthWatch

STRIKE_S = 60.0
NOTICED_S = 30.0
BACK_S = 180.0
AFTER_S = 2.0  # until callers that were told to come back have done so
SIZES = (64, 256, 1024)
KINDS = ("stub", "retrieval", "tritonserver", "text encoder", "triton")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is killed, and the stage in which a picture is then."""

    kind: str
    size: int

    def __str__(self) -> str:
        return f"{self.kind} killed in stage {self.size}"

    @property
    def dependency(self) -> str:
        """What does not answer then."""
        return "retrieval" if self.kind == "retrieval" else "triton"

    def strike(self, stack: SoakStack) -> bool:
        """Gives whether there was anything to kill."""
        pid: Callable[[], int] = {
            "stub": lambda: stack.stub(f"unet_{self.size}"),
            "text encoder": lambda: stack.stub("text_encoder"),
            "tritonserver": stack.tritonserver,
            "triton": lambda: stack.pid("triton"),
            "retrieval": lambda: stack.pid("retrieval"),
        }[self.kind]
        return kill(pid())


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What a fault did.

    Attributes:
        at, back: moments of time.monotonic().
        noticed_s: until the generator's health said so.
        restarted_s: until what was killed served again.
        recovered_s: from then until the generator's health said so.
        picture: how the call ended that was under way.
    """

    fault: Fault
    at: float
    back: float
    noticed_s: float
    restarted_s: float
    recovered_s: float
    picture: str

    def __str__(self) -> str:
        return (
            f"{self.fault}: NOT_SERVING after {self.noticed_s:.1f} s, restarted after {self.restarted_s:.1f} s,"
            f" SERVING {self.recovered_s:.1f} s later; its picture: {self.picture}"
        )


def schedule(rng: random.Random) -> Iterator[Fault]:
    """Every kind in every stage, the kinds by turns."""
    while True:
        sizes = {kind: rng.sample(SIZES, len(SIZES)) for kind in KINDS}
        for turn in range(len(SIZES)):
            for kind in KINDS:
                yield Fault(kind=kind, size=sizes[kind][turn])


def all_pictures() -> list[GenerationRequest]:
    """Those that are under way when a fault strikes."""
    return [in_stage(size) for size in SIZES]


def inflict(fault: Fault, stack: SoakStack, callers: Callers, watches: dict[str, HealthWatch]) -> Struck:
    """Strike in the middle of a picture, and wait until all is well and the picture has ended."""
    is_there = threading.Event()

    def on_event(event: Event) -> None:
        if is_in(event, fault.size):
            is_there.set()

    outcome = []
    drawing = threading.Thread(
        target=lambda: outcome.append(callers.draw("struck", in_stage(fault.size), on_event=on_event)), daemon=True
    )
    drawing.start()
    assert is_there.wait(STRIKE_S), f"{fault}: no picture has come so far"
    at = time.monotonic()
    assert fault.strike(stack), f"{fault}: nothing to kill"
    noticed = _until(lambda: watches["generator"].when(False, after=at), NOTICED_S, f"{fault}: noticed")
    # A Triton without an interpreter says that it serves until it is started anew.
    away = _until(lambda: watches[fault.dependency].when(False, after=at), BACK_S, f"{fault}: away")
    restarted = _until(lambda: watches[fault.dependency].when(True, after=away), BACK_S, f"{fault}: restarted")
    back = _until(lambda: watches["generator"].when(True, after=noticed), BACK_S, f"{fault}: back")
    drawing.join(BACK_S)
    assert outcome, f"{fault}: its picture hangs"
    return Struck(
        fault=fault,
        at=at,
        back=back + AFTER_S,
        noticed_s=noticed - at,
        restarted_s=restarted - at,
        recovered_s=max(0.0, back - restarted),
        picture=outcome[0].code,
    )


def _until(moment: Callable[[], float | None], timeout_s: float, what: str) -> float:
    give_up = time.monotonic() + timeout_s
    while (found := moment()) is None:
        assert time.monotonic() < give_up, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)
    return found
