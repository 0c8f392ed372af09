"""The training loop: draw a batch, one step, now and then look at what was learnt."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import build_unet
from common.stages import StageSpec, stage
from common.unet.unet import UNet
from trainer.batches import Batch, rng_of
from trainer.distributed import ALONE, Ranks
from trainer.loader import Loader, share_of
from trainer.loss import paired_losses
from trainer.presets import Preset
from trainer.run_folder import LOG, append_line, cut_log, held
from trainer.snapshots import save_snapshot, snapshot_every
from trainer.sources import Source
from trainer.state import RunState, check_newest, resume, save_state, set_aside, state_path, uses_bfloat16
from trainer.warm_start import WarmStart, begin_from
from trainer.watchdog import LED, Watchdog


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often the loop turns aside from training, in seconds; or in steps, which a resumed run meets again.

    Attributes:
        log_every_s: a line of `log.jsonl` on the steps since the one before; also before each evaluation, and at the end.
        evaluate_every_s: held-out losses, sample grids and plots.
        save_every_s: the run's state.
        evaluate_every_steps, save_every_steps: the same by steps, besides; 0: never.
    """

    log_every_s: float = 15.0
    evaluate_every_s: float = 600.0
    save_every_s: float = 240.0
    evaluate_every_steps: int = 0
    save_every_steps: int = 0


class Recorder(Protocol):
    """Hears what happens in a run, on its first rank."""

    def stepped(self, figures: dict[str, float], examples: int) -> None: ...

    def logged(self, line: dict[str, Any]) -> None: ...

    def saved(self, seconds: float) -> None: ...

    def pictured(self, name: str, picture: np.ndarray, step: int) -> None: ...


