"""Small made-up copies in the formats of COCO and WebQA, and a tiny stack whose 256 stage reads text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.checkpoint import publish_stage
from common.unet.unet import UNet
from tests.client.conftest import generator_address
from tests.generator_svc.conftest import generator, host, knowledge_base, make_generator, retrieval_address, weights
from tests.generator_svc.tiny_stack import TINY_256, TINY_UNETS, Host, Service, tiny_unet

__all__ = ["generator", "generator_address", "host", "knowledge_base", "make_generator", "retrieval_address", "weights"]

NAMES = ("guide dog", "red apple", "steam locomotive", "old oak tree", "castle")


def _photograph(path: Path, number: int) -> None:
    """None is square, and each has a color of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((90, 120 + 10 * number, 3), (40 * number, 200 - 30 * number, 90), np.uint8)
    pixels[20:60, 30:80] = (250 - 40 * number, 60, 30 * number)
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`captions_val2017.json`: five pictures, two captions each; one picture of a sixth entry is missing."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations = [], []
    for i, name in enumerate(NAMES):
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "license": 1})
        _photograph(root / "val2017" / f"{i:012d}.jpg", i)
        for j, text in enumerate((f"A {name}.", f"Somebody looks at a {name}.")):
            annotations.append({"id": 10 * i + j, "image_id": i, "caption": text})
    images.append({"id": 99, "file_name": "missing.jpg", "license": 1})
    annotations.append({"id": 990, "image_id": 99, "caption": "A picture that is not there."})
    path = root / "annotations" / "captions_val2017.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"images": images, "annotations": annotations, "licenses": [{"id": 1, "name": "CC"}]}))
    return path


@pytest.fixture(scope="session")
def wikiimages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WebQA's JSON: five facts, one of which has a date in its caption."""
    root = tmp_path_factory.mktemp("wikiimages")
    facts = [{"image_id": 100 + i, "caption": f"The {name} of the town"} for i, name in enumerate(NAMES)]
    facts[4]["caption"] = "The castle on 17 May 2012"
    for i, fact in enumerate(facts):
        _photograph(root / "images" / f"{fact['image_id']}.jpg", i)
    path = root / "webqa_val.json"
    path.write_text(json.dumps({"question": {"img_posFacts": facts[:3], "img_negFacts": facts[3:]}}))
    return path


@pytest.fixture(scope="session")
def guided_address(
    host: Host, make_generator: Callable[..., Service], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A generator whose 256 stage reads text, so that it can be guided."""
    folder = tmp_path_factory.mktemp("guided")
    reads_text = replace(TINY_256, text_attention=(False, True), text_width=384)
    for size, config in TINY_UNETS.items():
        config = reads_text if size == 256 else config
        unet = tiny_unet(size) if size != 256 else UNet(config)
        publish_stage(folder, size, config, unet.state_dict(), {"examples": 0})
    with host.running(make_generator(weights=folder)) as address:
        yield address
