"""A model's interpreter ends with its server: killed by force, the server leaves it waiting for an answer for ever."""

from __future__ import annotations

import os
import threading
import time

WATCH_S = 0.5


def end_with_server() -> None:
    """Watch, on a thread of its own, whether the process that started us is still there; end at once where it is not.

    The kernel's own way (PR_SET_PDEATHSIG) goes by the thread that started us, and Triton's loading threads come and go.
    """
    threading.Thread(target=_watch, args=(os.getppid(),), name="orphan-watch", daemon=True).start()


def _watch(server: int) -> None:
    while os.getppid() == server:
        time.sleep(WATCH_S)
    os._exit(1)