@dataclass(kw_only=True)
class Trainer:
    """One run of one preset in one folder, on one of its ranks.

    Attributes:
        warm_start: what a new run took over from other weights.
        damaged: states that were passed over; `enter_folder` renames them.
        stopping: the run ends after this step.
        hurried: a rank was asked to by a signal, and all end without a last evaluation: what sent it may not wait for long.
        signalled: the signal that this rank was sent; 0: none.
    """

    preset: Preset
    spec: StageSpec
    source: Source
    folder: Path
    device: torch.device
    state: RunState
    loader: Loader = field(default_factory=Loader)
    recorders: Sequence[Recorder] = ()
    watchdog: Watchdog | None = None
    warm_start: WarmStart | None = None
    damaged: Sequence[Path] = ()
    stopping: bool = False
    hurried: bool = False
    signalled: int = 0
    _whole: UNet | None = None
    _saved_step: int = -1

    @property
    def ranks(self) -> Ranks:
        return self.state.ranks

    def batches(self) -> Generator[Batch, None, None]:
        """This rank's shares of the batches from the run's position on, drawn while the steps before them run."""
        return self.loader.batches(self.draw, self.state.step, self.state.examples, self.preset.batch)

    def draw(self, step: int, examples: int) -> Batch:
        """This rank's share of the batch of a step, which is the same whatever the number of ranks."""
        whole = self.source.batch(rng_of(self.preset.seed, step), self.preset.side(examples))
        return whole if self.ranks.world == 1 else share_of(whole, self.ranks.rank, self.ranks.world)

    def learn(self, batch: Batch) -> dict[str, float]:
        """One optimizer step; a step whose gradient is not finite changes nothing on any rank, and says so."""
        state, preset = self.state, self.preset
        rate = preset.learning_rate * rate_at(preset, state.step, state.examples)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        share = self._backward(batch)
        clipped = torch.nn.utils.clip_grad_norm_(state.unet.parameters(), preset.clip_norm)
        norm = float(self.ranks.full(clipped))
        self._at("end")
        loss, broken = self.ranks.sums([float(share), float(not math.isfinite(norm))])
        if not broken:
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.examples += preset.batch
        if not broken:
            state.update_averages(preset)
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "skipped": float(broken > 0)}

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of the whole step's mean loss; gives what this rank's examples add to it."""
        ranks, parts = self.ranks, self.preset.accumulation
        total = torch.zeros((), device=self.device)
        for i in range(parts):
            part = share_of(batch, i, parts) if parts > 1 else batch
            part = part.to(self.device)
            weight = part.x0.shape[0] / self.preset.batch
            last = i == parts - 1
            with nullcontext() if last else ranks.without_exchange(self.state.objective):
                self._at("forward")
                with torch.autocast(self.device.type, torch.bfloat16, enabled=uses_bfloat16(self.preset, self.device)):
                    loss = self.state.objective(part)
                self._at("backward")
                (loss * (weight * ranks.world)).backward()  # the exchange takes the mean over the ranks
            total += loss.detach() * weight
        return total

    def _at(self, phase: str) -> None:
        if self.watchdog is not None:
            self.watchdog.at(self.state.step + 1, phase)

    def held_out_losses(self, num_batches: int = 4) -> dict[str, float]:
        """Paired losses of the averaged weights on held-out pairs, the same draws every time."""
        side = self.preset.side(self.state.examples)
        batches = [self.source.held_out_batch(rng_of(10**9 + i, 0), side).to(self.device) for i in range(num_batches)]
        with self.averaged() as unet:
            return paired_losses(unet, self.spec, batches)

    def averaged(self) -> AbstractContextManager[UNet]:
        """The U-Net with its averaged weights, for the length of a `with` block."""
        return _Swapped(self.state) if self._whole is None else nullcontext(self._whole)

    def average_weights(self) -> dict[str, Tensor]:
        """The average that is published, whole; all ranks together."""
        return {name: self.ranks.full(tensor) for name, tensor in self.state.average.items()}

    def save(self) -> Path:
        """Save the state; all ranks together."""
        self._at(LED)
        began = time.perf_counter()
        path = save_state(self.folder, self.state, self.preset)
        self._saved_step = self.state.step
        for recorder in self.recorders:
            recorder.saved(time.perf_counter() - began)
        return path

    def evaluate(self, look: Callable[[Trainer], None]) -> None:
        """Held-out losses, then `look`, on the first rank while the others wait; all ranks together."""
        self._at(LED)
        if self.ranks.parallel == "fsdp2":
            weights = self.average_weights()
            if self.ranks.leads:
                self._whole = build_unet(self.preset.unet, weights, self.folder).eval()

        def body() -> None:
            self.log({"kind": "held_out"} | self.held_out_losses())
            look(self)

        try:
            self.ranks.led(body)
        finally:
            self._whole = None

    def run(
        self, schedule: Schedule, show: Callable[[int, dict[str, float]], None], look: Callable[[Trainer], None]
    ) -> None:
        """Train until the preset's end or until asked to stop; the state is saved in either case.

        Args:
            schedule: how often to log, evaluate and save.
            show: called after each step with (examples, figures), for a progress bar; it may set `stopping`.
            look: called at each evaluation, writes pictures and plots.

        Raises:
            ValueError: another process trains in this folder, or a batch has too few neighbor sets for the ranks.
            OSError: the disk is full; the last state that was saved is whole.
        """
        if self.ranks.world * self.preset.accumulation > self.preset.groups:
            raise ValueError(
                f"preset.groups: {self.preset.groups} neighbor sets a step are fewer than "
                f"{self.ranks.world} ranks x {self.preset.accumulation} parts"
            )
        watching = self.watchdog.watching() if self.watchdog is not None else nullcontext()
        with self._alone(), self._until_asked_to_stop(), watching:
            self.ranks.led(self.enter_folder)
            self._loop(schedule, show, look)
            if self._saved_step != self.state.step:
                self.save()
            if not self.hurried:
                self.evaluate(look)

    def enter_folder(self) -> None:
        """Put away what was done after the state that the run goes on from; for who holds the folder, before the first step."""
        set_aside(self.damaged)
        check_newest(self.folder, self.state.step)
        step = self.state.step if state_path(self.folder, self.state.step).exists() else None
        lost = cut_log(self.folder, step)
        if lost:
            how = "are put aside" if step is None else f"go: they tell of more than step {step}"
            logging.info("%d lines of %s/%s %s", lost, self.folder, LOG, how)

    def _loop(
        self, schedule: Schedule, show: Callable[[int, dict[str, float]], None], look: Callable[[Trainer], None]
    ) -> None:
        clock = _Clock(schedule)
        window: list[dict[str, float]] = []
        with closing(self.batches()) as batches:
            while self.state.examples < self.preset.total_examples and not self.stopping:
                began = time.perf_counter()
                self._at("batch")
                batch = next(batches)
                waited = time.perf_counter() - began
                figures = self.learn(batch)
                figures |= {"data_wait_s": waited, "step_s": time.perf_counter() - began}
                window.append(figures)
                if self.ranks.leads:
                    self._tell(figures, show)
                evaluating, saving = self._agree(clock)
                if evaluating or clock.due("log"):
                    self._log_window(window, clock.restart("log"))
                    window = []
                if self.preset.ema == "post-hoc" and self.state.step % snapshot_every(self.preset) == 0:
                    self._at(LED)
                    save_snapshot(self.folder, self.state, self.preset)
                if evaluating:
                    self.evaluate(look)
                    clock.restart("evaluate")
                    clock.restart("log")  # its time is none of the steps'
                if saving:
                    self.save()
                    clock.restart("save")
        if window:
            self._log_window(window, clock.restart("log"))

    def _tell(self, figures: dict[str, float], show: Callable[[int, dict[str, float]], None]) -> None:
        for recorder in self.recorders:
            recorder.stepped(figures, self.preset.batch)
        show(self.state.examples, figures)

    def _agree(self, clock: _Clock) -> tuple[bool, bool]:
        """Whether to evaluate and to save now, as the first rank's clock says; and whether any rank was asked to stop."""
        leads, step = self.ranks.leads, self.state.step
        hurried, stop, evaluate, save = self.ranks.sums(
            [
                float(self.signalled > 0),
                float(self.stopping),
                float(leads and clock.due("evaluate", step)),
                float(leads and clock.due("save", step)),
            ]
        )
        self.hurried, self.stopping = hurried > 0, hurried + stop > 0
        return evaluate > 0, save > 0

    def _log_window(self, window: list[dict[str, float]], seconds: float) -> None:
        if self.ranks.leads:
            rate = len(window) * self.preset.batch / seconds
            self.log({"kind": "train", "examples_per_s": rate} | _mean(window))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = self.ranks.led(lambda: held(self.folder))
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    @contextmanager
    def _until_asked_to_stop(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the step that runs; the state is saved."""
        signals = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, lambda sent, _: setattr(self, "signalled", sent)) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, previous, strict=True):
                signal.signal(number, handler)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to the run's `log.jsonl`, and tell the recorders."""
        line = {
            "step": self.state.step,
            "examples": self.state.examples,
            "side": self.preset.side(self.state.examples),
        } | line
        append_line(self.folder, line)
        for recorder in self.recorders:
            recorder.logged(line)

    def picture(self, name: str, pixels: np.ndarray) -> None:
        """Tell the recorders of a picture uint8 [H, W, 3]."""
        for recorder in self.recorders:
            recorder.pictured(name, pixels, self.state.step)


def rate_at(preset: Preset, step: int, examples: int) -> float:
    """Share of the preset's learning rate that a step has, after so many steps and examples."""
    rate = min(1.0, (step + 1) / preset.warmup_steps)
    rate *= math.sqrt(min(1.0, preset.decay_examples / max(examples, 1)))
    if preset.cooldown_examples:
        rate *= min(1.0, (preset.total_examples - examples) / preset.cooldown_examples)
    return rate


class _Clock:
    """When the loop last turned aside, by task."""

    def __init__(self, schedule: Schedule) -> None:
        self._seconds = {
            "log": schedule.log_every_s,
            "evaluate": schedule.evaluate_every_s,
            "save": schedule.save_every_s,
        }
        self._steps = {"evaluate": schedule.evaluate_every_steps, "save": schedule.save_every_steps}
        self._last = dict.fromkeys(self._seconds, time.monotonic())

    def due(self, task: str, step: int = 0) -> bool:
        """Whether it is time for `task`; `step` counts for tasks that come by steps."""
        by_steps = self._steps.get(task, 0)
        return time.monotonic() - self._last[task] >= self._seconds[task] or (by_steps > 0 and step % by_steps == 0)

    def restart(self, task: str) -> float:
        """Seconds since `task` was last done; it counts from now on."""
        now = time.monotonic()
        since, self._last[task] = now - self._last[task], now
        return since


class _Swapped:
    def __init__(self, state: RunState) -> None:
        self.state = state

    def __enter__(self) -> UNet:
        unet = self.state.unet
        self.kept = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        unet.load_state_dict(self.state.average)
        return unet.eval()

    def __exit__(self, *_: object) -> None:
        self.state.unet.load_state_dict(self.kept)
        self.state.unet.train()


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps whose figure is finite; where none is, the last one."""
    finite = {name: [f[name] for f in window if math.isfinite(f[name])] for name in window[0]}
    return {name: float(np.mean(values)) if values else window[-1][name] for name, values in finite.items()}


def open_run(
    preset: Preset,
    source: Source,
    folder: Path,
    device: torch.device,
    start_from: Path | None = None,
    ranks: Ranks = ALONE,
) -> tuple[Trainer, list[str]]:
    """Open a run folder, resuming what is there; also a line for each damaged state that was passed over.

    Args:
        start_from: what a new run starts from (see `trainer.warm_start`), None: from the preset's seed. A run that has
            a state of its own goes on from that.
        ranks: over which the run is laid; all of them open it together.
    """
    ranks.led(lambda: folder.mkdir(parents=True, exist_ok=True))
    state, skipped = resume(folder, preset, device, ranks)
    trainer = Trainer(preset=preset, spec=stage(preset.stage), source=source, folder=folder, device=device, state=state)
    if start_from is not None and not state.step:
        trainer.warm_start = begin_from(state, preset, start_from)
    trainer.damaged = list(skipped)
    return trainer, list(skipped.values())
