"""How commands end."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from common.service.command import run_command


def _raising(error: BaseException) -> Callable[[], NoReturn]:
    def body() -> NoReturn:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("index: x is\n damaged"), 2, "tool: error: index: x is damaged\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/out"), 4, "tool: error: No space left on device: /out\n"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 4, "tool: error: Disk quota exceeded\n"),
        (OSError(errno.ENOENT, "No such file or directory", "/in"), 2, "tool: error: No such file or directory: /in\n"),
        (OSError("odd"), 2, "tool: error: odd\n"),
        (KeyboardInterrupt(), 130, "tool: error: interrupted\n"),
    ],
)
def test_what_is_expected_ends_with_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("tool", _raising(error), expected=(ValueError,)) == status
    assert capsys.readouterr().err == line


def test_success_and_our_own_faults() -> None:
    assert run_command("tool", lambda: None, expected=()) == 0
    with pytest.raises(ZeroDivisionError):
        run_command("tool", _raising(ZeroDivisionError()), expected=(ValueError,))


def test_sigterm_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound: list[bool] = []

    def body() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as caught:
        run_command("tool", body, expected=())
    assert (caught.value.code, unwound) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before
