"""The record that a picture's file holds.

Of a PNG it is the text chunk "reimagen" (PNG specification, 11.3.3.4), of a WebP the property `record` of its XMP.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from xml.etree import ElementTree

KEYWORD = b"reimagen"
PROPERTY = "{urn:reimagen:record:1}record"
_PNG = b"\x89PNG\r\n\x1a\n"
MAX_RECORD_BYTES = 16 << 20


def read_record(content: bytes) -> str:
    """The record in a file, as JSON text: of a PNG, of a WebP, or of a file that is the record itself.

    Raises:
        ValueError: it holds none.
    """
    if content.startswith(_PNG):
        for kind, payload in _png_chunks(content):
            if kind == b"iTXt" and (text := _international_text(payload)) is not None:
                return _checked(text)
        raise ValueError("holds no record")
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        for kind, payload in _riff_chunks(content):
            if kind == b"XMP " and (text := _property(payload)) is not None:
                return _checked(text)
        raise ValueError("holds no record")
    return _checked(content)


def _checked(text: bytes) -> str:
    try:
        document = json.loads(text.decode("utf-8"))
    except ValueError:
        raise ValueError("is neither a picture with a record nor a record") from None
    if not isinstance(document, dict):
        raise ValueError("is no record")
    return text.decode("utf-8")


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_PNG)
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        yield kind, content[place + 8 : place + 8 + length]
        place += 12 + length


def _riff_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 12
    while place + 8 <= len(content):
        kind, length = struct.unpack_from("<4sI", content, place)
        yield kind, content[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _property(xmp: bytes) -> bytes | None:
    """Our property of an XMP packet; None where it has none."""
    if b"<!DOCTYPE" in xmp:  # entities can grow without bound, and XMP has none
        raise ValueError("its XMP declares a document type")
    try:
        found = ElementTree.fromstring(xmp).find(f".//{PROPERTY}")
    except ElementTree.ParseError:
        raise ValueError("its XMP is damaged") from None
    return None if found is None else (found.text or "").encode()


def _international_text(payload: bytes) -> bytes | None:
    """The text of an iTXt chunk of our keyword; None for another's."""
    keyword, _, rest = payload.partition(b"\0")
    if keyword != KEYWORD or len(rest) < 2:
        return None
    is_compressed, body = rest[0], rest[2:]
    _, _, body = body.partition(b"\0")  # the language
    _, _, text = body.partition(b"\0")  # the keyword, translated
    if not is_compressed:
        return text
    inflating = zlib.decompressobj()
    try:
        inflated = inflating.decompress(text, MAX_RECORD_BYTES)
    except zlib.error:
        raise ValueError("its record is damaged") from None
    if inflating.unconsumed_tail:
        raise ValueError(f"its record is larger than {MAX_RECORD_BYTES} bytes")
    return inflated
