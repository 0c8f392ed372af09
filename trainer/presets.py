"""Named training runs: one row is one complete configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from common.unet.config import UNetConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A training run.

    Attributes:
        name: of the row.
        stage: side of the stage's picture, see `common.stages`.
        unet: architecture.
        curriculum: (examples seen, side in pixels) steps: until that many examples, train at that side; the last
            side goes on. Super-resolution trains on crops of its side.
        groups, draws: a batch is `groups` sets of neighbors times `draws` pictures that share them.
        neighbors: k, pairs that condition a picture.
        time_exponent: training times are u^time_exponent, u uniform: below 1, noisier pictures are seen more often.
        text_dropout, neighbor_dropout: independent probabilities of the null condition (Re-Imagen, section 3.3).
        clean_share: of a super-resolution stage's examples, whose input is not noised: what is sampled without augmentation
            is seen as often as it matters.
        learning_rate, warmup_steps, decay_examples: linear warm-up, constant, then 1 / sqrt past `decay_examples`.
        cooldown_examples: the last so many, over which the rate besides falls linearly to zero (Hagele et al. 2024, arXiv
            2405.18392).
        ema: how the averaged weights are averaged: "classic", exponentially with `ema_decay`; or "post-hoc", as power
            functions of the step, whose length is chosen after training (Karras et al. 2024, arXiv 2312.02696, section 3).
        ema_decay: of the classic average, reached by warm-up (1 + step) / (10 + step); 0 for a post-hoc one.
        ema_lengths: relative standard deviations of the averages that a post-hoc run keeps, the one that is shown and
            published first; none for a classic one.
        clip_norm: global gradient norm is clipped to this.
        total_examples: the run ends here.
        seed: of every draw.
        text_encoder: the frozen text encoder, a folder or hub name; empty: the packaged MiniLM.
        optimizer: "adam", or "adafactor", which keeps factored second moments alone (Shazeer & Stern 2018).
        accumulation: a step's batch is taken in this many parts, one after the other, whose gradients are summed.
        precision: of the passes: "bfloat16" under autocast, "float32", or "auto": bfloat16 on a GPU. Weights, gradients
            and the optimizer are float32 always.
        activation_checkpointing: whether blocks are computed again in the backward pass instead of being remembered.
    """

    name: str
    stage: int
    unet: UNetConfig
    curriculum: tuple[tuple[int, int], ...]
    groups: int
    draws: int
    neighbors: int
    time_exponent: float
    text_dropout: float
    neighbor_dropout: float
    learning_rate: float
    warmup_steps: int
    decay_examples: int
    clip_norm: float
    total_examples: int
    seed: int
    clean_share: float = 0.1
    cooldown_examples: int = 0
    ema_decay: float = 0.0
    ema: Literal["classic", "post-hoc"] = "classic"
    ema_lengths: tuple[float, ...] = ()
    text_encoder: str = ""
    optimizer: Literal["adam", "adafactor"] = "adam"
    accumulation: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.accumulation < 1 or self.groups % self.accumulation:
            raise ValueError(f"preset.accumulation: {self.accumulation} does not divide groups {self.groups}")
        if (self.ema == "classic") != (0.0 < self.ema_decay < 1.0) or (self.ema == "post-hoc") != bool(
            self.ema_lengths
        ):
            raise ValueError(
                f"preset.ema: {self.ema!r} with ema_decay {self.ema_decay} and ema_lengths {self.ema_lengths}: "
                "a classic average has a decay in (0, 1), a post-hoc one has lengths"
            )

    @property
    def batch(self) -> int:
        return self.groups * self.draws

    def side(self, examples: int) -> int:
        """Side of the pictures (or crops) trained at after `examples`."""
        return next((side for until, side in self.curriculum if examples < until), self.curriculum[-1][1])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_DEMO_64 = Preset(
    name="demo-64",
    stage=64,
    unet=UNetConfig(
        patch=2,
        widths=(48, 96, 256),
        blocks=(1, 2, 2),
        attention=(False, False, True),
        text_attention=(False, False, True),
        neighbor_attention=(False, True, True),
        head_width=32,
        text_width=384,
        embedding_width=256,
        scale=1,
        skip_scale=1.0,
        positions=True,
        placement=True,
        boldness=20.0,
    ),
    curriculum=((400_000, 32), (2**62, 64)),
    groups=6,
    draws=4,
    neighbors=2,
    time_exponent=0.6,
    text_dropout=0.1,
    neighbor_dropout=0.1,
    learning_rate=1e-3,
    warmup_steps=200,
    decay_examples=200_000,
    ema_decay=0.997,
    clip_norm=1.0,
    total_examples=4_000_000,
    seed=0,
)

_DEMO_256 = replace(
    _DEMO_64,
    name="demo-256",
    clean_share=0.5,
    stage=256,
    unet=UNetConfig(
        patch=4,
        widths=(64, 128),
        blocks=(2, 2),
        attention=(False, False),
        text_attention=(False, False),
        neighbor_attention=(False, False),
        head_width=32,
        text_width=0,
        embedding_width=128,
        scale=4,
        skip_scale=1.0,
        positions=True,
        placement=False,
        consistent=True,
    ),
    curriculum=((2**62, 64),),
    groups=16,
    draws=1,
    neighbors=0,
    time_exponent=0.5,  # of their few steps all but the last begin where hardly more than the input is seen
    decay_examples=60_000,
    total_examples=400_000,
)

