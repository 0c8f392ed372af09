"""Neighbors that wait for an order's first step in a stage: what they keep, and what becomes of others where they fail."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from common.stages import stage
from common.text import MAX_TOKENS
from common.unet.condition import Newcomers
from common.unet.unet import UNet
from generator_svc.live_bytes import live_bytes
from generator_svc.stage_engine import Job, StageEngine
from tests.generator_svc.test_triton_conformance import guidance, plans, text_inputs
from tests.generator_svc.tiny_stack import tiny_unet
from trainer.presets import PRESETS, preset


@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).unet.uses_neighbors])
def test_they_keep_less_than_is_taken_for_what_will_become_of_them(name: str) -> None:
    row = preset(name)
    with torch.device("meta"):
        shape = (1, row.neighbors, MAX_TOKENS)
        waiting = Newcomers(
            pictures=torch.empty(1, row.neighbors, 3, row.stage, row.stage),
            text=torch.empty(*shape, row.unet.text_width),
            text_mask=torch.empty(shape, dtype=torch.bool),
        )
    kept = sum(value.nbytes for value in vars(waiting).values() if value is not None)
    blind = replace(row.unet, neighbor_attention=tuple(False for _ in row.unet.widths), placement=False, boldness=0.0)
    with_them, without = (
        live_bytes(unet, row.stage, num_pictures=1, num_tokens=8, num_neighbors=row.neighbors, element_bytes=4)
        for unet in (replace(row.unet, placement=False, boldness=0.0), blind)
    )
    assert 0 < kept <= with_them - without


def stored(value: Any) -> dict[int, int]:
    """Bytes of each storage behind the tensors in it, by address."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    parts = value if isinstance(value, (list, tuple)) else vars(value).values() if is_dataclass(value) else ()
    return {address: size for part in parts for address, size in stored(part).items()}


@pytest.mark.parametrize("name", ["tiny-64", "demo-64"])
def test_an_order_keeps_what_is_taken_for_it_before_its_first_step_and_after(name: str) -> None:
    """With a text that is not to be drawn, and captions as long as they come. Masks, tables and the like are small."""
    engine = StageEngine(stage(64), UNet(preset(name).unet).eval(), max_batch=8, max_live_bytes=1 << 30)
    needed = engine.needed_bytes(num_pictures=2, num_tokens=2 * MAX_TOKENS, num_neighbors=2)
    job = engine.begin(plans(64, 1, 4, 2), text_inputs(1, 2, tokens=MAX_TOKENS, negative=MAX_TOKENS))
    for is_waiting in (True, False):
        assert all((each.newcomers is not None) == is_waiting for each in job.trajectories)
        kept = sum(stored(job.trajectories).values())
        assert 0.3 * needed < kept < needed + 8192, f"{kept} of {needed}"
        engine.advance([job])


def run(engine: StageEngine, *jobs: Job) -> None:
    while not all(job.is_over for job in jobs):
        engine.advance(jobs)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes an engine whose network has memory for this many rows."""

    def make(most_rows: int) -> StageEngine:
        unet = tiny_unet(64)
        forward = unet.dstack.forward

        def bounded(x: torch.Tensor, embedding: torch.Tensor, text: Any, mask: torch.Tensor) -> list[torch.Tensor]:
            if x.shape[0] > most_rows:
                raise torch.OutOfMemoryError("of the device")
            return forward(x, embedding, text, mask)

        unet.dstack.forward = bounded
        return StageEngine(stage(64), unet, max_batch=8, max_live_bytes=1 << 26)

    return make


@pytest.mark.parametrize("num_neighbors", [4, 9])
def test_who_brings_too_many_ends_alone(engine: Any, num_neighbors: int) -> None:
    """Four come into the pass, nine have one of their own: there is memory for neither."""
    cramped = engine(3)
    good, bad = (plans(64, seed, 2, guidance=guidance("joint", 1, 1, 0.0)) for seed in (1, 2))
    jobs = [cramped.begin(good, text_inputs(1, 2)), cramped.begin(bad, text_inputs(2, num_neighbors))]
    run(cramped, *jobs)
    assert isinstance(jobs[1].error, torch.OutOfMemoryError) and jobs[0].error is None
    alone = engine(99)
    job = alone.begin(good, text_inputs(1, 2))
    run(alone, job)
    assert jobs[0].pictures is not None and job.pictures is not None
    np.testing.assert_allclose(jobs[0].pictures, job.pictures, atol=1e-5)


def test_those_that_do_not_fit_beside_the_rows_of_a_pass_have_their_own(engine: Any) -> None:
    cramped, roomy = engine(4), engine(99)
    drawn = []
    for each in (cramped, roomy):
        jobs = [each.begin(plans(64, i, 2, guidance=guidance("joint", 1, 1, 0.0)), text_inputs(i, 2)) for i in range(3)]
        run(each, *jobs)
        assert [job.error for job in jobs] == [None] * 3
        drawn.append(np.stack([job.pictures for job in jobs if job.pictures is not None]))
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-5)
