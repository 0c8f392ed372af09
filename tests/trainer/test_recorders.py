"""What a run tells TensorBoard and Prometheus."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.service.metrics import MetricsEndpoint, process_registry
from trainer.dataset import Prepared
from trainer.fit import Schedule, Trainer, open_run
from trainer.fit_command import LogLines
from trainer.look import read_log
from trainer.presets import Preset
from trainer.sources import NeighborSource
from trainer.tensorboard_log import ALL_PICTURES, TensorBoardLog
from trainer.training_metrics import TrainingMetrics

EACH_STEP = Schedule(log_every_s=0.0, evaluate_every_s=1e9, save_every_s=1e9, save_every_steps=2)


def run_of(steps: int, row: Preset, prepared: Prepared, folder: Path) -> Trainer:
    row = replace(row, curriculum=((2**62, 16),), total_examples=steps * row.batch)
    return open_run(row, NeighborSource(prepared=prepared, preset=row), folder, torch.device("cpu"))[0]


def a_picture(trainer: Trainer) -> None:
    """What `look` tells the recorders, without the work."""
    trainer.picture("samples", np.zeros((2, 2, 3), np.uint8))


def test_tensorboard_reads_the_run(prepared: Prepared, tiny: Preset, tmp_path: Path) -> None:
    """The log's figures by step, and the grid; what a resumed run does again replaces what was lost."""
    for steps in (2, 4):
        trainer = run_of(steps, tiny, prepared, tmp_path)
        board = TensorBoardLog(tmp_path, trainer.state.step)
        trainer.recorders = [board]
        trainer.run(EACH_STEP, lambda examples, figures: None, a_picture)
        board.close()
        if steps == 2:  # a part that is lost: it was told, and never saved
            lost = TensorBoardLog(tmp_path, 2)
            lost.logged({"kind": "train", "step": 3, "examples": 24, "side": 16, "loss": 99.0})
            lost.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    read.Reload()
    told = {event.step: event.value for event in read.Scalars("train/loss")}
    log = {line["step"]: line["loss"] for line in read_log(tmp_path) if line["kind"] == "train"}
    assert told == pytest.approx(log) and list(told) == [1, 2, 3, 4]
    assert {"train/gradient_norm", "train/data_wait_s", "train/examples_per_s", "held_out/full"} <= set(
        read.Tags()["scalars"]
    )
    assert [image.step for image in read.Images("samples")] == [2, 4]


def test_tensorboard_forgets_what_a_run_that_begins_anew_had_told(tmp_path: Path) -> None:
    for loss in (99.0, 0.5):  # the first was killed before it saved a state
        board = TensorBoardLog(tmp_path, 0)
        board.logged({"kind": "train", "step": 1, "examples": 8, "side": 16, "loss": loss})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [0.5]


def test_pictures_of_a_long_run_grow_rarer(tmp_path: Path) -> None:
    board = TensorBoardLog(tmp_path, 0)
    for step in range(1000):
        board.pictured("samples", np.zeros((2, 2, 3), np.uint8), step)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    steps = [event.step for event in events.Reload().Images("samples")]
    assert steps[:ALL_PICTURES] == list(range(ALL_PICTURES))
    doubling = ALL_PICTURES // 2
    assert len(steps) == ALL_PICTURES + sum(-(-min(2**k, 1000 - 2**k) * doubling // 2**k) for k in range(6, 10))


def test_prometheus_is_told_of_steps_states_and_losses(
    prepared: Prepared, tiny: Preset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Over HTTP. The preset is the only label that a caller chooses; one step is not finite."""
    trainer = run_of(4, tiny, prepared, tmp_path)
    registry = process_registry("trainer", revision="r")
    trainer.recorders = [TrainingMetrics(registry, trainer.preset.name), LogLines()]
    draw = trainer.source.batch

    def spoilt(rng, side):
        batch = draw(rng, side)
        if trainer.state.step == 0:
            batch.x0[0, 0, 0, 0] = float("nan")
        return batch

    trainer.source = type(
        "Spoilt", (), {"batch": staticmethod(spoilt), "held_out_batch": trainer.source.held_out_batch}
    )()
    endpoint = MetricsEndpoint(registry, host="127.0.0.1", port=0)
    try:
        with caplog.at_level("INFO"):
            trainer.run(EACH_STEP, lambda examples, figures: None, lambda trainer: None)
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
            families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
    finally:
        endpoint.close()
    found = {s.name: s for f in families.values() for s in f.samples if "le" not in s.labels}
    values = {name.removeprefix("reimagen_trainer_"): s.value for name, s in found.items() if "trainer" in name}
    skipped = sum(line.get("skipped", 0) for line in read_log(tmp_path))
    assert (values["steps_total"], values["samples_total"]) == (4, 4 * tiny.batch)
    assert values["nonfinite_total"] == skipped > 0
    assert values["step_duration_seconds_count"] == values["data_wait_seconds_count"] == 4
    assert values["checkpoint_duration_seconds_count"] == 2
    assert values["checkpoint_last_success_timestamp_seconds"] > 1e9
    last = [line for line in read_log(tmp_path) if line["kind"] == "train"][-1]
    assert values["loss"] == last["loss"] and values["grad_norm"] == last["gradient_norm"]
    assert values["learning_rate"] == last["learning_rate"]
    conditions = {s.labels["condition"] for s in families["reimagen_trainer_held_out_loss"].samples}
    assert conditions == {"full", "text_only", "neighbors_only", "none", "wrong_neighbors"}
    labels = {key for name, s in found.items() if "trainer_" in name for key in s.labels}
    assert labels == {"preset", "condition"}
    assert sum("examples, train: " in line for line in caplog.messages) == 4
    assert any(line.startswith("state saved in") for line in caplog.messages)
