"""The three stages of the cascade, one frozen row each: what training, export and sampling derive everything from."""

from __future__ import annotations

from dataclasses import dataclass

from common.diffusion.guidance import Guidance
from common.diffusion.parameterization import Prediction
from common.diffusion.plan import Plan
from common.diffusion.sampler import Sampler
from common.diffusion.schedule import ScheduleKind
from common.diffusion.threshold import Thresholding


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage.

    Attributes:
        size: side of the picture it makes, pixels.
        low_res_size: side of the picture it starts from; 0 for the first stage.
        schedule: Imagen, section 2.4: cosine for 64 and 256, linear for 1024.
        prediction: what its U-Net says. x0 everywhere: clean pictures need less of a narrow network than noise does (Li
            & He 2025, arXiv 2511.13720); in super-resolution as a residual over the enlarged input.
        neighbors: whether its U-Net attends to neighbors.
        steps, sampler, guidance, thresholding, augmentation: sampling defaults, see `Plan`.
        train_augmentation: largest time to which training noises the low-resolution input.
        loss_gamma: cap of the loss weight, see `loss_weight`.
    """

    size: int
    low_res_size: int
    schedule: ScheduleKind
    prediction: Prediction
    neighbors: bool
    steps: int
    sampler: Sampler
    guidance: Guidance
    thresholding: Thresholding
    augmentation: float
    train_augmentation: float
    loss_gamma: float

    @property
    def name(self) -> str:
        return f"unet_{self.size}"

    @property
    def scale(self) -> int:
        """How many times larger than its input; 1 for the first stage."""
        return self.size // self.low_res_size if self.low_res_size else 1

    def plan(self, seed: int, sample: int = 0) -> Plan:
        """The stage's default plan."""
        return Plan(
            stage=self.size,
            schedule=self.schedule,
            steps=self.steps,
            sampler=self.sampler,
            guidance=self.guidance,
            thresholding=self.thresholding,
            seed=seed,
            sample=sample,
            augmentation=self.augmentation,
        )


NO_GUIDANCE = Guidance(strategy="joint", text_weight=1.0, neighbor_weight=1.0, eta=1.0)

STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        size=64,
        low_res_size=0,
        schedule="cosine",
        prediction="x0",
        neighbors=True,
        # Each step more redraws a little of what is laid from neighbors (the ablation of samplers and steps).
        steps=4,
        sampler="ddim",
        # Weights of one guide nowhere: more makes what is taken over from neighbors harsh, and adds no entity.
        guidance=Guidance(strategy="weighted", text_weight=1.0, neighbor_weight=1.0, eta=0.2),
        thresholding="dynamic",
        augmentation=0.0,
        train_augmentation=0.0,
        loss_gamma=25.0,
    ),
    StageSpec(
        size=256,
        low_res_size=64,
        schedule="cosine",
        prediction="x0",
        neighbors=False,
        steps=4,  # twice as many add 0.1 dB
        sampler="ddim",
        guidance=NO_GUIDANCE,
        thresholding="static",
        augmentation=0.0,
        train_augmentation=0.3,
        loss_gamma=5.0,
    ),
    StageSpec(
        size=1024,
        low_res_size=256,
        schedule="linear",
        prediction="x0",
        neighbors=False,
        steps=2,  # twice as many add 0.1 dB
        sampler="ddim",
        guidance=NO_GUIDANCE,
        thresholding="static",
        augmentation=0.0,
        train_augmentation=0.2,
        loss_gamma=5.0,
    ),
)


def stage(size: int) -> StageSpec:
    """The stage that makes pictures of `size` pixels.

    Raises:
        ValueError: there is none.
    """
    for spec in STAGES:
        if spec.size == size:
            return spec
    raise ValueError(f"stage: {size} is not one of {[spec.size for spec in STAGES]}")
