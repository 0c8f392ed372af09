"""The readers of captions, trained by themselves: they learn, keep to themselves, and begin a run that goes on."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import load_stage, publish_stage
from common.unet.unet import UNet
from tests.trainer.shapes import WIDTH
from trainer.__main__ import main
from trainer.batches import Batch
from trainer.dataset import Prepared, spoken_caption
from trainer.look import read_log
from trainer.presets import Preset
from trainer.readers import Readers, ReadersPlan
from trainer.run_folder import append_line
from trainer.sources import NeighborSource
from trainer.state_file import read_tensors


def states_of(caption: str) -> np.ndarray:
    """A made-up text encoder: a word and the one before it have a direction each, as in an encoder that reads in context."""
    words = caption.replace(",", " ,").split()
    said = [[word, f"{before} {word}"] for before, word in zip(["", *words], words, strict=False)]
    drawn = [
        [np.random.default_rng(zlib.crc32(text.encode())).standard_normal(WIDTH) for text in pair] for pair in said
    ]
    return np.array(drawn, np.float16).sum(1)


@pytest.fixture(scope="module")
def worded(prepared: Prepared) -> Prepared:
    """The prepared corpus, its captions encoded by words."""
    described = zip(prepared.keys, prepared.entities, prepared.styles, prepared.scenes, strict=True)
    encoded = [
        states_of(spoken_caption(key, variant, entity, style, scene))
        for key, entity, style, scenes in described
        for variant, scene in enumerate(scenes)
    ]
    return replace(prepared, states=np.concatenate(encoded), offsets=np.cumsum([0, *map(len, encoded)]))


def unet_of(row: Preset, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(row.unet)


def weights_of(unet: UNet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


def test_the_loss_falls_and_captions_never_seen_are_read_ever_better(worded: Prepared, tiny: Preset) -> None:
    unet = unet_of(tiny)
    before = weights_of(unet)
    readers = Readers(unet, tiny, worded, ReadersPlan(steps=120, captions=32, learning_rate=3e-3, warmup_steps=5))
    first, losses = readers.held_out(), []
    readers.fit(lambda step, figures: losses.append(figures))
    last = readers.held_out()
    for name in ("placement_loss", "preference_loss"):
        curve = [figures[name] for figures in losses]
        assert np.mean(curve[-10:]) < 0.5 * np.mean(curve[:10]), name
    assert last["color_error"] < first["color_error"] / 2 and last["place_error"] < first["place_error"] / 2, last
    changed = {name for name, tensor in unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("placement.", "preference.")) for name in changed)


def test_pictures_without_several_neighbors_name_none(
    worded: Prepared, tiny: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of them counts for nothing; where there are no others there is no figure."""
    readers = Readers(unet_of(tiny), tiny, worded, ReadersPlan(captions=8))
    drawn, alone = NeighborSource.held_out_batch, {0, 2}
    drawn_so_far: list[int] = []

    def fewer(source: NeighborSource, rng: np.random.Generator, side: int) -> Batch:
        batch = drawn(source, rng, side)
        drawn_so_far.append(0)
        if (len(drawn_so_far) - 1) % 4 in alone:
            batch.neighbor_mask[:, 1:] = False
        return batch

    of_all = readers.held_out(4)["neighbor_named"]
    monkeypatch.setattr(NeighborSource, "held_out_batch", fewer)
    some = readers.held_out(4)["neighbor_named"]
    assert 0.0 <= of_all < 0.95 and some < 0.95, "were those without counted as named, they would be half of it"
    alone |= {1, 3}
    assert set(readers.held_out(4)) == {"color_error", "place_error"}


def test_they_are_the_same_whatever_was_drawn_or_learnt_before(worded: Prepared, tiny: Preset) -> None:
    found = []
    for seed in (0, 1):
        unet = unet_of(tiny, seed)
        Readers(unet, tiny, worded, ReadersPlan(steps=3, captions=8)).fit(lambda step, figures: None)
        found.append(Readers.named_tensors(unet))
    assert found[0] and all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_a_run_begins_from_them_and_goes_on(prepared_folder: Path, tiny: Preset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    given = ["--preset", "tiny-64", "--data", str(prepared_folder), "--run", str(run), "--threads", "1"]
    for steps in (0, 1, 2):  # of a training that was interrupted before
        append_line(run, {"kind": "readers", "step": 0, "readers_step": steps, "color_error": 1.0})
    assert main(["fit-readers", *given, "--steps", "2", "--captions", "8"]) == 0
    tensors, header = read_tensors(run / "state-00000000.safetensors")
    fresh = unet_of(tiny, tiny.seed).state_dict()
    for name, tensor in fresh.items():
        learnt = name.startswith(("placement.", "preference."))
        assert torch.equal(tensors[f"weights/{name}"], tensors[f"average/{name}"]), name
        assert learnt or torch.equal(tensors[f"weights/{name}"], tensor), name
    assert not torch.equal(tensors["weights/placement.to_out.weight"], fresh["placement.to_out.weight"])
    lines = read_log(run)
    assert [line["readers_step"] for line in lines] == [0, 1, 2] and lines[-1]["color_error"] > 0
    assert (run / "readers.png").is_file() and (run / "run.json").is_file() and header["examples"] == "0"
    assert main(["fit", *given, "--examples", "8"]) == 0
    assert [line["kind"] for line in read_log(run)] == ["readers"] * 3 + ["train", "held_out"]
    assert sorted(path.name for path in run.glob("state-*")) == [f"state-0000000{step}.safetensors" for step in (0, 1)]


def test_published_weights_are_given_new_readers(prepared_folder: Path, tiny: Preset, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    before = unet_of(tiny, 7)
    publish_stage(weights, 64, tiny.unet, before.state_dict(), {"step": 3, "examples": 24})
    given = ["--preset", "tiny-64", "--data", str(prepared_folder), "--run", str(tmp_path / "run"), "--threads", "1"]
    given += ["--steps", "2", "--captions", "8", "--start-from", str(weights)]
    assert main(["fit-readers", *given, "--weights", str(weights)]) == 0
    after = load_stage(weights, 64)
    assert (after.trained["examples"], after.trained["preset"]) == (24, "tiny-64") and after.trained["held_out_loss"]
    theirs = {name: tensor.half().float() for name, tensor in before.state_dict().items()}
    kept = {name for name, tensor in after.unet.state_dict().items() if torch.equal(tensor, theirs[name])}
    assert set(theirs) - kept and not any(name.startswith("placement.to_out") for name in kept)
    assert all(name.startswith(("placement.", "preference.")) for name in set(theirs) - kept)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--preset", "tiny-256"], "--preset: tiny-256 has no readers of captions"),
        (["--preset", "tiny-64", "--steps", "0"], "--steps: 0 is not 1 or more"),
        (["--preset", "tiny-64", "--weights", "w"], "--weights: readers alone draw nothing"),
        (["--preset", "tiny-64", "--start-from", "/nowhere"], "--start-from: /nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(
    prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    run = tmp_path / "run"
    assert main(["fit-readers", "--data", str(prepared_folder), "--run", str(run), *flags]) == 2
    assert named in capsys.readouterr().err and not list(run.glob("state-*"))


def test_a_run_that_has_begun_is_not_begun_again(
    prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state-00000004.safetensors").touch()
    assert main(["fit-readers", "--preset", "tiny-64", "--data", str(prepared_folder), "--run", str(tmp_path)]) == 2
    assert "holds states already" in capsys.readouterr().err
