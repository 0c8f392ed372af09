"""A picture's own record, as the generator's files hold it."""

from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from client.picture_record import read_record

RECORD = json.dumps({"prompt": "a guide dog & <cat> \u00fc", "seed": 7}, ensure_ascii=False)
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:r="urn:reimagen:record:1"><r:record>{}</r:record></rdf:Description>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def png(text: str | None, *, keyword: str = "reimagen", zipped: bool = False) -> bytes:
    """A PNG with this text."""
    stream, chunks = io.BytesIO(), PngInfo()
    chunks.add_itxt("other", "{}")
    if text is not None:
        chunks.add_itxt(keyword, text, zip=zipped)
    Image.new("RGB", (4, 4)).save(stream, "PNG", pnginfo=chunks)
    return stream.getvalue()


def webp(xmp: str) -> bytes:
    """A WebP with this XMP."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "WEBP", lossless=True, xmp=xmp.encode())
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        png(RECORD),
        png(RECORD, zipped=True),
        webp(XMP.format(RECORD.replace("&", "&amp;").replace("<", "&lt;"))),
        RECORD.encode(),
    ],
    ids=["png", "zipped png", "webp", "json"],
)
def test_the_record_is_read(content: bytes) -> None:
    assert read_record(content) == RECORD


def test_a_record_that_grows_without_bound_is_refused() -> None:
    payload = b"reimagen\0\1\0\0\0" + zlib.compress(bytes(64 << 20))
    chunk = struct.pack(">I4s", len(payload), b"iTXt") + payload + struct.pack(">I", zlib.crc32(b"iTXt" + payload))
    with pytest.raises(ValueError, match="its record is larger than"):
        read_record(png(None)[:33] + chunk + png(None)[33:])


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (png(None), "holds no record"),
        (png(RECORD, keyword="reimagined"), "holds no record"),
        (png("[1]"), "is no record"),
        (png("{"), "neither a picture with a record nor a record"),
        (png(RECORD)[:40], "holds no record"),
        (webp(""), "holds no record"),
        (webp(XMP.replace("record>", "other>").format("{}")), "holds no record"),
        (webp("<x"), "XMP is damaged"),
        (webp('<!DOCTYPE x [<!ENTITY a "b">]><x/>'), "declares a document type"),
        (b"\xff\xd8\xff", "neither a picture with a record nor a record"),
        (b"", "neither a picture with a record nor a record"),
    ],
)
def test_what_holds_none_is_told(content: bytes, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_record(content)
