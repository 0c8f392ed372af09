"""The paper's protocol on photographs (Re-Imagen, sections 4.1 and 4.2), as data.

Prompts are drawn from a validation split; pictures are drawn at 256 pixels by plain classifier-free guidance with T = 1000
steps, for every pair of guidance weights of the 64 and 256 stages, from a knowledge base of the same kind (in-domain: the
training split) and from one of another (out-of-domain). FID-30K of COCO compares with all pictures of the split, as Imagen
does (Saharia et al. 2022, section 4.1); that of WikiImages with the pictures of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from client import GenerationRequest, StageOverrides

SIDE = 256
WEIGHTS_64 = (1.0, 1.25, 1.5, 1.75, 2.0)
WEIGHTS_256 = (1.0, 5.0, 8.0, 10.0)
STEPS = 1000
NO_NEIGHBORS = "none"
MAX_WEIGHT = 100.0


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One benchmark.

    Attributes:
        name: of the command, and of the importer's format.
        prompts: how many, by the paper.
        captions: of a picture with several: which may be prompts.
        reference: pictures that the drawn ones are compared with.
    """

    name: str
    prompts: int
    captions: Literal["first", "all"]
    reference: Literal["all", "prompts"]


PROTOCOLS = (
    Protocol(name="coco", prompts=30_000, captions="all", reference="all"),
    Protocol(name="wikiimages", prompts=20_000, captions="first", reference="prompts"),
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How every point draws. `sampler`: ddpm, ddim or dpmpp_2m."""

    steps_64: int = STEPS
    steps_256: int = STEPS
    sampler: str = "ddpm"
    k: int = 2
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One system of the sweep.

    Attributes:
        label: of the knowledge base: in-domain, out-of-domain, or whatever it was called.
        knowledge_base: its name at the retrieval service; "" with `NO_NEIGHBORS`.
        weight_64, weight_256: guidance weights; the second None: the 256 stage is not guided.
    """

    label: str
    knowledge_base: str
    weight_64: float
    weight_256: float | None

    @property
    def name(self) -> str:
        """Names its folder."""
        last = "unguided" if self.weight_256 is None else f"{self.weight_256:g}"
        return f"{self.label}--w64-{self.weight_64:g}--w256-{last}"

    def request(self, prompt: str, seed: int, excluded: Sequence[str], sampling: Sampling) -> GenerationRequest:
        """What the generator is asked for. `excluded`: ids of pairs with the prompt's own picture."""
        first = StageOverrides(
            stage=64,
            steps=sampling.steps_64,
            sampler=sampling.sampler,
            guidance_strategy="joint",
            text_weight=self.weight_64,
        )
        second = StageOverrides(stage=SIDE, steps=sampling.steps_256, sampler=sampling.sampler)
        if self.weight_256 is not None:
            second = replace(second, guidance_strategy="joint", text_weight=self.weight_256)
        looked_up = bool(self.knowledge_base)
        return GenerationRequest(
            prompt=prompt,
            seed=seed,
            stop_at=SIDE,
            stages=(first, second),
            without_neighbors=not looked_up,
            k=sampling.k if looked_up else None,
            knowledge_base=self.knowledge_base,
            method=sampling.method if looked_up else "",
            excluded_pair_ids=tuple(excluded) if looked_up else (),
        )


def sweep(
    bases: Sequence[tuple[str, str]], weights_64: Sequence[float], weights_256: Sequence[float | None]
) -> tuple[SweepPoint, ...]:
    """Every point: knowledge bases (label, name) by weights.

    Raises:
        ValueError: a list is empty or says something twice, or a weight is out of range.
    """
    for name, values in (("knowledge-base", [label for label, _ in bases]), ("weights-64", weights_64)):
        _check_once(name, values)
    _check_once("weights-256", weights_256)
    for name, weights in (("weights-64", weights_64), ("weights-256", weights_256)):
        for weight in weights:
            if weight is not None and not 0.0 <= weight <= MAX_WEIGHT:
                raise ValueError(f"--{name}: {weight} is not between 0 and {MAX_WEIGHT:g}")
    return tuple(
        SweepPoint(label=label, knowledge_base=base, weight_64=w64, weight_256=w256)
        for label, base in bases
        for w64 in weights_64
        for w256 in weights_256
    )


def _check_once(name: str, values: Sequence[object]) -> None:
    if not values:
        also = " or --without-neighbors" if name == "knowledge-base" else ""
        raise ValueError(f"--{name}{also}: at least one is needed")
    if twice := ["none" if value is None else value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"--{name}: {twice[0]} is named twice")
