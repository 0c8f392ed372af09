"""How a command ends: 0; 2 and one line that names what is wrong, 4 where a disk is full; our own faults show their trace."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

BAD_INPUT = 2
FULL_DISK = 4  # nothing is wrong with what was asked: the same again does it, once there is room


def run_command(program: str, body: Callable[[], None], *, expected: tuple[type[Exception], ...]) -> int:
    """Run `body`; gives the exit status.

    `expected` exceptions and OSError (a missing file) become one line on standard error and status 2, a full disk (or
    quota) one and status 4. SIGTERM unwinds the stack as Ctrl-C does, so that temporary files go; both give 128 + the
    signal's number.
    """
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        body()
    except expected as error:
        return _say(program, str(error))
    except OSError as error:
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        _say(program, f"{error.strerror or error}{place}")
        return status_of(error)
    except KeyboardInterrupt:
        _say(program, "interrupted")
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def status_of(error: Exception) -> int:
    """With which status a command ends that an expected error ends."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FULL_DISK if is_full else BAD_INPUT


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _say(program: str, text: str) -> int:
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return BAD_INPUT
