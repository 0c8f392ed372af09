"""One rule each for rasterising, alpha, uint8 <-> [-1, 1], resizing and PNG.

Pictures are `uint8 [H, W, 3]` RGB; pictures with transparency are `uint8 [H, W, 4]` with *premultiplied* alpha, because
only then averaging pixels (shrinking) is right.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, PngImagePlugin

from common.svg import check_svg

_RASTERS = ("PNG", "JPEG", "WEBP")
_PROBE_SIZE = 4  # pixels: what an SVG cannot be drawn for does not depend on it
MAX_PIXELS = 64_000_000  # a larger source picture is refused before it is decoded (decompression bombs)


class ImageError(ValueError):
    """The picture cannot be read."""


def rasterize(image: bytes, image_format: str, size: int) -> np.ndarray:
    """Draw a picture file on a transparent square, kept in proportion and centred.

    Args:
        image: the file's bytes.
        image_format: `svg`, `png`, `jpg` or `webp`.
        size: side of the square in pixels.

    Returns:
        uint8 [size, size, 4], premultiplied RGBA.

    Raises:
        ImageError: the bytes are not such a picture, or it is too large.
    """
    return _premultiply(_render_svg(image, size) if image_format == "svg" else _fit_raster(image, size))


def probe_svg(image: bytes) -> None:
    """See that an SVG can be drawn, at the least cost.

    Raises:
        ImageError: it cannot.
    """
    _draw_svg(image, _PROBE_SIZE)


def _render_svg(image: bytes, size: int) -> np.ndarray:
    return _centre(Image.open(io.BytesIO(_draw_svg(image, size))).convert("RGBA"), size)


def _draw_svg(image: bytes, size: int) -> bytes:
    """The drawing as a PNG."""
    try:
        text = image.decode("utf-8-sig")
        for raster in check_svg(text):
            _read_raster(raster)
        # Both sides: the drawing is fitted into them, so that a sliver costs no more than its square.
        return bytes(resvg_py.svg_to_bytes(svg_string=text, width=size, height=size, skip_system_fonts=True))
    except (ValueError, OSError) as error:
        raise (
            error if isinstance(error, ImageError) else ImageError(f"image: not an SVG that can be drawn ({error})")
        ) from None


def _fit_raster(image: bytes, size: int) -> np.ndarray:
    picture = _read_raster(image)
    scale = size / max(picture.size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return _centre(picture.resize(fitted, Image.Resampling.LANCZOS), size)


def _read_raster(image: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(image), formats=_RASTERS)
        if picture.width * picture.height > MAX_PIXELS:
            raise ImageError(f"image: {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
        return picture.convert("RGBA")
    except ImageError:
        raise
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"image: not a picture that can be read ({error})") from None


def _centre(picture: Image.Image, size: int) -> np.ndarray:
    canvas = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return np.asarray(canvas)


def _premultiply(straight: np.ndarray) -> np.ndarray:
    alpha = straight[..., 3:].astype(np.uint16)
    color = (straight[..., :3].astype(np.uint16) * alpha + 127) // 255
    return np.concatenate([color.astype(np.uint8), straight[..., 3:]], axis=-1)


def over_color(premultiplied: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """Lay premultiplied RGBA [..., 4] over one RGB color; uint8 [..., 3]."""
    transparency = 255 - premultiplied[..., 3:].astype(np.uint16)
    behind = (transparency * np.asarray(color, np.uint16) + 127) // 255
    return np.minimum(premultiplied[..., :3].astype(np.uint16) + behind, 255).astype(np.uint8)


def shrink(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Average `factor` x `factor` squares: uint8 [..., H, W, C] -> uint8 [..., H/factor, W/factor, C], rounded."""
    *lead, height, width, channels = pixels.shape
    if height % factor or width % factor:
        raise ValueError(f"shrink: {height} x {width} is not divisible by {factor}")
    blocks = pixels.reshape(*lead, height // factor, factor, width // factor, factor, channels)
    total = blocks.sum(axis=(-4, -2), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def enlarge_bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pillow's bicubic enlargement of uint8 [H, W, 3] to [size, size, 3]: the baseline of super-resolution."""
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))


def to_unit(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1], same shape."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def from_unit(values: np.ndarray) -> np.ndarray:
    """float in [-1, 1] (clipped) -> uint8, rounded to nearest; inverse of `to_unit` on its image."""
    return np.clip(np.rint((values + 1.0) * 127.5), 0, 255).astype(np.uint8)


def encode_png(pixels: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """PNG bytes of uint8 [H, W, 3]; the same input gives the same bytes. `text` becomes iTXt chunks."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        chunks.add_itxt(name, value)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=6, pnginfo=chunks)
    return stream.getvalue()


def decode_rgb(image: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a raster file over white.

    Raises:
        ImageError: it is no picture.
    """
    picture = _read_raster(image)
    return over_color(_premultiply(np.asarray(picture)), (255, 255, 255))


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str] = (), *, cell: int = 128) -> np.ndarray:
    """A grid of pictures, row by row, each fitted to `cell` pixels, with an optional label above each row."""
    gap, strip = 4, 14 if labels else 0
    columns = max((len(row) for row in rows), default=0)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + len(rows) * (cell + gap + strip)), (245, 245, 245))
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * (cell + gap + strip)
        if r < len(labels):
            pen.text((gap, top), labels[r], fill=(40, 40, 40))
        for c, picture in enumerate(row):
            resample = Image.Resampling.NEAREST if picture.shape[0] < cell else Image.Resampling.BOX
            tile = Image.fromarray(picture).resize((cell, cell), resample)
            sheet.paste(tile, (gap + c * (cell + gap), top + strip))
    return np.asarray(sheet)
