"""Messages between the service and its BM25 worker: a length and so many bytes, one question and one answer in turn."""

from __future__ import annotations

import socket
import struct

RELOAD = b""  # the question that is no lookup: go over to the newest commit
FAILED = b""  # the answer where a question could not be answered
DONE = b"\x01"  # the answer to RELOAD

_LENGTH = struct.Struct("!I")
_TIMEOUT = struct.Struct("@ll")  # socket(7): a timeval
_READ_BYTES = 1 << 16


def send_message(stream: socket.socket, message: bytes) -> None:
    """Write it whole.

    Raises:
        OSError: the other side has gone.
    """
    stream.sendall(_LENGTH.pack(len(message)) + message)


def receive_message(stream: socket.socket) -> bytes:
    """The next one. Nothing may come behind it before it is answered.

    Raises:
        EOFError: the other side has gone. OSError: it has, or it does not answer in time.
    """
    received = stream.recv(_READ_BYTES)
    while received and len(received) < _LENGTH.size:
        received += _more(stream)
    if not received:
        raise EOFError
    end = _LENGTH.size + _LENGTH.unpack_from(received)[0]
    if len(received) < end:
        parts, missing = [received], end - len(received)
        while missing > 0:
            parts.append(_more(stream))
            missing -= len(parts[-1])
        received = b"".join(parts)
    return received[_LENGTH.size :]


def set_timeout(stream: socket.socket, seconds: int) -> None:
    """Of each read and write, kept by the kernel: Python's own costs a call to `poll` each time."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        stream.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT.pack(seconds, 0))


def _more(stream: socket.socket) -> bytes:
    received = stream.recv(_READ_BYTES)
    if not received:
        raise EOFError
    return received
