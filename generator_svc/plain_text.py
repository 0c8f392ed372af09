"""What texts of callers may hold."""

from __future__ import annotations

import re

from common.prompt import MAX_PROMPT_CHARACTERS
from common.service.errors import InvalidArgument

MAX_TEXT_CHARACTERS = MAX_PROMPT_CHARACTERS
# What neither XML (and so the XMP of a picture) nor UTF-8 can hold, and no reader can see.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def check_plain(field: str, text: str, max_characters: int) -> None:
    """Refuse a text that is too long or holds control characters.

    Raises:
        InvalidArgument: names the field.
    """
    if len(text) > max_characters:
        raise InvalidArgument(field, f"{len(text)} characters, at most {max_characters} are read")
    if found := _UNSEEN.search(text):
        raise InvalidArgument(field, f"holds the control character U+{ord(found[0]):04X} at {found.start()}")


def field_and_reason(error: ValueError) -> tuple[str, str]:
    """The two halves of "field: reason", as `common` writes its errors."""
    field, _, reason = str(error).partition(": ")
    return field, reason
