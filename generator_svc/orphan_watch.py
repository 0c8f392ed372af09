"""A model's interpreter ends with its server: killed by force, the server leaves it waiting for an answer for ever."""

from __future__ import annotations

import faulthandler
import os
import threading
import time

WATCH_S = 0.5
STUCK_S = 30.0


def end_with_server() -> None:
    """Watch, on a thread of its own, whether the process that started us is still there; end at once where it is not.

    The kernel's own way (PR_SET_PDEATHSIG) goes by the thread that started us, and Triton's loading threads come and go.
    Some of the backend's calls wait for the server with the interpreter locked, so that no thread of ours can see that
    it is gone: a timer that needs no interpreter ends those, after STUCK_S.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="orphan-watch", daemon=True).start()


def _watch(server: int) -> None:
    while os.getppid() == server:
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        time.sleep(WATCH_S)
    os._exit(1)
