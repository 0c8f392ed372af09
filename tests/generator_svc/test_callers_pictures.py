"""Pictures of callers: any kind is read as a person sees it; what harms or is none is refused by the field's name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image as Pictures
from reimagen.generator.v1 import generator_pb2 as pb

from client.generator import GenerationFailed, GeneratorClient, Reference, StartFrom
from tests.generator_svc.asking import QUICK, TIMEOUT_S, draw, found, pixels
from tests.generator_svc.tiny_stack import Host, Service

TURNED_RIGHT = 6  # EXIF orientation: turn it clockwise to see it upright


def file_of(picture: Pictures.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def half_red() -> Pictures.Image:
    drawn = np.full((48, 48, 3), 255, np.uint8)
    drawn[:, :24] = (220, 20, 20)
    return Pictures.fromarray(drawn)


PNG = file_of(half_red(), "PNG")


def bomb() -> bytes:
    """A small PNG of 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


HARMFUL = {
    "empty": (b"", "empty"),
    "text": (b"a guide dog", "none of PNG"),
    "gif": (b"GIF89a" + bytes(100), "none of PNG"),
    "head of a png": (PNG[:60], "not a picture"),
    "cut": (PNG[:-40], "not a picture"),
    "bomb": (bomb(), "60000"),
    "large": (PNG + bytes(4 << 20), "bytes"),
    "svg that reads a file": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd" width="9" height="9"/></svg>',
        "not an SVG",
    ),
    "svg that is deep": (b"<svg xmlns='http://www.w3.org/2000/svg'>" + b"<g>" * 5000, "not an SVG"),
    "no svg": (b"<html></html>", "not an SVG"),
}


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("field", ["references[0].image", "start_from.image"])
def test_what_is_no_picture_or_harms_is_refused_by_name(client: GeneratorClient, name: str, field: str) -> None:
    image, named = HARMFUL[name]
    given: dict[str, Any] = {"start_from": StartFrom(image=image)}
    if field.startswith("references"):
        given = {"references": (Reference(image=image, caption=""),)}
    with pytest.raises(GenerationFailed, match=named) as caught:
        draw(client, replace(QUICK, **given))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("same", "tolerance"),
    [
        (file_of(half_red(), "WEBP", lossless=True), 0),
        (file_of(half_red().convert("RGBA"), "PNG"), 0),
        (file_of(half_red().convert("P", palette=Pictures.Palette.ADAPTIVE), "PNG"), 0),
        (file_of(half_red().rotate(90), "PNG", exif=Pictures.Exif()), None),
    ],
    ids=["webp", "with alpha", "palette", "turned"],
)
def test_a_picture_is_read_alike_from_any_file(client: GeneratorClient, same: bytes, tolerance: int | None) -> None:
    def drawn(image: bytes) -> np.ndarray:
        return pixels(draw(client, replace(QUICK, start_from=StartFrom(image=image, strength=0.3))))

    difference = np.abs(drawn(PNG) - drawn(same)).max()
    assert difference > 0 if tolerance is None else difference <= tolerance


def test_a_photograph_is_turned_upright(client: GeneratorClient) -> None:
    exif = Pictures.Exif()
    exif[0x0112] = TURNED_RIGHT
    lying = file_of(half_red().rotate(90), "JPEG", exif=exif, quality=100, subsampling=0)
    reference = Reference(image=lying, caption="my dog")
    (neighbor,) = found(draw(client, replace(QUICK, references=(reference,)))).neighbors
    with Pictures.open(io.BytesIO(neighbor.image)) as upright:
        left, right = (np.asarray(upright.convert("RGB"))[24, x].astype(int) for x in (4, 44))
    assert left[0] > 150 > left[1] and right.min() > 200, "red on the left, as the camera saw it"


def test_many_large_pictures_fit_into_one_request_and_too_many_do_not(
    host: Host, make_generator: Callable[..., Service], client: GeneratorClient
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    reference = Reference(image=file_of(Pictures.fromarray(noise), "PNG"), caption="noise")
    assert len(reference.image) > 2 << 20
    assert len(found(draw(client, replace(QUICK, references=(reference,) * 5))).neighbors) == 5
    with host.running(make_generator(max_request_bytes=8 << 20)) as address, GeneratorClient(address) as bounded:
        with pytest.raises(GenerationFailed) as caught:
            draw(bounded, replace(QUICK, references=(reference,) * 4))
        assert caught.value.code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
        assert draw(bounded, QUICK)


@pytest.mark.parametrize("method", ["Generate", "GenerateImages"])
def test_bytes_that_are_no_message_are_refused_and_harm_nobody(
    client: GeneratorClient, generator: Service, method: str
) -> None:
    not_utf8 = pb.GenerateRequest(prompt="dog").SerializeToString().replace(b"dog", b"\xff\xfe\xfd")
    with grpc.insecure_channel(generator.settings.address) as channel:
        path = f"/reimagen.generator.v1.GeneratorService/{method}"
        for content in (not_utf8, b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream(path)(content, timeout=TIMEOUT_S))  # type: ignore[call-overload]
            error: Any = caught.value
            assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    assert draw(client, QUICK)
