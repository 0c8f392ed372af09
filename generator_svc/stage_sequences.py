"""A stage's engine under Triton's iterative sequences: what an execution does for the requests that it was handed.

Triton hands over some of the live requests at a time, whichever happened to wait together. A round nevertheless moves
every live trajectory: what a request's pictures did in a turn of others is told in its own next turn, and none gets
more than one round ahead of what was told. So batches are full however the scheduler splits the requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common.service.errors import DeadlineExceeded, ServiceError, Unavailable
from generator_svc.stage_engine import Job, StageEngine, Step
from generator_svc.stage_inputs import StageInputs
from generator_svc.stage_tensors import PATIENCE_PASSES, PATIENCE_S, ModelCard, StageRequest, StageResponse

BEAT_S = 0.5
MAX_WITHDRAWN = 1024  # names that are kept of requests which were withdrawn before they came

log = logging.getLogger(__name__)


class _Withdrawn(Exception):
    """What ends a job for which nobody waits: its stream ends without an error."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A request in an execution.

    Attributes:
        sequence: which request it is; the same at each of its turns.
        name: the request id that its caller gave it; empty: none.
        is_start: whether this is its first turn.
        read: its content.
        is_cancelled: whether nobody waits any more; may be asked after the turn, and on another thread.
        timeout_s: seconds from the start to its deadline; None: there is none.
        send: sends a response, the last one or not.
        send_error: ends the stream with an error.
    """

    sequence: int
    name: str
    is_start: bool
    read: Callable[[], StageRequest]
    is_cancelled: Callable[[], bool]
    timeout_s: float | None
    send: Callable[[StageResponse, bool], object]
    send_error: Callable[[ServiceError], object]


@dataclass(kw_only=True, eq=False)
class _Live:
    name: str
    job: Job
    num_bytes: int
    preview_every: int
    deadline: float | None
    is_cancelled: Callable[[], bool]
    send: Callable[[StageResponse, bool], object]
    last_turn: float
    moved_at: float
    told_at: float
    steps: list[int]


class Sequences:
    """The live requests of one stage. Safe to use from an execution and a sweeping thread."""

    def __init__(
        self, engine: StageEngine, card: ModelCard, *, idle_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`idle_s`: seconds without a turn after which a request's state is let go."""
        self._engine = engine
        self._card = card
        self._idle_s = idle_s
        self._clock = clock
        self._live: dict[int, _Live] = {}
        self._withdrawn: deque[str] = deque(maxlen=MAX_WITHDRAWN)
        self._passed_at = 0.0
        self._lock = threading.Lock()  # of a whole round
        self._voice = threading.Lock()  # of who lives and what is sent: free while the network runs, so that `beat` can

    @property
    def num_live(self) -> int:
        """Requests whose state is kept."""
        return len(self._live)

    def execute(self, turns: Sequence[Turn]) -> list[bool]:
        """Begin what starts, move everything by a round, tell these requests. Whether each of them is to come again."""
        with self._lock:
            with self._voice:
                self._sweep({turn.sequence for turn in turns})
                for turn in turns:
                    self._enter(turn)
                    self._tell(turn)  # what it did in the turns of others; a finished picture waits for no round
                present = {turn.sequence for turn in turns if turn.sequence in self._live}
            if present:
                self._advance(present)
            with self._voice:
                for turn in turns:
                    self._tell(turn)
                now = self._clock()
                for sequence in present & self._live.keys():
                    self._live[sequence].last_turn = now
                return [turn.sequence in self._live for turn in turns]

    def sweep(self) -> None:
        """Let go of what is cancelled, past its deadline or idle: Triton drops cancelled requests without a word.

        In a round this does nothing: the round has done it.
        """
        if self._lock.acquire(blocking=False):
            try:
                with self._voice:
                    self._sweep(set())
            finally:
                self._lock.release()

    def beat(self) -> None:
        """Show who waits for a step that takes long that this process lives: an empty response every BEAT_S.

        To be called a few times in BEAT_S, on another thread than the executions'; these call it between passes. A network
        that hangs is to be found out: where no pass has ended for far longer than one takes, nothing is said.
        """
        with self._voice:
            now = self._clock()
            patience_s = max(PATIENCE_S, PATIENCE_PASSES * self._engine.full_pass_s)
            for live in self._live.values():
                is_due = not live.job.is_over and now - live.told_at >= BEAT_S
                if is_due and now - max(live.moved_at, self._passed_at) < patience_s:
                    live.told_at = now
                    live.send(StageResponse(), False)

    def _sweep(self, present: set[int]) -> None:
        """`present` are not asked whether they are cancelled: Triton hands over none that is, and each question costs."""
        now = self._clock()
        for sequence, live in list(self._live.items()):
            if sequence not in present and live.is_cancelled():
                self._drop(sequence)
            elif live.deadline is not None and now > live.deadline:
                self._fail(live, DeadlineExceeded(f"stage {self._card.stage}: the request's deadline has passed"))
            elif now - live.last_turn > self._idle_s:
                log.warning("stage %d: a request had no turn for %.0f s", self._card.stage, now - live.last_turn)
                self._drop(sequence)

    def _enter(self, turn: Turn) -> None:
        if turn.sequence in self._live and not turn.is_start:
            live = self._live[turn.sequence]
            live.is_cancelled, live.send = turn.is_cancelled, turn.send
            return
        if not turn.is_start:
            turn.send_error(Unavailable(f"stage {self._card.stage}: the request's state is gone", reason="STATE_GONE"))
            return
        try:
            self._begin(turn)
        except ServiceError as error:
            turn.send_error(error)
        except Exception as error:  # whatever it is, it ends this request alone
            log.exception("stage %d: a request could not begin", self._card.stage)
            turn.send_error(self._explained(error))

    def _begin(self, turn: Turn) -> None:
        request = turn.read()
        if request.inputs is None:
            self._withdraw(turn.name)
            if not turn.name:
                self._engine.prove()
            turn.send(StageResponse(model=replace(self._card, pass_s=self._engine.full_pass_s)), True)
            return
        if turn.name in self._withdrawn:
            turn.send(StageResponse(), True)
            return
        needed = self._engine.needed_bytes(
            num_pictures=len(request.plans),
            num_tokens=_num_tokens(request.inputs),
            num_neighbors=len(request.inputs.neighbors),
        )
        self._engine.room.take(needed, num_pictures=len(request.plans))
        try:
            job = self._engine.begin(request.plans, request.inputs)
        except BaseException:
            self._engine.room.give_back(needed)
            raise
        now = self._clock()
        self._live[turn.sequence] = _Live(
            name=turn.name,
            job=job,
            num_bytes=needed,
            preview_every=request.preview_every,
            deadline=None if turn.timeout_s is None else now + turn.timeout_s,
            is_cancelled=turn.is_cancelled,
            send=turn.send,
            last_turn=now,
            moved_at=now,
            told_at=now,
            steps=[0] * len(request.plans),
        )

    def _withdraw(self, name: str) -> None:
        """End the request of this name, if any, before its next step; one that is still on its way does not begin."""
        if not name:
            return
        named = [live for live in self._live.values() if live.name == name]
        for live in named:
            self._fail(live, _Withdrawn())
        if not named:
            self._withdrawn.append(name)

    def _after_batch(self) -> None:
        self._passed_at = self._clock()
        self.beat()

    def _advance(self, present: set[int]) -> None:
        moving = {
            live.job: live
            for sequence, live in self._live.items()
            if not live.job.is_over and (sequence in present or not live.job.moved)
        }

        def is_over(job: Job) -> bool:
            deadline = moving[job].deadline
            return job.is_over or (deadline is not None and self._clock() > deadline)

        self._engine.advance(list(moving), is_over=is_over, after_batch=self._after_batch)
        now = self._clock()
        for live in moving.values():
            if live.deadline is not None and now > live.deadline and not live.job.is_over:
                self._fail(live, DeadlineExceeded(f"stage {self._card.stage}: the request's deadline has passed"))

    def _tell(self, turn: Turn) -> None:
        """One response for each round in which a picture of the request moved; the end with the last of them."""
        live = self._live.get(turn.sequence)
        if live is None:
            return
        if live.job.error is not None:
            self._drop(turn.sequence)
            error = live.job.error
            if isinstance(error, _Withdrawn):
                turn.send(StageResponse(), True)
            else:
                turn.send_error(error if isinstance(error, ServiceError) else self._explained(error))
            return
        rounds = _rounds(live.job.take_moved())
        if rounds:
            live.moved_at = live.told_at = self._clock()
        for i, moved in enumerate(rounds):
            is_last = live.job.pictures is not None and i == len(rounds) - 1
            turn.send(self._response(live, moved, is_last), is_last)
            if is_last:
                self._drop(turn.sequence)

    def _response(self, live: _Live, moved: Sequence[Step], is_last: bool) -> StageResponse:
        previews: dict[int, np.ndarray] = {}
        for step in moved:
            live.steps[step.picture] = step.step
            if live.preview_every and step.step % live.preview_every == 0:
                previews[step.picture] = step.x0.cpu().numpy()
        return StageResponse(
            steps=tuple(live.steps),
            previews=previews,
            pictures=live.job.pictures if is_last else None,
            model=self._card if is_last else None,
        )

    def _fail(self, live: _Live, error: Exception) -> None:
        """Free what it keeps at once; the error is told at its next turn."""
        live.job.fail(error)
        self._engine.room.give_back(live.num_bytes)
        live.num_bytes = 0

    def _drop(self, sequence: int) -> None:
        self._engine.room.give_back(self._live.pop(sequence).num_bytes)

    def _explained(self, error: Exception) -> ServiceError:
        """What a caller may know of an error that is ours: its kind, not its text."""
        return ServiceError(f"stage {self._card.stage} failed ({type(error).__name__}); its log says more")


def _num_tokens(inputs: StageInputs) -> int:
    negative = 0 if inputs.negative_text_mask is None else len(inputs.negative_text_mask)
    return len(inputs.text_mask) + negative


def _rounds(moved: Sequence[Step]) -> list[list[Step]]:
    """Steps by the round in which they were taken: a picture moves once in each."""
    rounds: list[list[Step]] = []
    for step in moved:
        if not rounds or any(step.picture == other.picture for other in rounds[-1]):
            rounds.append([])
        rounds[-1].append(step)
    return rounds
