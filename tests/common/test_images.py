"""Pictures: exact arithmetic on pixels, and every unreadable file an ImageError."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from common import images
from common.images import (
    ImageError,
    contact_sheet,
    decode_rgb,
    encode_png,
    enlarge_bicubic,
    from_unit,
    over_color,
    rasterize,
    shrink,
    to_unit,
)

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def svg(body: str, box: str = "0 0 8 8") -> bytes:
    return f'{HEAD}viewBox="{box}">{body}</svg>'.encode()


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


# ---- uint8 <-> [-1, 1] -------------------------------------------------------------------------------------------


def test_every_level_survives_the_round_trip() -> None:
    levels = np.arange(256, dtype=np.uint8)
    unit = to_unit(levels)
    assert unit.dtype == np.float32
    assert unit[0] == -1.0 and unit[255] == 1.0
    np.testing.assert_array_equal(from_unit(unit), levels)
    np.testing.assert_array_equal(from_unit(unit.astype(np.float64) + 0.9 / 255), levels), "rounded, not cut"
    np.testing.assert_array_equal(from_unit(np.array([-7.0, 7.0, 0.0])), [0, 255, 128])


# ---- alpha -------------------------------------------------------------------------------------------------------


def test_premultiplied_over_a_color_is_the_blend() -> None:
    """Every alpha and every level against exact arithmetic, within one level."""
    alpha, level = np.meshgrid(np.arange(256), np.arange(256))
    straight = np.stack([level, level, level, alpha], -1).astype(np.uint8)
    premultiplied = rasterize(encoded(straight, "png"), "png", 256)
    np.testing.assert_array_equal(premultiplied[..., 3], alpha)
    np.testing.assert_array_equal(premultiplied[..., 0], np.rint(level * alpha / 255 - 1e-9))
    assert (premultiplied[..., :3] <= premultiplied[..., 3:]).all()
    blended = over_color(premultiplied, (200, 0, 255))
    share = alpha[..., None] / 255
    exact = level[..., None] * share + np.array([200, 0, 255]) * (1 - share)
    assert np.abs(blended - exact).max() <= 1.0 + 1e-9


def test_over_color_ends() -> None:
    clear, opaque = np.zeros((2, 2, 4), np.uint8), np.full((2, 2, 4), 255, np.uint8)
    assert (over_color(clear, (1, 2, 3)) == (1, 2, 3)).all()
    assert (over_color(opaque, (1, 2, 3)) == 255).all()


# ---- resizing ----------------------------------------------------------------------------------------------------


@given(arrays(np.uint8, (2, 8, 12, 4)), st.sampled_from([1, 2, 4]))
def test_shrink_is_the_box_average(pixels: np.ndarray, factor: int) -> None:
    small = shrink(pixels, factor)
    blocks = pixels.reshape(2, 8 // factor, factor, 12 // factor, factor, 4).astype(np.float64)
    assert small.dtype == np.uint8
    np.testing.assert_array_equal(small, np.floor(blocks.mean((2, 4)) + 0.5))


def test_shrinking_twice_is_close_to_shrinking_once() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 4), np.uint8)
    assert np.abs(shrink(shrink(pixels, 2), 2).astype(int) - shrink(pixels, 4)).max() <= 1


def test_shrink_keeps_large_white_pictures_white() -> None:
    assert (shrink(np.full((512, 512, 1), 255, np.uint8), 512) == 255).all()


def test_shrink_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="12 x 20 is not divisible by 8"):
        shrink(PIXELS, 8)


def test_bicubic_is_pillows() -> None:
    expected = Image.fromarray(PIXELS[:, :12]).resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(enlarge_bicubic(PIXELS[:, :12], 48), np.asarray(expected))


# ---- PNG ---------------------------------------------------------------------------------------------------------


def test_png_round_trip_with_text_and_the_same_bytes_again() -> None:
    text = {"prompt": "a guide dog — 導盲犬", "seed": "7"}
    png = encode_png(PIXELS, text)
    assert png == encode_png(PIXELS.copy(), dict(text))
    assert png != encode_png(PIXELS, {"seed": "8"})
    np.testing.assert_array_equal(decode_rgb(png), PIXELS)
    assert Image.open(io.BytesIO(png)).text == text  # type: ignore[attr-defined]
    assert b"tIME" not in png, "a time would make each run's bytes differ"


def test_decoding_lays_transparency_over_white() -> None:
    straight = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    np.testing.assert_array_equal(decode_rgb(encoded(straight, "png")), [[[255, 0, 0], [255] * 3, [204] * 3]])


@pytest.mark.parametrize("kind", ["jpg", "webp", "png"])
def test_photographs_are_decoded(kind: str) -> None:
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    assert np.abs(decode_rgb(encoded(smooth, kind)).astype(int) - smooth).max() <= 12


# ---- rasterising -------------------------------------------------------------------------------------------------


def test_svg_is_drawn_at_the_size_asked() -> None:
    picture = rasterize(svg('<rect x="0" y="0" width="4" height="8" fill="#ff0000"/>'), "svg", 32)
    assert picture.shape == (32, 32, 4) and picture.dtype == np.uint8
    assert (picture[:, :16] == (255, 0, 0, 255)).all()
    assert (picture[:, 16:] == 0).all()


def test_svg_edges_are_premultiplied() -> None:
    picture = rasterize(svg('<circle cx="4" cy="4" r="3" fill="white" fill-opacity="0.5"/>'), "svg", 64)
    assert (picture[..., :3] <= picture[..., 3:]).all()
    assert tuple(picture[32, 32]) == (128, 128, 128, 128)


@pytest.mark.parametrize(
    ("box", "drawn"),
    [("0 0 8 4", (slice(8, 24), slice(0, 32))), ("0 0 4 8", (slice(0, 32), slice(8, 24)))],
)
def test_proportions_are_kept_and_centred(box: str, drawn: tuple[slice, slice]) -> None:
    picture = rasterize(svg('<rect width="8" height="8" fill="blue"/>', box), "svg", 32)
    expected = np.zeros((32, 32), bool)
    expected[drawn] = True
    np.testing.assert_array_equal(picture[..., 3] == 255, expected)
    wide, tall = encoded(np.zeros((10, 20, 3), np.uint8), "png"), encoded(np.zeros((20, 10, 3), np.uint8), "png")
    raster = rasterize(wide if box.endswith("8 4") else tall, "png", 32)
    np.testing.assert_array_equal(raster[..., 3] == 255, expected)


@pytest.mark.parametrize("box", ["0 0 1000 1", "0 0 1 1000"])
def test_a_sliver_costs_no_more_than_its_square(box: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 x 1,000,000 drawing must not become 256 x 256,000,000 pixels on the way to 256 x 256."""
    drawn: list[int] = []
    original = images.resvg_py.svg_to_bytes

    def spy(**options: Any) -> Any:
        png = bytes(original(**options))
        width, height = struct.unpack(">II", png[16:24])
        drawn.append(width * height)
        return png

    monkeypatch.setattr(images.resvg_py, "svg_to_bytes", spy)
    assert rasterize(svg('<rect width="1000" height="1000"/>', box), "svg", 32)[..., 3].any()
    assert max(drawn) <= 32 * 32


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x00\xff\xfe",
        f"{HEAD}viewBox='0 0 8 8'><rect width='1' hei".encode(),
        f"{HEAD}width='0' height='0'></svg>".encode(),
        f"{HEAD}viewBox='0 0 8 8'></svg>".encode("utf-16"),
        encoded(PIXELS, "png"),
    ],
)
def test_garbage_is_no_svg(content: bytes) -> None:
    with pytest.raises(ImageError, match="SVG"):
        rasterize(content, "svg", 16)


