"""One drawing for however many calls have its id: who joins, who leaves, what is kept and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from common.service.errors import InvalidArgument, ResourceExhausted, Unavailable
from generator_svc.call import Call
from generator_svc.events import Event, StageStarted, StepDone
from generator_svc.idempotency import SharedDrawings

ID = "6f0d3a4e-7b2c-4c1e-9d52-0a6f1b8e3c77"
OTHER_ID = "00000000-0000-4000-8000-000000000001"


class Artist:
    """Draws when it is told to, and counts."""

    def __init__(self, steps: int = 3, preview: bytes = b"", *, error: Exception | None = None) -> None:
        self.steps, self.preview, self.error = steps, preview, error
        self.begun = self.ended = self.stopped = 0
        self.go_on = asyncio.Event()
        self.calls: list[Call] = []

    async def __call__(self, call: Call) -> AsyncGenerator[Event, None]:
        self.begun += 1
        self.calls.append(call)
        try:
            yield StageStarted(stage=64, steps=self.steps)
            for step in range(1, self.steps + 1):
                yield StepDone(stage=64, picture=0, step=step, steps=self.steps, preview_png=self.preview)
            await self.go_on.wait()
            if self.error:
                raise self.error
            yield StageStarted(stage=256, steps=self.steps)
            self.ended += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped += 1
            raise


def shared(**settings: Any) -> SharedDrawings:
    """Shared drawings that keep results for a minute."""
    return SharedDrawings(**({"kept_s": 60.0, "kept_bytes": 1 << 20} | settings))


async def listen(
    drawings: SharedDrawings, artist: Artist, request_id: str = ID, content: bytes = b"a", call: Call | None = None
) -> list[Event]:
    """All events of one call."""
    async with aclosing(drawings.draw(request_id, content, call or Call(), artist)) as events:
        return [event async for event in events]


def scene(play: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine."""
    asyncio.run(asyncio.wait_for(play(), 30))


