"""A call that is yet to be made: what is asked, and how the answer is read. Connections make it, with asyncio or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One call.

    Attributes:
        stub: class of the service's stubs.
        method: name of the method.
        request: the message.
        read: makes plain data of an answer.
        may_repeat: whether it does no harm to ask twice.
    """

    stub: Callable[[Any], Any]
    method: str
    request: Message
    read: Callable[[Any], T]
    may_repeat: bool = True
