"""Pictures as they come from outside: what they are is told by their bytes alone."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from common.images import MAX_PIXELS, ImageError, probe_svg

MAX_IMAGE_BYTES = 20_000_000
MAX_SIDE = 16_384  # pixels; a longer one is a mistake or an attack, and WebP cannot hold it

_FORMATS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp"}  # MPO: a JPEG with further views behind it
_READERS = ("PNG", "JPEG", "WEBP")
_OTHERS = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"\x1f\x8b": "gzip"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PLAIN_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
_JPEG_QUALITY = 95
_TURNS = {  # EXIF 2.32, section 4.6.4, Orientation: what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that can be stored: its bytes, and `svg`, `png`, `jpg` or `webp`."""

    image: bytes
    format: str


def take_in(image: bytes) -> Picture:
    """Check a picture file that a stranger gave, and bring it into a form that everyone reads alike.

    A picture that EXIF says is turned is turned upright, CMYK and 16-bit become 8-bit RGB or gray, and of an animation
    the first frame is kept: such a picture is written again, a JPEG as a JPEG, others as PNG. Any other comes back
    byte for byte.

    Raises:
        ImageError: it is empty, too large, damaged, or none of SVG, PNG, JPEG and WebP; the message says which.
    """
    if not image:
        raise ImageError("image: is empty")
    if len(image) > MAX_IMAGE_BYTES:
        raise ImageError(f"image: {len(image)} bytes, more than {MAX_IMAGE_BYTES}")
    if image.removeprefix(_BYTE_ORDER_MARK).lstrip()[:1] == b"<":
        probe_svg(image)
        return Picture(image=image, format="svg")
    for head, name in _OTHERS.items():
        if image.startswith(head):
            raise ImageError(f"image: a {name} file; svg, png, jpg and webp are taken")
    try:
        return _take_in_raster(image)
    except ImageError:
        raise
    except UnidentifiedImageError:  # its message is the address of an object
        raise ImageError("image: not a picture that can be read (of no kind that is known)") from None
    except Exception as error:  # decoders raise almost anything when bytes are wrong: struct.error, EOFError, KeyError
        raise ImageError(f"image: not a picture that can be read ({error})") from None


def _take_in_raster(image: bytes) -> Picture:
    with Image.open(io.BytesIO(image), formats=_READERS) as picture:
        width, height = picture.size
        if max(width, height) > MAX_SIDE:
            raise ImageError(f"image: {width} x {height} pixels; a side has at most {MAX_SIDE}")
        if width * height > MAX_PIXELS:
            raise ImageError(f"image: {width} x {height} pixels, more than {MAX_PIXELS}")
        known = _FORMATS[picture.format or ""]
        is_animated = picture.format != "MPO" and getattr(picture, "is_animated", False)
        picture.load()  # to the last pixel: a truncated file is noticed here
        orientation = _orientation(picture)
        if not is_animated and orientation == 1 and picture.mode in _PLAIN_MODES:
            return Picture(image=image, format=known)
        # A profile for CMYK says nothing of the RGB that comes of it.
        profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA") else None
        plain = _plain(picture)
        turned = plain.transpose(_TURNS[orientation]) if orientation in _TURNS else plain
        return _written_again(turned, known, profile)


def _orientation(picture: Image.Image) -> int:
    """How EXIF says that the picture is to be turned, 1 to 8; 1 (not at all) where it says nothing that makes sense."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # many a camera and tool writes EXIF that no parser takes; the pixels are good
        return 1
    return orientation if orientation in _TURNS else 1


def _plain(picture: Image.Image) -> Image.Image:
    """8 bits a channel, gray or RGB, with its transparency."""
    if picture.mode.startswith("I"):
        gray = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255)  # 16 bits; Pillow would cut off at 255
        return Image.fromarray(gray.astype(np.uint8))
    if picture.mode in _PLAIN_MODES:
        return picture
    return picture.convert("RGB")


def _written_again(picture: Image.Image, known: str, profile: bytes | None) -> Picture:
    stream = io.BytesIO()
    if known == "jpg":
        picture.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0, exif=b"", icc_profile=profile)
    else:
        picture.save(stream, "PNG", exif=b"", icc_profile=profile)
    written = stream.getvalue()
    if len(written) > MAX_IMAGE_BYTES:
        raise ImageError(
            f"image: {len(written)} bytes when written upright, in RGB, as one frame; {MAX_IMAGE_BYTES} fit"
        )
    return Picture(image=written, format="jpg" if known == "jpg" else "png")