async def settle() -> None:
    """Let everything that can happen happen."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_the_same_request_is_drawn_once_for_all_who_ask() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        first = asyncio.create_task(listen(drawings, artist))
        await settle()
        second = asyncio.create_task(listen(drawings, artist, ID.upper()))
        await settle()
        artist.go_on.set()
        heard = await asyncio.gather(first, second)
        assert heard[0] == heard[1] and len(heard[0]) == 5, "from the start, whoever came later"
        later = await listen(drawings, artist)
        assert later == [event for event in heard[0] if not isinstance(event, StepDone)]
        assert artist.begun == 1

    scene(play)


def test_other_content_is_refused_by_name() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        artist.go_on.set()
        await listen(drawings, artist)
        with pytest.raises(InvalidArgument) as caught:
            await listen(drawings, artist, content=b"b")
        assert caught.value.violations[0][0] == "request_id" and caught.value.reason == "REQUEST_ID_REUSED"
        assert await listen(drawings, artist, OTHER_ID, content=b"b")

    scene(play)


@pytest.mark.parametrize("bad", ["x", " ", "6f0d3a4e-7b2c-4c1e-9d52", ID + "0", "\0" * 36])
def test_an_id_that_is_no_uuid_is_refused(bad: str) -> None:
    async def play() -> None:
        with pytest.raises(InvalidArgument, match=r"request_id: .* is not a UUID"):
            await listen(shared(), Artist(), bad)

    scene(play)


def test_a_request_without_an_id_is_its_own() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        artist.go_on.set()
        both = [asyncio.create_task(listen(drawings, artist, "")) for _ in range(2)]
        assert [len(events) for events in await asyncio.gather(*both)] == [5, 5]
        assert artist.begun == 2 and drawings.held_bytes == 0

    scene(play)


def test_whoever_leaves_leaves_alone_and_the_last_one_ends_it() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        tasks = [asyncio.create_task(listen(drawings, artist)) for _ in range(3)]
        await settle()
        (call,) = artist.calls
        for task in tasks[:2]:
            task.cancel()
            await settle()
            assert artist.stopped == 0 and not call.is_cancelled()
        tasks[2].cancel()
        await settle()
        assert artist.stopped == 1 and artist.begun == 1 and call.is_cancelled()
        again = asyncio.create_task(listen(drawings, artist))
        await settle()
        assert artist.begun == 2, "what was stopped is begun anew"
        artist.go_on.set()
        assert len(await again) == 5

    scene(play)


def test_the_work_has_the_time_of_the_most_patient_caller() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        tasks = [asyncio.create_task(listen(drawings, artist, call=Call(time_remaining_s=lambda: 5.0)))]
        await settle()
        (call,) = artist.calls
        assert call.time_remaining_s() == 5.0
        tasks.append(asyncio.create_task(listen(drawings, artist, call=Call(time_remaining_s=lambda: 9.0))))
        await settle()
        assert call.time_remaining_s() == 9.0
        tasks.append(asyncio.create_task(listen(drawings, artist)))
        await settle()
        assert call.time_remaining_s() is None
        tasks[2].cancel()
        tasks[1].cancel()
        await settle()
        assert call.time_remaining_s() == 5.0
        artist.go_on.set()
        assert len(await tasks[0]) == 5

    scene(play)


def test_a_failure_is_told_to_all_and_not_kept() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist(error=ResourceExhausted("too much", retry_after_s=1.0))
        tasks = [asyncio.create_task(listen(drawings, artist)) for _ in range(2)]
        await settle()
        artist.go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, ResourceExhausted) for result in results)
        artist.error = None
        assert len(await listen(drawings, artist)) == 5 and artist.begun == 2

    scene(play)


def test_results_are_kept_for_a_time() -> None:
    async def play() -> None:
        drawings, artist = shared(kept_s=0.05), Artist()
        artist.go_on.set()
        await listen(drawings, artist)
        await listen(drawings, artist)
        assert artist.begun == 1 and drawings.held_bytes > 0
        await asyncio.sleep(0.15)
        assert drawings.held_bytes == 0
        await listen(drawings, artist)
        assert artist.begun == 2

    scene(play)


@pytest.mark.parametrize("settings", [{"kept_s": 0.0}, {"kept_bytes": 100}])
def test_nothing_is_kept_where_there_is_no_room(settings: dict[str, Any]) -> None:
    async def play() -> None:
        drawings, artist = shared(**settings), Artist()
        artist.go_on.set()
        for times in (1, 2):
            assert len(await listen(drawings, artist)) == 5
            assert artist.begun == times and drawings.held_bytes == 0

    scene(play)


def test_the_oldest_go_when_room_is_short() -> None:
    async def play() -> None:
        probe, artist = shared(), Artist()
        artist.go_on.set()
        await listen(probe, artist)
        drawings = shared(kept_bytes=2 * probe.held_bytes)
        ids = [OTHER_ID[:-1] + str(i) for i in range(4)]
        for request_id in ids:
            await listen(drawings, artist, request_id)
        assert drawings.held_bytes == 2 * probe.held_bytes
        before = artist.begun
        for request_id in reversed(ids):
            await listen(drawings, artist, request_id)
        assert artist.begun == before + 2, "the two newest were still there"

    scene(play)


def test_who_joins_late_misses_steps_before_memory_does() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist(steps=1000)
        first = asyncio.create_task(listen(drawings, artist))
        await settle()
        second = asyncio.create_task(listen(drawings, artist))
        await settle()
        artist.go_on.set()
        late = await second
        assert [event.step for event in late if isinstance(event, StepDone)] == list(range(745, 1001))
        assert isinstance(late[0], StageStarted) and isinstance(late[-1], StageStarted)
        await first
        heavy = Artist(steps=40, preview=bytes(1 << 20))
        task = asyncio.create_task(listen(drawings, heavy, OTHER_ID))
        await settle()
        heavy.go_on.set()
        assert sum(isinstance(event, StepDone) for event in await task) <= 16

    scene(play)


def test_closing_ends_what_is_under_way() -> None:
    async def play() -> None:
        drawings, artist = shared(), Artist()
        task = asyncio.create_task(listen(drawings, artist))
        await settle()
        await drawings.close()
        with pytest.raises(Unavailable, match="stopping"):
            await task
        assert artist.stopped == 1

    scene(play)
