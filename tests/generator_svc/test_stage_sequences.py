"""A stage under iterative sequences, without Triton: who moves in whose turn, and how lives end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from common.service.errors import DeadlineExceeded, ResourceExhausted, ServiceError, Unavailable
from common.stages import stage
from generator_svc.compiled_unet import Padded
from generator_svc.stage_engine import StageEngine
from generator_svc.stage_sequences import Sequences, Turn
from generator_svc.stage_tensors import PATIENCE_S, ModelCard, StageRequest, StageResponse
from tests.generator_svc.test_triton_conformance import ORDERS, plans, text_inputs
from tests.generator_svc.tiny_stack import TINY_64, tiny_unet

CARD = ModelCard(
    stage=64,
    unet=TINY_64,
    sha256="",
    version="1",
    parameters=1,
    trained={},
    max_live_bytes=1,
    element_bytes=4,
    pass_s=0.1,
)


@dataclass(eq=False)
class Caller:
    """A request, and what it was told."""

    number: int
    request: StageRequest
    name: str = ""
    timeout_s: float | None = None
    is_gone: bool = False
    has_started: bool = False
    said: list[StageResponse] = field(default_factory=list)
    error: ServiceError | None = None
    is_done: bool = False

    def turn(self) -> Turn:
        is_start, self.has_started = not self.has_started, True
        return Turn(
            sequence=self.number,
            name=self.name,
            is_start=is_start,
            read=lambda: self.request,
            is_cancelled=lambda: self.is_gone,
            timeout_s=self.timeout_s,
            send=self._hear,
            send_error=self._hear_error,
        )

    def _hear(self, response: StageResponse, is_last: bool) -> None:
        assert not self.is_done, "told after its end"
        self.said.append(response)
        self.is_done = is_last

    def _hear_error(self, error: ServiceError) -> None:
        assert not self.is_done, "told after its end"
        self.error, self.is_done = error, True


class Desk:
    """Sequences with a clock of their own, over a tiny stage."""

    def __init__(self, **settings: Any) -> None:
        self.batches: list[int] = []
        self.now = 0.0
        given = {"max_batch": 8, "max_live_bytes": 1 << 26} | settings
        self.unet = tiny_unet(64)
        self.engine = StageEngine(
            stage(64), self.unet, on_batch=lambda count, seconds: self.batches.append(count), **given
        )
        self.sequences = Sequences(self.engine, CARD, idle_s=10.0, clock=lambda: self.now)

    def execute(self, *callers: Caller) -> None:
        again = self.sequences.execute([caller.turn() for caller in callers])
        assert again == [not caller.is_done for caller in callers]

    @property
    def is_empty(self) -> bool:
        return self.sequences.num_live == 0 and self.engine.room.taken == 0


def make_caller(number: int, steps: int = 5, **options: Any) -> Caller:
    return Caller(number, StageRequest(plans=plans(64, number, steps), inputs=text_inputs(number, 2)), **options)


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_batches_are_full_however_requests_are_split(desk: Desk) -> None:
    a, b, c = (make_caller(i) for i in range(3))
    desk.execute(a, b)
    while not (a.is_done and b.is_done and c.is_done):
        desk.execute(*(caller for caller in (c,) if not caller.is_done))
        desk.execute(*(caller for caller in (a, b) if not caller.is_done))
    assert desk.batches[0] == 2 and sum(desk.batches) == 15 and len(desk.batches) <= 7, desk.batches
    for caller in (a, b, c):
        assert [response.steps for response in caller.said] == [(step,) for step in range(1, 6)]
        assert [response.pictures is not None for response in caller.said] == [False] * 4 + [True]
    assert desk.is_empty


def test_how_requests_are_split_changes_no_picture() -> None:
    together, split = Desk(), Desk()
    first, second = ([Caller(i, StageRequest(plans=p, inputs=g)) for i, (p, g) in enumerate(ORDERS[64])] for _ in "ab")
    while pending := [caller for caller in first if not caller.is_done]:
        together.execute(*pending)
    rng = np.random.default_rng(1)
    while pending := [caller for caller in second if not caller.is_done]:
        split.execute(*(caller for caller in pending if rng.random() < 0.4))
    for one, other in zip(first, second, strict=True):
        drawn, again = one.said[-1].pictures, other.said[-1].pictures
        assert drawn is not None and again is not None and np.abs(drawn - again).max() < 1e-5
        assert [r.steps for r in one.said] == [r.steps for r in other.said]
    assert together.is_empty and split.is_empty


def test_none_gets_more_than_a_round_ahead_of_what_it_was_told(desk: Desk) -> None:
    silent, busy = make_caller(1, 50), make_caller(2, 10)
    desk.execute(silent)
    for _ in range(9):
        desk.execute(busy)
    assert desk.batches.count(2) == 1, "a request whose turn does not come is moved once"
    desk.execute(silent)
    assert [response.steps for response in silent.said] == [(1,), (2,), (3,)]


def withdraw(number: int, name: str) -> Caller:
    """What whoever leaves the request of this name sends."""
    return Caller(number, StageRequest(plans=(), inputs=None), name=name)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_withdrawn_request_takes_no_further_step_and_ends_without_an_error(desk: Desk, is_first: bool) -> None:
    left, other = make_caller(1, 50, name="left"), make_caller(2, 5, name="other")
    desk.execute(left, other)
    farewell = withdraw(3, "left")
    desk.execute(*((farewell, left, other) if is_first else (left, other, farewell)))
    assert desk.batches == [2, 1]
    assert left.is_done and left.error is None and left.said[-1] == StageResponse()
    assert farewell.is_done and farewell.said[0].model is not None
    assert desk.sequences.num_live == 1
    while not other.is_done:
        desk.execute(other)
    assert other.said[-1].pictures is not None and desk.is_empty


def test_a_request_that_is_withdrawn_in_the_turn_of_another_frees_its_room_at_once(desk: Desk) -> None:
    left = make_caller(1, 50, name="left")
    desk.execute(left)
    desk.execute(withdraw(2, "left"))
    assert desk.engine.room.taken == 0 and desk.batches == [1]
    desk.execute(left)
    assert left.said[-1] == StageResponse() and desk.is_empty


def test_a_request_that_is_withdrawn_on_its_way_does_not_begin(desk: Desk) -> None:
    desk.execute(withdraw(1, "late"))
    late, other, unnamed = make_caller(2, 5, name="late"), make_caller(3, 5, name="other"), make_caller(4, 5)
    desk.execute(late, other, unnamed, withdraw(5, ""))
    assert late.is_done and late.error is None and late.said == [StageResponse()]
    assert desk.batches == [2] and desk.sequences.num_live == 2


def test_a_long_round_shows_that_it_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches of a second each."""
    order = StageRequest(plans=plans(64, 1, 2, num_pictures=20), inputs=text_inputs(1, 2))
    many, other = Caller(1, order), make_caller(2, 1)
    note = desk.engine._note_pass  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(desk.engine, "_note_pass", lambda n, s: (setattr(desk, "now", desk.now + 1), note(n, s)))
    desk.execute(many, other)
    assert [response.steps for response in many.said] == [(), (), (), (1,) * 20]
    assert other.said[-1].pictures is not None and len(other.said) <= 3


