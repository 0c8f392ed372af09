"""Statuses that processes end with, and what they mean to whoever waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from trainer.endings import cause_of
from trainer.torchrun import main


def failures(tmp_path: Path, *codes: int) -> ChildFailedError:
    """What torchrun raises where ranks end with these statuses, one after the other."""
    found = {}
    for rank, code in enumerate(codes):
        found[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file=str(tmp_path / "none"))
        found[rank].timestamp = 100 - rank  # the last rank was the first to fail
    return ChildFailedError("trainer", found)


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ((1, 2, 1), 2),  # what cannot be: a Job is not to try again
        ((1, 3), 3),
        ((1, 4, 1), 4),  # a full disk
        ((3, 1), 3),  # the one that hung was killed, or failed for lack of the others
        ((1, -9), 128 + 9),  # memory ran out, and the other failed for lack of it
        ((-15, 1), 1),
        ((3, -9), 128 + 9),  # memory ran out, and the other hung for lack of it
        ((3, 1, -11, 1), 128 + 11),
        ((-9, 3), 3),  # the one that hung was killed
        ((3, 4, -9), 4),
    ],
)
def test_several_ranks_end_with_the_status_that_says_why(
    codes: tuple[int, ...], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(arguments: object) -> None:
        raise failures(tmp_path, *codes)

    monkeypatch.setattr(run, "main", fails)
    assert main([]) == status


def test_ranks_that_a_signal_ends_end_as_one_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(arguments: object) -> None:
        raise SignalException("asked to", sigval=15)

    monkeypatch.setattr(run, "main", ended)
    assert main([]) == 128 + 15
    monkeypatch.setattr(run, "main", lambda arguments: None)
    assert main([]) == 0


def test_causes() -> None:
    assert [cause_of(code) for code in (2, 3, 4, 1, 20, -9, None)] == ["bad_input", "hung", "full_disk", *["other"] * 4]
