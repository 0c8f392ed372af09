"""Whatever a stranger calls a picture: taken in as it is, brought into form, or refused with the reason."""

from __future__ import annotations

import base64
import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from common import pictures
from common.images import ImageError, decode_rgb, rasterize
from common.pictures import MAX_IMAGE_BYTES, take_in

SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 8 8">{}</svg>'
RECT = '<rect width="8" height="8" fill="red"/>'
RED, BLUE = (255, 0, 0), (0, 0, 255)


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def plain(size: tuple[int, int] = (32, 16), color: tuple[int, ...] = RED, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, color)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises that many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refusal(image: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        take_in(image)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "stored"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_plain_picture_is_kept_byte_for_byte(kind: str, stored: str) -> None:
    image = encoded(plain(), kind)
    taken = take_in(image)
    assert (taken.image, taken.format) == (image, stored)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_every_mode_that_readers_know_is_kept(mode: str) -> None:
    image = encoded(plain().convert(mode), "PNG")
    assert take_in(image).image == image
    assert decode_rgb(image).shape == (16, 32, 3)


def test_the_format_is_told_by_content_not_by_name() -> None:
    """A polyglot: a PNG with a zip, a script and an SVG behind it is a PNG; an SVG behind a comment is an SVG."""
    png = encoded(plain(), "PNG") + b"PK\x03\x04<script>" + SVG.format(RECT).encode()
    assert take_in(png).format == "png"
    svg = b"\xef\xbb\xbf\n<!-- PNG JFIF RIFF -->" + SVG.format(RECT).encode()
    assert take_in(svg) == pictures.Picture(image=svg, format="svg")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "empty"),
        (b"\x00" * 100, "not a picture"),
        (b"no picture at all", "not a picture"),
        (b"<html><body>404</body></html>", "root is 'html'"),
        (b"<svg", "not XML"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (encoded(plain(), "GIF"), "a GIF file; svg, png, jpg and webp"),
        (encoded(plain(), "BMP"), "a BMP file"),
        (encoded(plain(), "TIFF"), "a TIFF file"),
        (bytes(MAX_IMAGE_BYTES + 1), f"{MAX_IMAGE_BYTES + 1} bytes"),
        (png_that_claims(60_000, 60_000), "decompression bomb"),
        (png_that_claims(8001, 8000), "more than 64000000"),
        (png_that_claims(40_000, 2), "40000 x 2 pixels; a side has at most 16384"),
        (png_that_claims(100, 100), "not a picture"),
    ],
)
def test_what_is_no_picture_or_too_large_is_refused_by_name(image: bytes, reason: str) -> None:
    assert reason in refusal(image)


def test_a_jpeg_of_40000_pixels_is_refused() -> None:
    assert "40000 x 1" in refusal(encoded(plain((40_000, 1)), "JPEG"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused(kind: str) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8)
    image = encoded(Image.fromarray(noise), kind)
    assert "not a picture" in refusal(image[: len(image) // 2])


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_kept(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = encoded(plain(), kind, save_all=True, append_images=[plain(color=BLUE)], duration=50, **options)
    taken = take_in(image)
    assert taken.format == "png"
    with Image.open(io.BytesIO(taken.image)) as kept:
        assert not getattr(kept, "is_animated", False)
    assert (decode_rgb(taken.image) == RED).all()


def test_cmyk_becomes_rgb() -> None:
    profile = b"a profile that describes inks"
    image = encoded(plain(color=(0, 255, 255, 0), mode="CMYK"), "JPEG", quality=100, icc_profile=profile)
    taken = take_in(image)
    with Image.open(io.BytesIO(taken.image)) as kept:
        assert (taken.format, kept.mode) == ("jpg", "RGB")
        assert "icc_profile" not in kept.info
    assert np.abs(decode_rgb(taken.image).astype(int) - RED).max() < 8


def test_sixteen_bits_become_eight() -> None:
    deep = np.linspace(0, 65535, 32 * 16).reshape(16, 32).astype(np.uint16)
    taken = take_in(encoded(Image.fromarray(deep), "PNG"))
    assert (decode_rgb(taken.image)[..., 0] == deep >> 8).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_turned_upright(kind: str, orientation: int) -> None:
    """A picture with a red corner, stored as the camera held it: everyone sees the corner where Pillow's viewer does."""
    upright = np.full((48, 64, 3), 200, np.uint8)
    upright[:16, :16] = RED
    undo = {6: 90, 8: -90, 3: 180}
    stored = Image.fromarray(upright)
    if orientation in undo:
        stored = stored.rotate(undo[orientation], expand=True)
    elif orientation != 1:
        flips = {2: Image.Transpose.FLIP_LEFT_RIGHT, 4: Image.Transpose.FLIP_TOP_BOTTOM}
        flips |= {5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE}
        stored = stored.transpose(flips[orientation])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = encoded(stored, kind, exif=exif.tobytes(), quality=95)
    taken = take_in(image)
    assert (taken.image == image) == (orientation == 1)
    seen = decode_rgb(taken.image).astype(int)
    assert seen.shape == upright.shape and np.abs(seen - upright).mean() < 6
    with Image.open(io.BytesIO(taken.image)) as kept:
        assert kept.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert take_in(taken.image) == taken


def test_exif_that_makes_no_sense_is_passed_over() -> None:
    image = encoded(plain(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
    assert take_in(image).image == image


def test_a_picture_that_grows_too_large_when_written_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3), np.uint8)) for n in range(2)]
    image = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], quality=10)
    monkeypatch.setattr(pictures, "MAX_IMAGE_BYTES", len(image) + 10)
    assert "when written upright" in refusal(image)


