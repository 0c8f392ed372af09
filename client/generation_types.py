"""What the client of the generator service takes and gives: plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client.picture_file import PictureFile


@dataclass(frozen=True, kw_only=True)
class StageOverrides:
    """Departures of one stage from its defaults; None keeps the default. See generator.proto.

    Attributes:
        stage: 64, 256 or 1024.
        sampler: `ddpm`, `ddim` or `dpmpp_2m`.
        guidance_strategy: `interleaved`, `weighted` or `joint`.
        thresholding: `none`, `static` or `dynamic`.
    """

    stage: int
    steps: int | None = None
    sampler: str | None = None
    guidance_strategy: str | None = None
    text_weight: float | None = None
    neighbor_weight: float | None = None
    eta: float | None = None
    thresholding: str | None = None
    augmentation: float | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A pair of the caller's own: a picture file (PNG, JPEG, WebP or SVG) and what it shows."""

    image: bytes
    caption: str
    author: str = ""
    source: str = ""
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class StartFrom:
    """A picture file to begin with; None leaves the stage or the strength to the service. See generator.proto."""

    image: bytes
    stage: int | None = None
    strength: float | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be drawn; the defaults are the service's. See generator.proto.

    Attributes:
        prompt: what is to be drawn; empty where `record_json` is given.
        method: `bm25`, `clip` or `hybrid`; empty leaves it to the service.
        num_pictures: None: one for each of `seeds`, else one.
        seed: None lets the service draw one.
        stop_at: None: 1024.
        image_format: `png` or `webp`; empty: `png`.
        priority: `low`, `normal` or `high`; empty: `normal`.
        request_id: a UUID; empty: the client makes one for each call.
        record_json: the record of a picture that is to be drawn again.
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
    image_format: str = ""
    every_stage: bool = False
    priority: str = ""
    request_id: str = ""
    record_json: str = ""


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The request is understood, and will be drawn.

    Attributes:
        seed: draws these pictures again.
        seeds: of each picture.
        queue_position: how many requests go before this one.
    """

    prompt: str
    seed: int
    num_pictures: int
    stages: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    queue_position: int = 0


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The request still waits: how many go before it."""

    queue_position: int


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A pair that shapes the pictures; `image` is its file, in `image_format`."""

    pair_id: str
    caption: str
    entity: str
    image: bytes
    image_format: str
    facets: Mapping[str, str]
    author: str
    source: str
    license: str
    score: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class NeighborsFound:
    """The neighbors, best first.

    Attributes:
        shortfall_reason: why there are fewer than asked; empty where there are not.
        method: as `bm25`; `unspecified` where nothing was retrieved.
        num_references: how many, the first ones, are the caller's own.
        degraded_reason: why the pictures are drawn without retrieved neighbors although some were asked for; else empty.
    """

    neighbors: tuple[Neighbor, ...]
    knowledge_base: str
    index_fingerprint: str
    shortfall_reason: str
    method: str
    num_references: int = 0
    degraded_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    stage: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A picture has come one step further; `preview_png` is empty where none was asked for."""

    stage: int
    picture: int
    step: int
    steps: int
    preview_png: bytes


@dataclass(frozen=True, kw_only=True)
class StageFinished(PictureFile):
    """A picture has left a stage; `image` is empty in the last one, and where `every_stage` was not asked for."""

    stage: int
    picture: int
    image: bytes


@dataclass(frozen=True, kw_only=True)
class Image(PictureFile):
    """A finished picture.

    Attributes:
        picture: its index, from 0.
        image: the file, `record_json` inside.
        image_format: `png` or `webp`.
        record_json: a request with it draws the picture again.
    """

    picture: int
    image: bytes
    image_format: str = "png"
    seed: int = 0
    record_json: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """How it was drawn and from whose work: prompt, seed, plans, neighbors with licenses, weights."""
        return json.loads(self.record_json) if self.record_json else {}


@dataclass(frozen=True, kw_only=True)
class Done:
    """Everything is drawn; `record` says how and from whose work, with versions and timings in seconds."""

    record: Mapping[str, Any]


Event = Accepted | Queued | NeighborsFound | StageStarted | StepDone | StageFinished | Image | Done


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a request has drawn.

    Attributes:
        images: the pictures.
        stages: the pictures of the stages before the last, where `every_stage` asked for them.
        neighbors: what shaped them.
        record: how everything was drawn, with versions and timings in seconds.
    """

    images: tuple[Image, ...]
    stages: tuple[StageFinished, ...]
    neighbors: NeighborsFound
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StageModel:
    """One stage as it is served now; see generator.proto.

    Attributes:
        trained: preset, steps and examples seen, fingerprint of the corpus.
        default_plan: the plan that is used where a request says nothing.
        endpoints: where it runs.
    """

    stage: int
    name: str
    version: str
    weights_sha256: str
    parameters: int
    trained: Mapping[str, Any] = field(default_factory=dict)
    default_plan: Mapping[str, Any] = field(default_factory=dict)
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a generator draws with, in the order in which it is run."""

    stages: tuple[StageModel, ...]
    text_encoder: str