def test_an_svg_may_carry_a_picture_inside() -> None:
    """What some icon sets do: a raster as a data address, and a gradient that is named within the file."""
    inside = base64.b64encode(encoded(np.full((4, 4, 3), (0, 0, 255), np.uint8), "png")).decode()
    body = f'<image width="8" height="4" preserveAspectRatio="none" xlink:href="data:image/png;base64,{inside}"/>'
    body += '<linearGradient id="a"><stop stop-color="red"/></linearGradient>'
    body += '<linearGradient id="b" xlink:href="#a"/><rect y="4" width="8" height="4" fill="url(#b)"/>'
    picture = rasterize(svg(body), "svg", 8)
    assert (picture[1, 4] == (0, 0, 255, 255)).all() and (picture[6, 4] == (255, 0, 0, 255)).all()


def test_svg_bombs_are_refused_quickly() -> None:
    """Entities that multiply, and groups that use groups ten times over, eight deep."""
    entities = '<!ENTITY a "aaaaaaaaaa">' + "".join(
        f'<!ENTITY {chr(98 + i)} "{("&" + chr(97 + i) + ";") * 10}">' for i in range(9)
    )
    laughs = f'<!DOCTYPE svg [{entities}]>{HEAD}viewBox="0 0 8 8"><text>&j;</text></svg>'
    groups = '<g id="u0"><rect width="1" height="1"/></g>' + "".join(
        f'<g id="u{i}">' + f'<use xlink:href="#u{i - 1}"/>' * 10 + "</g>" for i in range(1, 9)
    )
    for bomb in (laughs.encode(), svg(groups)):
        with pytest.raises(ImageError):
            rasterize(bomb, "svg", 8)


