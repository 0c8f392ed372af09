"""`python -m trainer.service.attempt FOLDER BYTES COMMAND...`: runs one command, and writes down what it said and how it ended.

The service may be gone by then, so somebody else has to wait for the command: this process, which is small. It holds the lock
of FOLDER, so that two services never run two commands in it. SIGTERM is handed on, once. Of what the command says BYTES are
kept, see `bounded_log`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.files import write_json
from trainer.service.bounded_log import BoundedLog
from trainer.service.processes import MARK, identify, sweep

LOCK, PROCESS, ENDED = "lock", "process.json", "ended.json"
IS_LOCKED = 3
LISTENING_S = 2.0  # for what was said last, when all are ended
LEFTOVERS_S = 5.0  # that descendants get which the command has left behind


def main(arguments: Sequence[str]) -> int:
    """Run the command; gives 0, or IS_LOCKED where another one runs in FOLDER."""
    folder, max_bytes, command, token = Path(arguments[0]), int(arguments[1]), arguments[2:], os.environ[MARK]
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
        output = BoundedLog(folder, max_bytes)
        write_json(folder / PROCESS, {"token": token} | asdict(myself))
        code, listening = _run(command, output, children, asked)
        sweep(token, grace_s=LEFTOVERS_S)
        if listening is not None:
            listening.join(LISTENING_S)  # its last lines say why; what outlives it without our mark may hold the pipe
        write_json(folder / ENDED, {"token": token, "code": code, "asked": bool(asked), "time_s": time.time()})
    return 0


def _run(
    command: Sequence[str], output: BoundedLog, children: list[subprocess.Popen[bytes]], asked: list[int]
) -> tuple[int, threading.Thread | None]:
    """The command's status, negative for a signal, and who still listens to what it has said."""
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
    except OSError as error:
        output.write(f"{command[0]}: {error.strerror}\n".encode())
        return 127, None
    assert child.stdout is not None
    listening = threading.Thread(target=output.take_all, args=(child.stdout,), daemon=True)
    listening.start()
    children.append(child)
    if asked:  # before there was a child to hand it on to
        child.terminate()
    return child.wait(), listening


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