def test_a_long_step_shows_that_the_process_lives_until_it_takes_too_long(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 30 s; the thread that beats comes every quarter of a second. Whose turn it is not hears it as well."""
    waiting, other = make_caller(1, 5), make_caller(2, 5)
    desk.engine.single_s = 0.01
    desk.execute(waiting)
    monkeypatch.setattr(desk.engine, "_step", lambda batch: [hang() for _ in range(120)])

    def hang() -> None:
        desk.now += 0.25
        desk.sequences.beat()

    desk.sequences.execute([other.turn()])
    for caller, told in ((waiting, [(1,)]), (other, [])):
        assert [response.steps for response in caller.said[: len(told)]] == told
        beats = caller.said[len(told) :]
        assert beats == [StageResponse()] * len(beats), "it says nothing else"
        assert 2 * PATIENCE_S - 2 <= len(beats) <= 2 * PATIENCE_S, "a network that hangs is not vouched for"


def ask_card(desk: Desk, number: int) -> Caller:
    caller = Caller(number, StageRequest(plans=(), inputs=None))
    desk.execute(caller)
    return caller


def test_a_canary_runs_the_network_where_nothing_else_has(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.engine.warm_up([1])
    monkeypatch.setattr("generator_svc.stage_engine.CHEAP_S", 60.0)
    for parameter in desk.unet.parameters():
        parameter.data.fill_(torch.nan)
    assert ask_card(desk, 1).said[-1].model is not None, "it has just run"
    monkeypatch.setattr("generator_svc.stage_engine.PROVEN_S", 0.0)
    broken = ask_card(desk, 2)
    assert broken.error is not None and "stage 64 failed (ValueError)" in broken.error.description and not broken.said
    monkeypatch.setattr("generator_svc.stage_engine.CHEAP_S", 0.0)
    assert ask_card(desk, 3).said[-1].model is not None, "a pass is too dear"
    assert not desk.batches, "it counts as no work"


def test_a_gone_caller_is_freed_in_the_turn_of_another(desk: Desk) -> None:
    gone, other = make_caller(1, 50), make_caller(2, 5)
    desk.execute(gone, other)
    gone.is_gone = True  # Triton drops its request without a word
    desk.execute(other)
    assert desk.sequences.num_live == 1 and desk.batches == [2, 1]
    other.is_gone = True
    desk.sequences.sweep()
    assert desk.is_empty


def test_a_deadline_frees_at_once_and_is_told_at_the_next_turn(desk: Desk) -> None:
    late = make_caller(1, 50, timeout_s=3.0)
    desk.execute(late)
    desk.now = 3.5
    desk.sequences.sweep()
    assert desk.engine.room.taken == 0 and not late.is_done
    desk.execute(late)
    assert isinstance(late.error, DeadlineExceeded) and desk.batches == [1] and desk.is_empty


def test_an_idle_request_is_let_go(desk: Desk) -> None:
    idle, busy = make_caller(1, 50), make_caller(2, 50)
    desk.execute(idle, busy)
    for desk.now in (5.0, 10.0):
        desk.execute(busy)
    desk.now = 10.5
    desk.sequences.sweep()
    assert desk.sequences.num_live == 1
    desk.execute(idle)
    assert isinstance(idle.error, Unavailable) and idle.error.reason == "STATE_GONE"


def test_room_is_counted_and_given_back() -> None:
    one = make_caller(1)
    needed = Desk().engine.needed_bytes(num_pictures=1, num_tokens=6, num_neighbors=2)
    desk = Desk(max_live_bytes=2 * needed + needed // 2)
    others = [make_caller(i, 2) for i in (2, 3)]
    desk.execute(one, *others)
    assert isinstance(others[1].error, ResourceExhausted) and desk.engine.room.taken == 2 * needed
    desk.execute(others[0])
    assert others[0].is_done and desk.engine.room.taken == needed
    late = make_caller(4)
    desk.execute(late, one)
    assert late.error is None


def test_what_fails_ends_its_own_request_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = make_caller(1), make_caller(2)
    begin = desk.engine.begin

    def failing(given: Any, inputs: Any) -> Any:
        if given[0].seed == 2:
            raise torch.OutOfMemoryError("of the device")
        return begin(given, inputs)

    monkeypatch.setattr(desk.engine, "begin", failing)
    desk.execute(good, bad)
    assert (
        bad.error is not None and "OutOfMemoryError" in bad.error.description and "device" not in bad.error.description
    )
    while not good.is_done:
        desk.execute(good)
    assert good.error is None and desk.is_empty


def test_a_failing_pass_ends_those_in_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    first, later = make_caller(1), make_caller(2)
    desk.execute(first)
    unet: Any = desk.engine._unet
    forward: Callable[..., Any] = unet.forward

    def failing(*given: Any) -> Any:
        raise torch.OutOfMemoryError("of the device")

    monkeypatch.setattr(unet, "forward", failing)
    desk.execute(first)
    assert first.error is not None and desk.is_empty
    monkeypatch.setattr(unet, "forward", forward)
    while not later.is_done:
        desk.execute(later)
    assert later.error is None


def test_padding_for_a_compiler_changes_no_picture() -> None:
    shapes: set[tuple[int, ...]] = set()
    desk, padded = Desk(), Desk(encodes_in_steps=False)
    unet: Any = padded.engine._unet
    forward = unet.forward

    def seen(x_t: Any, log_snr: Any, condition: Any, *, bold: bool = False) -> Any:
        shapes.add((x_t.shape[0], condition.text_mask.shape[1], condition.neighbor_mask.shape[1]))
        assert bold, "sampling is"
        return forward(x_t, log_snr, condition, bold=bold)

    unet.forward = Padded(seen, rows=[4, 8, 12, 24])
    for place in (desk, padded):
        callers = [Caller(i, StageRequest(plans=p, inputs=g)) for i, (p, g) in enumerate(ORDERS[64])]
        while pending := [caller for caller in callers if not caller.is_done]:
            place.execute(*pending)
        drawn = [caller.said[-1].pictures for caller in callers]
        if place is desk:
            plain = drawn
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(plain, drawn, strict=True))  # pyright: ignore
    assert {rows for rows, _, _ in shapes} <= {4, 8, 12, 24} and {tokens for _, tokens, _ in shapes} == {16}
    assert {count for _, _, count in shapes} <= {0, 1, 2, 4}
