"""A service builds the graphs of its knowledge bases in the background, when enough has changed."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress

from common.service.errors import NotFound
from retrieval_svc.library import Library

LOOK_EVERY_S = 30.0
_LOG = logging.getLogger(__name__)


class Upkeep:
    """A thread that builds the graphs of a library, one after the other, when they are due."""

    def __init__(self, library: Library, *, look_every_s: float = LOOK_EVERY_S) -> None:
        """Start it."""
        self._library = library
        self._look_every_s = look_every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop it; a graph that is being built is given up."""
        self._closing.set()
        for name in self._library.names():
            with suppress(NotFound):
                self._library.get(name).store.stop_building()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._look_every_s):
            for name in self._library.names():
                try:
                    if not self._closing.is_set():
                        self._library.get(name).build_if_due()
                except Exception as error:  # deleted meanwhile, the disk is full: later
                    _LOG.warning("graph_not_built", extra={"knowledge_base": name, "reason": str(error)})