_DEMO_1024 = replace(
    _DEMO_256,
    name="demo-1024",
    stage=1024,
    unet=UNetConfig(
        patch=4,
        widths=(48, 64, 96),
        blocks=(2, 2, 1),
        attention=(False, False, False),
        text_attention=(False, False, False),
        neighbor_attention=(False, False, False),
        head_width=32,
        text_width=0,
        embedding_width=128,
        scale=4,
        skip_scale=1.0,
        positions=True,
        placement=False,
        consistent=True,
    ),
    curriculum=((2**62, 128),),
)

_TINY_UNET = UNetConfig(
    patch=2,
    widths=(16, 32),
    blocks=(1, 1),
    attention=(False, True),
    text_attention=(False, True),
    neighbor_attention=(True, True),
    head_width=8,
    text_width=384,
    embedding_width=32,
    scale=1,
    skip_scale=1.0,
    positions=True,
    placement=True,
)
_TINY_64 = replace(
    _DEMO_64,
    name="tiny-64",
    unet=_TINY_UNET,
    curriculum=((64, 16), (2**62, 32)),
    groups=4,
    draws=2,
    warmup_steps=4,
    total_examples=128,
)
_TINY_SR_UNET = replace(
    _TINY_UNET,
    patch=4,
    attention=(False, False),
    text_attention=(False, False),
    neighbor_attention=(False, False),
    text_width=0,
    scale=4,
    placement=False,
)
_TINY_256 = replace(
    _DEMO_256,
    name="tiny-256",
    # Its few steps are to lower a loss that bicubic enlargement of clean inputs, and a time that leans to noise, hardly leave
    # any of.
    clean_share=0.1,
    time_exponent=1.0,
    unet=_TINY_SR_UNET,
    curriculum=((2**62, 32),),
    groups=4,
    warmup_steps=4,
    total_examples=64,
)

_TINY_256_NEIGHBORS = replace(
    _TINY_256,
    name="tiny-256-neighbors",
    unet=replace(
        _TINY_UNET,
        patch=1,
        widths=(8, 16, 32),
        blocks=(0, 1, 1),
        attention=(False, False, False),
        text_attention=(False, False, True),
        neighbor_attention=(False, False, True),
        scale=4,
        skip_scale=2**-0.5,
        positions=False,
        placement=False,
    ),
    neighbors=2,
)

_PAPER_STEPS, _PAPER_BATCH = 200_000, 2048  # Re-Imagen, section 4.1; Imagen, section 3

_PAPER_64 = Preset(
    name="paper-64",
    stage=64,
    unet=UNetConfig(
        patch=1,
        widths=(640, 1280, 1920, 2560),
        blocks=(3, 3, 3, 3),
        attention=(False, True, True, True),
        text_attention=(False, True, True, True),
        neighbor_attention=(False, True, True, True),
        head_width=64,
        text_width=4096,
        embedding_width=2560,
        scale=1,
        skip_scale=2**-0.5,
        positions=True,
        placement=False,
    ),
    curriculum=((2**62, 64),),
    groups=_PAPER_BATCH,
    draws=1,
    neighbors=2,
    time_exponent=1.0,
    text_dropout=0.1,
    neighbor_dropout=0.1,
    learning_rate=1e-4,
    warmup_steps=10_000,
    decay_examples=2**62,
    ema_decay=0.9999,
    clip_norm=1.0,
    total_examples=_PAPER_STEPS * _PAPER_BATCH,
    seed=0,
    text_encoder="google/t5-v1_1-xxl",
    optimizer="adafactor",
    accumulation=32,  # on eight GPUs: eight examples a pass
    precision="bfloat16",
    activation_checkpointing=False,
)

_PAPER_64_SMALL = replace(
    _PAPER_64,
    name="paper-64-small",
    unet=replace(_PAPER_64.unet, widths=(512, 1024, 1536, 2048), blocks=(2, 2, 3, 3), embedding_width=512),
)

_PAPER_256 = replace(
    _PAPER_64,
    name="paper-256",
    stage=256,
    unet=replace(
        _PAPER_64.unet,
        widths=(128, 128, 256, 512, 1024),
        blocks=(0, 2, 4, 8, 8),
        attention=(False, False, False, False, True),
        text_attention=(False, False, False, False, True),
        neighbor_attention=(False, False, False, True, True),
        embedding_width=1536,
        scale=4,
    ),
    curriculum=((2**62, 256),),
    optimizer="adam",
)

_PAPER_1024 = replace(
    _PAPER_256,
    name="paper-1024",
    stage=1024,
    unet=replace(
        _PAPER_256.unet,
        blocks=(0, 2, 4, 5, 5),
        attention=(False, False, False, False, False),
        embedding_width=1024,
        positions=False,
    ),
    curriculum=((2**62, 256),),  # crops: Imagen, section 2.4
)

_ROWS = (
    _DEMO_64,
    _DEMO_256,
    _DEMO_1024,
    _TINY_64,
    _TINY_256,
    _TINY_256_NEIGHBORS,
    _PAPER_64,
    _PAPER_64_SMALL,
    _PAPER_256,
    _PAPER_1024,
)
PRESETS: dict[str, Preset] = {p.name: p for p in _ROWS}


def preset(name: str) -> Preset:
    """The row of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: {name!r} is not one of {sorted(PRESETS)}")
    return PRESETS[name]