FILTERED = '<filter id="f"><feImage {}="{}"/></filter><rect width="8" height="8" filter="url(#f)"/>'
SHOWN = '<image {}="{}" width="8" height="8"/>'


@pytest.mark.parametrize("element", [pytest.param(SHOWN, id="image"), pytest.param(FILTERED, id="feImage")])
@pytest.mark.parametrize("attribute", ["href", "xlink:href"])
@pytest.mark.parametrize("address", ["absolute", "relative", "file scheme", "character references"])
def test_an_svg_cannot_show_a_file_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, element: str, attribute: str, address: str
) -> None:
    """A corpus comes from strangers, and what its pictures show is sent to clients."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(np.full((8, 8, 3), (255, 0, 0), np.uint8), "png"))
    monkeypatch.chdir(tmp_path)
    named = {
        "absolute": str(secret),
        "relative": "secret.png",
        "file scheme": f"file://{secret}",
        "character references": "".join(f"&#{ord(letter)};" for letter in str(secret)),
    }[address]
    try:
        picture = rasterize(svg(element.format(attribute, named)), "svg", 8)
    except ImageError:
        return
    assert not (picture[..., 0] > picture[..., 1]).any(), "the file was read"


# ---- unreadable rasters ------------------------------------------------------------------------------------------


def test_damaged_pictures_are_image_errors() -> None:
    """Bytes flipped and files cut at random: a picture or an ImageError, nothing else."""
    rng = random.Random(0)
    sources = [encoded(PIXELS, kind) for kind in ("png", "jpg", "webp")]
    sources += [encode_png(PIXELS, {"prompt": "x" * 60}), encoded(PIXELS, "gif"), encoded(PIXELS, "tiff")]
    for source in sources:
        for _ in range(250):
            damaged = bytearray(source)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(min(len(damaged), rng.choice((40, 120, 10_000))))] = rng.randrange(256)
            if rng.random() < 0.2:
                damaged = damaged[: rng.randrange(len(damaged))]
            for read in (decode_rgb, lambda content: rasterize(content, "png", 8)):
                try:
                    read(bytes(damaged))
                except ImageError:
                    continue


READERS = [pytest.param(decode_rgb, id="decode"), pytest.param(lambda b: rasterize(b, "png", 8), id="rasterize")]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["cut header", "text bomb", "empty", "words"])
def test_crafted_pictures_are_image_errors(read, name: str) -> None:
    png = encoded(PIXELS, "png")
    bomb = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"\0" * (2 << 20), 9))
    content = {
        "cut header": png[:8] + chunk(b"IHDR", png[16:20]) + png[33:],
        "text bomb": png[:33] + bomb + png[33:],
        "empty": b"",
        "words": b"not a picture",
    }[name]
    with pytest.raises(ImageError):
        read(content)


@pytest.mark.parametrize("read", READERS)
def test_pictures_with_too_many_pixels_are_refused_before_they_are_decoded(read, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 200)
    with pytest.raises(ImageError, match="20 x 12"):
        read(encoded(PIXELS, "png"))
    read(encoded(PIXELS[:10, :20], "png"))


@pytest.mark.parametrize("read", READERS)
def test_a_png_that_claims_to_be_huge_is_refused(read) -> None:
    png = encoded(PIXELS, "png")
    header = struct.pack(">II", 9_000, 9_000) + png[24:29]
    with pytest.raises(ImageError, match="9000 x 9000"):
        read(png[:8] + chunk(b"IHDR", header) + png[33:])


# ---- contact sheets ----------------------------------------------------------------------------------------------


def test_contact_sheet_places_every_picture() -> None:
    red, blue = (np.broadcast_to(np.array(c, np.uint8), (8, 8, 3)) for c in ((255, 0, 0), (0, 0, 255)))
    sheet = contact_sheet([[red, blue], [blue]], cell=16)
    assert sheet.shape == (4 + 2 * 20, 4 + 2 * 20, 3)
    assert (sheet[4:20, 4:20] == red[0, 0]).all()
    assert (sheet[4:20, 24:40] == blue[0, 0]).all()
    assert (sheet[24:40, 4:20] == blue[0, 0]).all()
    assert (sheet[24:40, 24:40] == 245).all()
    labelled = contact_sheet([[red]], ["a label"], cell=64)
    assert labelled.shape == (4 + 64 + 4 + 14, 72, 3)
    assert (labelled[4:18] < 100).any(), "the label is written"
    assert contact_sheet([]).ndim == 3
