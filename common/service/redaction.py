"""Keeping what callers say out of the logs: a trace may quote the request that broke us."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from google.protobuf.message import Message

WITHHELD = "[...]"
_MIN_WORD_CHARACTERS = 4  # shorter words say nothing of a prompt, and stand in every trace


def redacted_trace(error: BaseException, request: Any) -> str:
    """The trace of `error`, in which nothing stands that `request` holds as text: a protobuf message, or texts."""
    trace = "".join(traceback.format_exception(error)).rstrip()
    if isinstance(request, Message):
        return redacted(trace, _texts(request))
    return redacted(trace, request) if isinstance(request, tuple | list) else trace


def redacted(text: str, secrets: Iterable[str]) -> str:
    """`text` without the secrets and without their words of four characters or more, however they are cased."""
    wanted: set[str] = set()
    for secret in secrets:
        wanted.add(secret.strip())
        wanted |= {word for word in re.findall(r"\w+", secret) if len(word) >= _MIN_WORD_CHARACTERS}
    wanted.discard("")
    if not wanted:
        return text
    longest_first = sorted(wanted, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", WITHHELD, text, flags=re.IGNORECASE)


def _texts(message: Message) -> Iterator[str]:
    for field, value in message.ListFields():
        for part in _parts(field, value):
            if isinstance(part, str):
                yield part
            elif isinstance(part, Message):
                yield from _texts(part)


def _parts(field: Any, value: Any) -> Iterator[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        for key in value:
            yield key
            yield value[key]
    elif field.is_repeated:
        yield from value
    else:
        yield value
