"""The training loop: draw a batch, one step, now and then look at what was learnt."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import load_stage
from common.stages import StageSpec, stage
from trainer.batches import Batch, rng_of
from trainer.loss import paired_losses, training_loss
from trainer.presets import Preset
from trainer.sources import Source
from trainer.state import RunState, begin_from_weights, resume, save_state


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often, in seconds, the loop turns aside from training.

    Attributes:
        log_every_s: a line of `log.jsonl`.
        evaluate_every_s: held-out losses, sample grids and plots.
        save_every_s: the run's state.
    """

    log_every_s: float = 15.0
    evaluate_every_s: float = 600.0
    save_every_s: float = 240.0


@dataclass(kw_only=True)
class Trainer:
    """One run of one preset in one folder."""

    preset: Preset
    spec: StageSpec
    source: Source
    folder: Path
    device: torch.device
    state: RunState
    stopping: bool = False

    def batches(self) -> Generator[Batch, None, None]:
        """Batches from the run's position on, each made while the step before it runs."""
        with ThreadPoolExecutor(1) as pool:
            step, examples = self.state.step, self.state.examples
            coming = pool.submit(self.draw, step, examples)
            while True:
                batch = coming.result()
                step, examples = step + 1, examples + self.preset.batch
                coming = pool.submit(self.draw, step, examples)
                yield batch

    def draw(self, step: int, examples: int) -> Batch:
        """The batch of a step."""
        return self.source.batch(rng_of(self.preset.seed, step), self.preset.side(examples))

    def learn(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; a step whose gradient is not finite changes nothing and says so."""
        state, preset = self.state, self.preset
        rate = preset.learning_rate * min(1.0, (state.step + 1) / preset.warmup_steps)
        rate *= math.sqrt(min(1.0, preset.decay_examples / max(state.examples, 1)))
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = training_loss(state.unet, self.spec, batch.to(self.device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(state.unet.parameters(), preset.clip_norm)
        finite = bool(torch.isfinite(norm))
        if finite:
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.examples += preset.batch
        if finite:
            state.update_average(preset.ema_decay)
        return {
            "loss": float(loss.detach()),
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "skipped": float(not finite),
        }

    def held_out_losses(self, num_batches: int = 4) -> dict[str, float]:
        """Paired losses of the averaged weights on held-out pairs, the same draws every time."""
        side = self.preset.side(self.state.examples)
        batches = [self.source.held_out_batch(rng_of(10**9 + i, 0), side).to(self.device) for i in range(num_batches)]
        with self.averaged() as unet:
            return paired_losses(unet, self.spec, batches)

    def averaged(self) -> _Swapped:
        """The U-Net with its averaged weights, for the length of a `with` block."""
        return _Swapped(self.state)

    def save(self) -> Path:
        return save_state(self.folder, self.state, self.preset)

    def run(
        self, schedule: Schedule, show: Callable[[int, dict[str, float]], None], look: Callable[[Trainer], None]
    ) -> None:
        """Train until the preset's end or until asked to stop; the state is saved in either case.

        Args:
            schedule: how often to log, evaluate and save.
            show: called after each step with (examples, figures), for a progress bar.
            look: called at each evaluation, writes pictures and plots.

        Raises:
            ValueError: another process trains in this folder.
        """
        with self._alone(), self._until_asked_to_stop():
            self._loop(schedule, show, look)
            self.save()
            self.log({"kind": "held_out"} | self.held_out_losses())
            look(self)

    def _loop(
        self, schedule: Schedule, show: Callable[[int, dict[str, float]], None], look: Callable[[Trainer], None]
    ) -> None:
        last = dict.fromkeys(("log", "evaluate", "save"), time.monotonic())
        window: list[dict[str, float]] = []
        with closing(self.batches()) as batches:
            while self.state.examples < self.preset.total_examples and not self.stopping:
                waiting = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waiting
                figures = self.learn(batch) | {"data_wait_s": waited}
                window.append(figures)
                show(self.state.examples, figures)
                now = time.monotonic()
                if now - last["log"] >= schedule.log_every_s:
                    rate = len(window) * self.preset.batch / (now - last["log"])
                    self.log({"kind": "train", "examples_per_s": rate} | _mean(window))
                    window, last["log"] = [], now
                if now - last["evaluate"] >= schedule.evaluate_every_s:
                    self.log({"kind": "held_out"} | self.held_out_losses())
                    look(self)
                    last["evaluate"] = last["log"] = time.monotonic()
                    window = []
                if now - last["save"] >= schedule.save_every_s:
                    self.save()
                    last["save"] = time.monotonic()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run folder: two writers would overwrite each other's states."""
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"run: {self.folder} is being trained by another process") from None
            yield

    @contextmanager
    def _until_asked_to_stop(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the step that runs, and let the state be saved."""
        signals = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, lambda *_: setattr(self, "stopping", True)) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, previous, strict=True):
                signal.signal(number, handler)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the run's `log.jsonl`."""
        line = {
            "step": self.state.step,
            "examples": self.state.examples,
            "side": self.preset.side(self.state.examples),
        } | line
        with (self.folder / "log.jsonl").open("a") as stream:
            stream.write(json.dumps({"time": round(time.time(), 1)} | line) + "\n")


class _Swapped:
    def __init__(self, state: RunState) -> None:
        self.state = state

    def __enter__(self):
        unet = self.state.unet
        self.kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        unet.load_state_dict(self.state.average)
        return unet.eval()

    def __exit__(self, *_: object) -> None:
        self.state.unet.load_state_dict(self.kept)
        self.state.unet.train()


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([f[name] for f in window])) for name in window[0]}


def open_run(
    preset: Preset, source: Source, folder: Path, device: torch.device, start_from: Path | None = None
) -> tuple[Trainer, list[str]]:
    """Open a run folder, resuming what is there; also a line for each damaged state that was passed over.

    Args:
        start_from: a weights folder whose stage a new run starts from, None: from the preset's seed. A run that has a
            state of its own goes on from that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, skipped = resume(folder, preset, device)
    trainer = Trainer(preset=preset, spec=stage(preset.stage), source=source, folder=folder, device=device, state=state)
    if start_from is not None and not state.step:
        begin_from_weights(state, load_stage(start_from, preset.stage, device=str(device)))
    return trainer, skipped
