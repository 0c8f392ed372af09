"""Messages between the service and its CLIP worker: a JSON header and arrays, over a stream socket of one machine."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_LENGTHS = struct.Struct("!IQ")  # of the header and of the arrays behind it, in bytes
MAX_HEADER_BYTES, MAX_ARRAY_BYTES = 64 << 20, 4 << 30
_KINDS = {"u1": np.dtype(np.uint8), "f4": np.dtype(np.float32)}


class FrameError(ValueError):
    """What came is no frame: the other side is not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message: what it says, and uint8 or float32 arrays of any shape."""

    said: dict[str, Any]
    arrays: Sequence[np.ndarray] = field(default_factory=tuple)


def send_frame(stream: socket.socket, frame: Frame) -> None:
    """Write it whole.

    Raises:
        OSError: the other side has gone.
    """
    arrays = [np.ascontiguousarray(array) for array in frame.arrays]
    kinds = {dtype: kind for kind, dtype in _KINDS.items()}
    shapes = [[kinds[array.dtype], *array.shape] for array in arrays]
    header = json.dumps({"said": frame.said, "arrays": shapes}).encode()
    stream.sendall(_LENGTHS.pack(len(header), sum(array.nbytes for array in arrays)) + header)
    for array in arrays:
        stream.sendall(array.tobytes())


def receive_frame(stream: socket.socket) -> Frame | None:
    """The next one; None where the other side has ended.

    Raises:
        FrameError: it is none, or was cut off.
        OSError: the connection is broken.
    """
    lengths = _receive(stream, _LENGTHS.size)
    if lengths is None:
        return None
    header_bytes, array_bytes = _LENGTHS.unpack(lengths)
    if header_bytes > MAX_HEADER_BYTES or array_bytes > MAX_ARRAY_BYTES:
        raise FrameError(f"a frame of {header_bytes} and {array_bytes} bytes")
    header = json.loads(_whole(_receive(stream, header_bytes)))
    body = _whole(_receive(stream, array_bytes)) if array_bytes else bytearray()
    arrays, at = list[np.ndarray](), 0
    for kind, *shape in header["arrays"]:
        dtype = _KINDS[kind]
        num = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(body, dtype, num, at).reshape(shape))
        at += num * dtype.itemsize
    return Frame(said=header["said"], arrays=arrays)


def _receive(stream: socket.socket, num_bytes: int) -> bytearray | None:
    """So many bytes; None where there are none at all any more."""
    received = bytearray(num_bytes)
    view, at = memoryview(received), 0
    while at < num_bytes:
        num = stream.recv_into(view[at:])
        if num == 0:
            if at:
                raise FrameError(f"cut off after {at} of {num_bytes} bytes")
            return None
        at += num
    return received


def _whole(received: bytearray | None) -> bytearray:
    if received is None:
        raise FrameError("cut off")
    return received
