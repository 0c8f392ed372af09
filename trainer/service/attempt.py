"""`python -m trainer.service.attempt FOLDER COMMAND...`: runs one command, and writes down how it ended.

The service may be gone by then, so somebody else has to wait for the command: this process, which is small. It holds the lock
of FOLDER, so that two services never run two commands in it. SIGTERM is handed on, once.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.files import write_json
from trainer.service.processes import MARK, identify, sweep

LOCK, PROCESS, ENDED, OUTPUT = "lock", "process.json", "ended.json", "output.log"
IS_LOCKED = 3
LEFTOVERS_S = 5.0  # that descendants get which the command has left behind


def main(arguments: Sequence[str]) -> int:
    """Run the command; gives 0, or IS_LOCKED where another one runs in FOLDER."""
    folder, command, token = Path(arguments[0]), arguments[1:], os.environ[MARK]
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return IS_LOCKED
        asked: list[int] = []
        children: list[subprocess.Popen[bytes]] = []

        def hand_on(number: int, frame: object) -> None:
            if not asked:
                for child in children:
                    child.send_signal(number)
            asked.append(number)

        signal.signal(signal.SIGTERM, hand_on)
        myself = identify(os.getpid())
        assert myself is not None
        (folder / OUTPUT).write_bytes(b"")
        write_json(folder / PROCESS, {"token": token} | asdict(myself))
        code = _run(command, folder / OUTPUT, children, asked)
        sweep(token, grace_s=LEFTOVERS_S)
        write_json(folder / ENDED, {"token": token, "code": code, "asked": bool(asked), "time_s": time.time()})
    return 0


def _run(command: Sequence[str], output: Path, children: list[subprocess.Popen[bytes]], asked: list[int]) -> int:
    """The command's status, negative for a signal."""
    with output.open("ab") as stream:
        try:
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)
        except OSError as error:
            stream.write(f"{command[0]}: {error.strerror}\n".encode())
            return 127
    children.append(child)
    if asked:  # before there was a child to hand it on to
        child.terminate()
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
