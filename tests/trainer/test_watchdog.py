"""Which rank hangs, told from what each says of itself."""

from __future__ import annotations

import pytest
from torch.distributed import TCPStore

from trainer.distributed import Ranks
from trainer.watchdog import LED, Place, Watchdog, open_watchdog


@pytest.fixture
def watchdog() -> Watchdog:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return Watchdog(Ranks(parallel="ddp", rank=0, world=3), store, limit_s=60.0)


def say(watchdog: Watchdog, now: float, *places: tuple[int, str], silent: tuple[int, ...] = ()) -> None:
    """Each rank's place, heard at `now`; the silent ones are not heard."""
    for rank, (step, phase) in enumerate(places):
        if rank not in silent:
            watchdog.saw(rank, f"{now} {step} {phase}", Place(step=step, phase=phase), now)


def test_ranks_that_move_are_left_alone(watchdog: Watchdog) -> None:
    for now in range(0, 600, 20):
        say(watchdog, now, *[(now, "backward")] * 3)
        assert watchdog.verdict(now + 1) == ""


def test_a_rank_that_is_not_heard_of_is_named(watchdog: Watchdog) -> None:
    """As one whose process is stopped: the others wait for it, at the same place."""
    for now in range(0, 70, 10):
        say(watchdog, now, (12, "backward"), (12, "backward"), (12, "backward"), silent=(1,) if now else ())
        assert (watchdog.verdict(now) != "") == (now > 60)
    assert watchdog.verdict(70).startswith("rank 1 has not finished step 12 (backward) for 70 s")


def test_a_rank_that_lives_and_does_not_move_is_named(watchdog: Watchdog) -> None:
    """As one that waits for its disk: the others have come further, and wait."""
    for now in range(0, 70, 10):
        say(watchdog, now, (12, "backward"), (12, "backward"), (12, "batch"))
    assert watchdog.verdict(70).startswith("rank 2 has not finished step 12 (batch) for 70 s")


def test_all_are_named_where_none_is_behind(watchdog: Watchdog) -> None:
    for now in range(0, 70, 10):
        say(watchdog, now, *[(5, "backward")] * 3)
    assert watchdog.verdict(70).startswith("rank 0, 1, 2 have not finished step 5 (backward)")


def test_a_slow_evaluation_is_no_hanging(watchdog: Watchdog) -> None:
    for now in range(0, 600, 10):
        say(watchdog, now, (12, LED), (12, "end"), (12, "end"))
        assert watchdog.verdict(now) == ""
    assert watchdog.verdict(661).startswith("rank 0, 1, 2 have not finished step 12"), "but its process must live"


def test_a_limit_shorter_than_a_few_beats_is_refused() -> None:
    with pytest.raises(ValueError, match="--hang-timeout: 1"):
        open_watchdog(Ranks(), 1.0, {})
