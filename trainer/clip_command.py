"""`python -m trainer fit-clip`: the demonstration's dual encoder, from a public trunk to what a service loads."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from common.dual_encoder import FILE, DualEncoder, ImageTower, load_dual_encoder
from common.files import sha256_file
from common.text import TextEncoder, packaged_encoder
from trainer.clip_features import Features, Progress, write_features
from trainer.dataset import Prepared, open_prepared
from trainer.dual_encoder import DEMO_CLIP, DualEncoderPreset
from trainer.fit_dual_encoder import open_dual_encoder_run
from trainer.image_trunk import lite0, read_trunk


def add_clip_flags(command: argparse.ArgumentParser) -> None:
    """The flags of `fit-clip`, beside `--data`."""
    command.add_argument("--run", type=Path, default=Path("runs/clip"), help="folder of the run (default: %(default)s)")
    command.add_argument("--weights", type=Path, default=Path("weights/clip"), help="folder to publish in")
    command.add_argument(
        "--trunk", type=Path, help="checkpoint of EfficientNet-Lite0 (default: the trunk in --weights)"
    )
    command.add_argument("--steps", type=int, help="stop after so many steps in all; the run can be resumed")
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")


def fit_clip(flags: argparse.Namespace, progress: Progress) -> None:
    """Compute features, train the projections, publish once the run has reached its end."""
    torch.set_num_threads(flags.threads)
    preset, prepared = DEMO_CLIP, open_prepared(flags.data)
    model = DualEncoder(lite0(preset.side, preset.taps), hidden=preset.hidden, size=prepared.states.shape[1])
    origin = _take_trunk(model.tower, flags.trunk, flags.weights)
    features = open_features(prepared, flags.run, model.tower, preset, origin, progress)
    run = open_dual_encoder_run(preset, features, flags.run, model)
    end = min(flags.steps or preset.steps, preset.steps)
    with tqdm(desc=preset.name, total=end, initial=run.step, unit="step", mininterval=2.0) as bar:

        def show(step: int, loss: float) -> bool:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            return step < end

        if run.step < end:
            run.run(show)
    if run.step < preset.steps:
        logging.warning("stopped after %d of %d steps: nothing is published", run.step, preset.steps)
        return
    print(run.publish(flags.weights, {"corpus_fingerprint": prepared.fingerprint, "trunk": origin}))


def open_features(
    prepared: Prepared, run: Path, tower: ImageTower, preset: DualEncoderPreset, origin: str, progress: Progress
) -> Features:
    """The features of this corpus and this trunk, computed where they are not there yet."""
    taps = "-".join(map(str, preset.taps))
    folder = run / f"features-{prepared.fingerprint[:12]}-{origin[:12]}-{preset.side}-{taps}"
    return write_features(prepared, folder, tower, preset.views, lambda: TextEncoder(packaged_encoder()), progress)


def _take_trunk(tower: ImageTower, checkpoint: Path | None, weights: Path) -> str:
    """Load the trunk; gives the sha256 of the checkpoint that it comes from first of all."""
    if checkpoint is not None:
        tower.load_state_dict(read_trunk(checkpoint, tower.config).state_dict())
        origin = sha256_file(checkpoint)
    elif (weights / FILE).is_file():
        published, _, trained = load_dual_encoder(weights)
        if published.config != tower.config:
            raise ValueError(f"--weights: the trunk in {weights} has another architecture; name a --trunk")
        tower.load_state_dict(published.tower.state_dict())
        origin = str(trained["trunk"])
    else:
        raise ValueError(f"--trunk: is needed, {weights} holds no dual encoder to take it from")
    # Rounded as it is published, so that a run that begins from the published trunk computes the same features.
    tower.half().float().to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
    return origin
