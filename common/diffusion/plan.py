"""A trajectory as data: whoever makes pictures writes a Plan, whoever holds the U-Net executes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.diffusion.guidance import Guidance, coefficients, is_number
from common.diffusion.parameterization import diffuse
from common.diffusion.randomness import MAX_SEED, generator, normal
from common.diffusion.sampler import SAMPLERS, Sampler, StepTable, make_table
from common.diffusion.schedule import SCHEDULES, ScheduleKind, alpha_sigma, log_snr
from common.diffusion.threshold import THRESHOLDINGS, Thresholding

MAX_STEPS = 1000
MAX_STAGE = 4096  # pixels
MAX_SAMPLE = 2**31
MIN_START_TIME = 1e-3  # below it, steps of a long trajectory are no longer told apart


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides one sample's trajectory through one stage, except the condition.

    Attributes:
        stage: side of the stage's picture in pixels.
        schedule: noise schedule of the stage.
        steps: number of denoising steps.
        sampler: `ddpm`, `ddim` or `dpmpp_2m`.
        guidance: strategy and weights.
        thresholding: `none`, `static` or `dynamic`.
        seed: of the request.
        sample: index of the picture within the request.
        augmentation: time in [0, 1) to which the low-resolution input is noised; 0 leaves it clean.
        start_time: time in [MIN_START_TIME, 1] of the first step; under 1 the trajectory begins with a picture noised to
            it (SDEdit, Meng et al. 2022), at 1 with noise.
    """

    stage: int
    schedule: ScheduleKind
    steps: int
    sampler: Sampler
    guidance: Guidance
    thresholding: Thresholding
    seed: int
    sample: int = 0
    augmentation: float = 0.0
    start_time: float = 1.0

    def __post_init__(self) -> None:
        for name in ("stage", "steps", "seed", "sample"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}: {getattr(self, name)!r} is no whole number")
        if not 1 <= self.stage <= MAX_STAGE:
            raise ValueError(f"stage: {self.stage} is not in [1, {MAX_STAGE}]")
        if not 0 <= self.sample <= MAX_SAMPLE:
            raise ValueError(f"sample: {self.sample} is not in [0, {MAX_SAMPLE}]")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: {self.schedule!r} is not one of {SCHEDULES}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps: {self.steps} is not in [1, {MAX_STEPS}]")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: {self.sampler!r} is not one of {SAMPLERS}")
        if self.thresholding not in THRESHOLDINGS:
            raise ValueError(f"thresholding: {self.thresholding!r} is not one of {THRESHOLDINGS}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed: {self.seed} is not in [0, {MAX_SEED}]")
        if not is_number(self.augmentation) or not 0.0 <= self.augmentation < 1.0:
            raise ValueError(f"augmentation: {self.augmentation!r} is not in [0, 1)")
        if not is_number(self.start_time) or not MIN_START_TIME <= self.start_time <= 1.0:
            raise ValueError(f"start_time: {self.start_time!r} is not in [{MIN_START_TIME:g}, 1]")

    def times(self) -> np.ndarray:
        """Times of the steps' starts, evenly from `start_time` downwards [N]; the last step ends at 0."""
        return np.linspace(self.start_time, 0.0, self.steps + 1)[:-1]

    def table(self) -> StepTable:
        """The steps' numbers."""
        draws = generator(self.seed, self.stage, self.sample, "branches").random(self.steps)
        return make_table(self.sampler, log_snr(self.schedule, self.times()), coefficients(self.guidance, draws))

    def start(self, picture: np.ndarray | None = None) -> np.ndarray:
        """x_t at `start_time`, float32 [3, stage, stage]: noise, or alpha x + sigma eps of `picture`, in [-1, 1].

        Raises:
            ValueError: the trajectory begins after time 1 and there is no picture, or it has another shape.
        """
        shape = (3, self.stage, self.stage)
        eps = normal(generator(self.seed, self.stage, self.sample, "start"), shape)
        if picture is None:
            if self.start_time < 1.0:
                raise ValueError(f"start_time: {self.start_time} begins with a picture, and none is given")
            return eps
        if picture.shape != shape:
            raise ValueError(f"start: {list(picture.shape)} is not {list(shape)}")
        alpha, sigma = alpha_sigma(log_snr(self.schedule, self.start_time))
        return diffuse(picture.astype(np.float32, copy=False), eps, float(alpha), float(sigma))

    def step_noise(self) -> np.random.Generator:
        """The generator of the noise that ancestral steps add."""
        return generator(self.seed, self.stage, self.sample, "steps")

    def augmentation_log_snr(self) -> float:
        """log-SNR of the low-resolution input."""
        return float(log_snr(self.schedule, self.augmentation))

    def augmentation_noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """The noise that is mixed into the low-resolution input, float32 of `shape`."""
        return normal(generator(self.seed, self.stage, self.sample, "augmentation"), shape)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes the same plan."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Plan:
        """Inverse of `to_json`; unknown or missing names are a TypeError, values out of range a ValueError.

        What `to_json` has come to say since a plan was written may be missing: it has its default.
        """
        given: dict[str, Any] = dict(document)
        if "guidance" in given:
            given["guidance"] = Guidance(**given["guidance"])
        return cls(**given)
