"""What is asked for, as plain data in the words of generator.proto."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.diffusion.guidance import Strategy
from common.diffusion.plan import Plan
from common.diffusion.sampler import Sampler
from common.diffusion.threshold import Thresholding
from common.stages import STAGES
from generator_svc.picture_files import ImageFormat
from generator_svc.recorded import Recorded

DEFAULT_K, MAX_K = 2, 64
MAX_PICTURES = 8
SIZES = tuple(spec.size for spec in STAGES)
DEFAULT_STRENGTH = {SIZES[0]: 0.6}  # of a stage that begins with a picture; 1 at the others: plain enlargement

PriorityName = Literal["low", "normal", "high"]


@dataclass(frozen=True, kw_only=True)
class StageOverrides:
    """Departures of one stage from its defaults; None keeps the default. The fields are those of `Plan`."""

    stage: int
    steps: int | None = None
    sampler: Sampler | None = None
    guidance_strategy: Strategy | None = None
    text_weight: float | None = None
    neighbor_weight: float | None = None
    eta: float | None = None
    thresholding: Thresholding | None = None
    augmentation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A pair of the caller's own; `image` is a picture file."""

    image: bytes
    caption: str = ""
    author: str = ""
    source: str = ""
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class StartFrom:
    """A picture file to begin with; None leaves the stage or the strength to the service."""

    image: bytes
    stage: int | None = None
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request, in the words of generator.proto; None where nothing was said.

    Attributes:
        method: the retrieval method's name, e.g. `METHOD_BM25`; empty leaves it to retrieval.
    """

    prompt: str = ""
    k: int | None = None
    knowledge_base: str = ""
    method: str = ""
    excluded_pair_ids: tuple[str, ...] = ()
    exclude_exact: bool = False
    without_neighbors: bool = False
    num_pictures: int | None = None
    seed: int | None = None
    stop_at: int | None = None
    stages: tuple[StageOverrides, ...] = ()
    preview_every: int = 0
    negative_prompt: str = ""
    references: tuple[Reference, ...] = ()
    seeds: tuple[int, ...] = ()
    start_from: StartFrom | None = None
    image_format: ImageFormat = "png"
    every_stage: bool = False
    priority: PriorityName = "normal"
    request_id: str = ""
    record_json: str = ""


@dataclass(frozen=True, kw_only=True)
class StageReads:
    """What a stage's weights are conditioned on."""

    text: bool
    neighbors: bool


@dataclass(frozen=True, kw_only=True)
class CheckedOrder:
    """An order that can be carried out.

    Attributes:
        order: with its texts cleaned.
        k: neighbors that retrieval is asked for; 0: it is not asked.
        stages: the plans: one tuple for each stage to be run, in order, in it one plan for each picture.
        recorded: the record that is drawn again; its neighbors are read again by their ids.
    """

    order: Order
    k: int
    stages: tuple[tuple[Plan, ...], ...]
    recorded: Recorded | None = None

    @property
    def num_neighbors(self) -> int:
        """At most, references included."""
        return self.k + len(self.order.references) if self.recorded is None else len(self.recorded.neighbors)

    @property
    def num_pictures(self) -> int:
        return len(self.stages[0])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each picture."""
        return tuple(plan.seed for plan in self.stages[0])

    @property
    def sizes(self) -> tuple[int, ...]:
        """The stages to be run, in order."""
        return tuple(plans[0].stage for plans in self.stages)
