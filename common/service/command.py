"""How a command ends: 0, or 2 and one line that names what is wrong; our own faults show their trace."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

BAD_INPUT = 2


def run_command(program: str, body: Callable[[], None], *, expected: tuple[type[Exception], ...]) -> int:
    """Run `body`; gives the exit status.

    `expected` exceptions and OSError (a missing file, a full disk) become one line on standard error and
    status 2. SIGTERM unwinds the stack as Ctrl-C does, so that temporary files go; both give 128 + the
    signal's number.
    """
    before = signal.signal(signal.SIGTERM, _unwind)
    try:
        body()
    except expected as error:
        return _say(program, str(error))
    except OSError as error:
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""
        return _say(program, f"{error.strerror or error}{place}")
    except KeyboardInterrupt:
        _say(program, "interrupted")
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _say(program: str, text: str) -> int:
    print(f"{program}: error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return BAD_INPUT
