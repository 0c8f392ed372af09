"""From a run's averaged weights to a real tritonserver: what is served predicts what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import load_stage
from common.unet.unet import UNet
from deploy.local.tritonserver import TritonSettings, running_triton
from generator_svc.export import ExportSettings, export
from generator_svc.stage_tensors import StageRequest
from tests.generator_svc.test_triton_conformance import plain_loop, plans, text_inputs
from tests.generator_svc.triton_server import stream
from trainer.fit import open_run
from trainer.presets import preset
from trainer.publish import publish

ORDER = plans(64, 3, 4), text_inputs(5, 2)
SAME = 1e-5
ROUNDED = 2 / 255  # fp16 weights, through four steps, on the mean; a pixel may go over to another neighbor


def test_a_run_is_served_as_it_was_trained(tmp_path: Path) -> None:
    tiny, nothing = preset("tiny-64"), Any
    trainer, _ = open_run(tiny, nothing, tmp_path / "run", torch.device("cpu"))  # type: ignore[arg-type]
    # Not every network will do: one whose weights are chance may weigh two neighbors as all but equal, and rounding decides.
    torch.manual_seed(8)
    for tensor in trainer.state.average.values():
        tensor += 0.05 * torch.randn_like(tensor)
    publish(trainer, tmp_path / "weights", "abc")
    versions = export(
        ExportSettings(
            weights=tmp_path / "weights", repository=tmp_path / "r", models="unet_64", threads=1, batches="1"
        )
    )
    assert versions == {"unet_64": 1}
    card = json.loads((tmp_path / "r" / "unet_64" / "1" / "card.json").read_text())
    assert card["trained"]["preset"] == "tiny-64" and card["trained"]["corpus_fingerprint"] == "abc"
    assert 0 < card["trained"]["rounding_error"] < 0.005
    settings = TritonSettings(repository=tmp_path / "r", log=tmp_path / "triton.log")
    with running_triton(settings) as server, stream(server) as opened:
        opened.send("unet_64", StageRequest(plans=ORDER[0], inputs=ORDER[1]), name="a")
        served = opened.finish({"a"})["a"][-1].pictures
    assert served is not None
    published = plain_loop(load_stage(tmp_path / "weights", 64).unet, ORDER)
    assert np.abs(served - published).max() <= SAME
    with trainer.averaged() as unet:
        trained = plain_loop(_same(unet), ORDER)
    assert np.abs(served - trained).mean() <= ROUNDED
    assert float(np.std(trained)) > 0.05, "a picture of one color would be the same whatever the weights"


def _same(unet: UNet) -> UNet:
    return unet.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