def test_an_svg_is_kept_byte_for_byte_and_can_be_drawn() -> None:
    body = f'<defs><g id="a">{RECT}</g></defs><use xlink:href="#a"/>'
    declared = '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "svg11.dtd">'
    svg = (declared + SVG.format(body)).encode()
    assert take_in(svg) == pictures.Picture(image=svg, format="svg")
    assert (rasterize(svg, "svg", 4) == (255, 0, 0, 255)).all()


def laughs() -> str:
    lines = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    return f'<!DOCTYPE svg [<!ENTITY e0 "ha">{lines}]>' + SVG.format("<text>&e9;</text>")


def raster(picture: bytes, kind: str = "png") -> str:
    return f'<image width="8" height="8" href="data:image/{kind};base64,{base64.b64encode(picture).decode()}"/>'


def chained(kind: str, wrap: str, length: int, times: int) -> str:
    """Groups, each of which refers to the one before it so many times."""
    parts = [f'<{kind} id="i0">{RECT}</{kind}>']
    parts += [f'<{kind} id="i{n}">{wrap.format(n - 1) * times}</{kind}>' for n in range(1, length)]
    return SVG.format("".join(parts) + wrap.format(length - 1))


USE, MASKED = '<use href="#i{}"/>', '<rect width="8" height="8" mask="url(#i{})"/>'
STYLED = "<style>rect{mask:url(#i5)}</style>"
EFFECT = '<filter id="f">{}</filter><rect width="8" height="8" filter="url(#f)"/>'


@pytest.mark.parametrize(
    ("svg", "reason"),
    [
        (laughs(), "entity 'e0'"),
        (SVG.format('<image href="/etc/hostname" width="8" height="8"/>'), "outside"),
        (SVG.format('<image title=">" href="/etc/hostname" width="8" height="8"/>'), "outside"),
        (SVG.format('<image x:href="file:///etc/hostname" xmlns:x="http://www.w3.org/1999/xlink"/>'), "outside"),
        (SVG.format('<image href="https://example.org/a.png"/>'), "outside"),
        (SVG.format('<image href="data:image/svg+xml;base64,PHN2Zy8+"/>'), "outside"),
        (SVG.format(EFFECT.format('<feImage href="/etc/hostname"/>')), "outside"),
        (SVG.format(raster(png_that_claims(60_000, 60_000))), "decompression bomb"),
        (SVG.format(raster(b"nonsense", "webp")), "not a picture"),
        (SVG.format("<g>" * 5000 + "</g>" * 5000), "in one another"),
        (SVG.format("<g>" * 70 + "</g>" * 70), "in one another"),
        (SVG.format("<g/>" * 50_001), "more than 50000"),
        (chained("g", USE, 8, 10), "draws more than"),
        (chained("mask", MASKED, 8, 10), "draws more than"),
        (chained("g", USE, 100, 1), "nested deeper"),
        (SVG.format('<g id="a"><use href="#a"/></g>'), "refers to itself"),
        (SVG.format(EFFECT.format('<feTurbulence numOctaves="100000000" baseFrequency="1"/>')), "feTurbulence"),
        (SVG.format(EFFECT.format('<feMorphology radius="100000000"/>')), "feMorphology"),
        (SVG.format(EFFECT.format('<feGaussianBlur stdDeviation="1"/>' * 9000)), "draws more than"),
    ],
)
def test_an_svg_that_would_do_harm_is_refused_at_once(svg: str, reason: str) -> None:
    started = time.process_time()  # not the clock on the wall: others may have the machine
    assert reason in refusal(svg.encode())
    assert time.process_time() - started < 5


def test_a_marker_counts_at_each_point() -> None:
    marker = f'<marker id="m">{RECT * 50}</marker>'
    few, many = "M0 0L1 1", "M0 0" + "L1 1" * 20_000
    path = '<path marker-mid="url(#m)" d="{}"/>'
    assert take_in(SVG.format(marker + path.format(few)).encode()).format == "svg"
    assert "draws more than" in refusal(SVG.format(marker + path.format(many)).encode())


def test_a_style_sheet_counts_for_every_element() -> None:
    nested = chained("mask", MASKED, 5, 5).removesuffix("</svg>")
    styled = f"{nested}<style>rect{{mask:url(#i4)}}</style>{RECT * 2000}</svg>"
    assert "draws more than" in refusal(styled.encode())
    gradient = '<linearGradient id="i4"><stop stop-color="red"/></linearGradient><style>rect{fill:url(#i4)}</style>'
    assert take_in(SVG.format(gradient + RECT * 2000).encode()).format == "svg"


def test_an_svg_in_another_encoding_is_refused() -> None:
    assert "not an SVG" in refusal(
        ('<?xml version="1.0" encoding="utf-16"?>' + SVG.format(RECT)).encode("latin-1") + b"\xff"
    )
