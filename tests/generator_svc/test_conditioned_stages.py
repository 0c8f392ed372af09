"""Super-resolution that reads text and neighbors, as the paper's does: the weights say so, and are given them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.generator import GeneratorClient, StageOverrides, StartFrom
from common.checkpoint import publish_stage
from common.images import encode_png
from common.unet.unet import UNet
from deploy.local.tritonserver import TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from tests.generator_svc.asking import REQUEST, draw, pixels
from tests.generator_svc.tiny_stack import TINY_256, Host, Service

CONDITIONED = replace(
    TINY_256, text_width=384, attention=(False, True), text_attention=(False, True), neighbor_attention=(False, True)
)
ORANGE = encode_png(np.full((64, 64, 3), (255, 128, 0), np.uint8))
ENLARGED = replace(
    REQUEST,
    start_from=StartFrom(image=ORANGE, stage=256, strength=1.0),
    stop_at=256,
    stages=(StageOverrides(stage=256, steps=2),),
)


@pytest.fixture(scope="module")
def conditioned(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny weights, but for a middle stage that reads text and neighbors."""
    folder = tmp_path_factory.mktemp("conditioned") / "weights"
    shutil.copytree(weights, folder)
    torch.manual_seed(5)
    unet = UNet(CONDITIONED)
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in unet.state_dict().items()}
    publish_stage(folder, 256, CONDITIONED, tensors, {"examples": 0})
    return folder


def test_it_is_given_text_and_neighbors(
    host: Host, make_generator: Callable[..., Service], conditioned: Path, retrieval_address: str, tmp_path: Path
) -> None:
    others = {
        "without neighbors": replace(ENLARGED, without_neighbors=True),
        "another text": replace(ENLARGED, prompt=ENLARGED.prompt.replace("guide dog", "red apple")),
    }
    with host.running(make_generator(weights=conditioned)) as address, GeneratorClient(address) as client:
        drawn = pixels(draw(client, ENLARGED))
        for name, other in others.items():
            assert np.abs(pixels(draw(client, other)) - drawn).max() > 0, name
    repository = tmp_path / "models"
    export(ExportSettings(weights=conditioned, repository=repository, threads=1, batches="1"))
    assert "dims: [-1, 256, 256, 3]" in (repository / "unet_256" / "config.pbtxt").read_text()
    with running_triton(TritonSettings(repository=repository, log=tmp_path / "triton.log")) as server:
        service = make_generator(weights=None, stages="triton", triton_addresses=server.address)
        with host.running(service) as address, GeneratorClient(address) as client:
            served = pixels(draw(client, ENLARGED))
    assert np.abs(served - drawn).max() <= 1
