"""Small runs that are trained on one rank and on several, and must be the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.fit import Trainer
from trainer.presets import Preset, preset

STEPS = 4
_ROW = replace(preset("tiny-64"), curriculum=((3 * 8, 16), (2**62, 32)), total_examples=10**6)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its preset, how its weights are laid, and at which step the last rank's batch is spoilt (0: never)."""

    name: str
    parallel: str
    row: Preset
    spoilt: int = 0


CASES = (
    Case(name="ddp", parallel="ddp", row=_ROW),
    Case(name="fsdp2", parallel="fsdp2", row=_ROW),
    Case(name="uneven", parallel="ddp", row=replace(_ROW, groups=3)),
    Case(name="parts", parallel="ddp", row=replace(_ROW, accumulation=2), spoilt=3),
    Case(
        name="everything",
        parallel="fsdp2",
        row=replace(
            _ROW,
            accumulation=2,
            activation_checkpointing=True,
            optimizer="adafactor",
            ema="post-hoc",
            ema_decay=0.0,
            ema_lengths=(0.05, 0.1),
        ),
        spoilt=2,
    ),
)


def curve(trainer: Trainer, steps: int, case: Case) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and whether it was skipped, of each of so many steps."""
    seen = []
    for _ in range(steps):
        batch = trainer.draw(trainer.state.step, trainer.state.examples)
        if trainer.state.step + 1 == case.spoilt and trainer.ranks.rank == trainer.ranks.world - 1:
            batch.x0[-1, 0, 0, 0] = float("nan")
        figures = trainer.learn(batch)
        seen.append((figures["loss"], figures["gradient_norm"], figures["skipped"]))
    return seen
