"""The process in which Tantivy searches: `python -m retrieval_svc.lexical_worker`, started by `lexical_process.py`.

A process of its own, because Tantivy's binding holds the interpreter's lock while it searches: a service that searches
within itself has one core, however many there are. It reads the index's files, which the service writes, through memory
maps; it never writes. When the service ends, its sockets do, and it ends.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from retrieval_svc.bm25_search import LexicalSearch, attached
from retrieval_svc.lexical_channel import DONE, FAILED, RELOAD, receive_message, send_message
from retrieval_svc.pairs import Lookup

_LOOKUP = msgspec.msgpack.Decoder(Lookup)
_ENCODER = msgspec.msgpack.Encoder()


class _Worker:
    """Answers one question after the other, whichever socket it comes from."""

    def __init__(self, folder: Path) -> None:
        self._index = attached(folder)
        self._searcher = self._index.searcher()

    def answer(self, question: bytes) -> bytes:
        """Scores and stored pairs, as `LexicalSearch.stored` gives them."""
        try:
            if question == RELOAD:
                self._index.reload()
                self._searcher = self._index.searcher()
                return DONE
            lookup = _LOOKUP.decode(question)
            return _ENCODER.encode(LexicalSearch(self._searcher, self._index.schema, lookup).stored())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # Rust's panics are no `Exception`; whoever asked will meet, and tell of, the same
            return FAILED


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer until the service has gone; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m retrieval_svc.lexical_worker", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the index")
    parser.add_argument("--sockets", type=int, nargs="+", required=True, help="descriptors of sockets to the service")
    flags = parser.parse_args(arguments)
    worker = _Worker(flags.folder)
    with selectors.DefaultSelector() as selector:
        for number in flags.sockets:
            selector.register(socket.socket(fileno=number), selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                stream = key.fileobj
                assert isinstance(stream, socket.socket)
                try:
                    send_message(stream, worker.answer(receive_message(stream)))
                except (EOFError, OSError):
                    return 0


if __name__ == "__main__":
    sys.exit(main())
