"""Finished pictures as files with their record inside, and callers' pictures as pixels."""

from __future__ import annotations

import io
import re
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from common.images import ImageError, encode_png, from_unit, over_color, rasterize, shrink
from common.pictures import Picture, take_in
from common.scenes import WHITE
from common.service.errors import InvalidArgument

ImageFormat = Literal["png", "webp"]
CHUNK = "reimagen"  # keyword of the PNG's iTXt chunk
XMP_NAMESPACE = "urn:reimagen:record:1"
MAX_IMAGE_BYTES = 4 << 20

_HEADS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_XML = re.compile("[\ufffe\uffff]")  # and JSON leaves them as they are
_WEBP_EFFORT = {"method": 2, "quality": 20}  # more makes files 1 % smaller and takes a third longer


def encode(pixels: np.ndarray, image_format: ImageFormat, record_json: str = "") -> bytes:
    """A file of float [3, S, S] in [-1, 1], without loss; the same input gives the same bytes.

    Args:
        record_json: kept inside: in a PNG as the iTXt chunk CHUNK, in a WebP as `record` of XMP_NAMESPACE; empty: none is.
    """
    rgb = from_unit(np.moveaxis(pixels, 0, -1))
    if image_format == "png":
        return encode_png(rgb, {CHUNK: record_json} if record_json else None)
    stream = io.BytesIO()
    xmp = _xmp(record_json) if record_json else b""
    Image.fromarray(rgb).save(stream, "WEBP", lossless=True, xmp=xmp, **_WEBP_EFFORT)
    return stream.getvalue()


def _xmp(record_json: str) -> bytes:
    """ISO 16684-1: one property of one resource."""
    record_json = _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", record_json)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" xmlns:reimagen="{XMP_NAMESPACE}">'
        f"<reimagen:record>{escape(record_json)}</reimagen:record>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def check_size_and_kind(field: str, image: bytes) -> None:
    """Refuse at once, before any work, what cannot be a picture; `read` finds out about the rest.

    Raises:
        InvalidArgument: names the field.
    """
    if not image:
        raise InvalidArgument(field, "is empty")
    if len(image) > MAX_IMAGE_BYTES:
        raise InvalidArgument(field, f"has {len(image)} bytes; at most {MAX_IMAGE_BYTES} are taken")
    is_webp = image[:4] == b"RIFF" and image[8:12] == b"WEBP"
    is_svg = image[:1024].removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"<"
    if not (is_webp or is_svg or image.startswith(_HEADS)):
        raise InvalidArgument(field, f"begins with {image[:4].hex(' ')}: none of PNG, JPEG, WebP and SVG")


def read(field: str, image: bytes) -> Picture:
    """A caller's picture, whole and upright.

    Raises:
        InvalidArgument: names the field: it is damaged, or too large when decoded.
    """
    try:
        return take_in(image)
    except ImageError as error:
        raise InvalidArgument(field, str(error).removeprefix("image: ")) from None


def square(picture: Picture, size: int) -> np.ndarray:
    """It on a white square, kept in proportion: uint8 [size, size, 3]."""
    return over_color(rasterize(picture.image, picture.format, size), WHITE)


def small_square(picture: Picture, size: int, factor: int) -> np.ndarray:
    """It at `size` / `factor` pixels, as a stage of this size is trained to read it: uint8 [h, h, 3].

    A raster that is no larger than that is taken as it is, so that a stage's picture goes on as if it had never left.
    """
    side = size // factor
    if picture.format != "svg":
        with Image.open(io.BytesIO(picture.image)) as opened:
            if max(opened.size) <= side:
                return square(picture, side)
    return shrink(square(picture, size), factor)
