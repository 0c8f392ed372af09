"""A system and a prompt become a request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from client import GenerationRequest, Reference, StageOverrides
from evaluation.entitydraw.suite_file import SLOT, Suite, SuiteEntity, SuiteError, SuitePrompt, SuiteReference
from evaluation.entitydraw.systems import System

BASE = 64
_KNOBS = ("steps", "sampler", "guidance_strategy", "text_weight", "neighbor_weight", "eta", "thresholding")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt as a system draws it; `other` is the second entity, of systems that have one."""

    system: System
    prompt: SuitePrompt
    text: str
    references: tuple[SuiteReference, ...]
    other: SuiteEntity | None

    def request(self, seeds: Sequence[int]) -> GenerationRequest:
        """What the generator is asked for, a picture a seed."""
        system = self.system
        said = {name: value for name in _KNOBS if (value := getattr(system, name)) is not None}
        stages = (StageOverrides(stage=BASE, **said),) if said else ()
        looked_up = system.neighbors == "retrieved"
        return GenerationRequest(
            prompt=self.text,
            k=system.k if looked_up else None,
            knowledge_base=system.knowledge_base if looked_up else "",
            method=system.method if looked_up else "",
            exclude_exact=looked_up and system.excluded == "exact",
            excluded_pair_ids=self._excluded() if looked_up else (),
            without_neighbors=system.neighbors == "none",
            negative_prompt=system.negative_prompt,
            references=tuple(_sent(reference) for reference in self.references),
            seeds=tuple(seeds),
            stop_at=system.stop_at,
            stages=stages,
        )

    def _excluded(self) -> tuple[str, ...]:
        """Pairs that retrieval is told to leave out by their ids."""
        if self.system.excluded == "entity":
            return tuple(reference.pair for reference in self.prompt.entity.references if reference.pair)
        # `exclude_exact` reads the entity off the prompt, which other words around it keep it from.
        is_changed = self.text != self.prompt.text
        return (
            (self.prompt.target.key,) if self.system.excluded == "exact" and is_changed and self.prompt.target else ()
        )


def seeds_of(suite: Suite, prompt: SuitePrompt, count: int) -> tuple[int, ...]:
    """The seeds of a prompt's pictures: the same for every system."""
    names = (f"{suite.name}/{prompt.id}/{i}" for i in range(count))
    return tuple(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10**9 for name in names)


def asked(suite: Suite, system: System, prompt: SuitePrompt) -> Asked:
    """The prompt as the system draws it.

    Raises:
        SuiteError: the system needs references, or a second entity, that the suite does not have.
    """
    other = _other(suite, prompt) if system.has_other else None
    rest = prompt.template.split(SLOT, 1)[1].replace(SLOT, prompt.entity.name)
    slots = {"{prompt}": prompt.text, "{name}": prompt.entity.name, "{rest}": rest}
    slots["{other}"] = other.name if other else ""
    text = system.prompt
    for slot, value in slots.items():
        text = text.replace(slot, value)
    return Asked(system=system, prompt=prompt, text=text, references=_references(system, prompt, other), other=other)


def _references(system: System, prompt: SuitePrompt, other: SuiteEntity | None) -> tuple[SuiteReference, ...]:
    target = prompt.target.key if prompt.target else ""
    own = [reference for reference in prompt.entity.references if not target or reference.pair != target]
    others = list(other.references) if other else []
    if system.neighbors == "given":
        chosen = own[: system.k]
    elif system.neighbors == "wrong":
        chosen = others[: system.k]
    elif system.neighbors == "mixed":
        chosen = [*own[:1], *others[:1]]
    else:
        return ()
    if not chosen or (system.neighbors == "mixed" and len(chosen) < 2):
        raise SuiteError(
            f"suite: prompt {prompt.id!r}: system {system.name!r} needs reference pictures that the suite does not have"
        )
    return tuple(chosen)


def _other(suite: Suite, prompt: SuitePrompt) -> SuiteEntity:
    """Another entity of the category, with references; the same one whenever this prompt is drawn."""
    own = prompt.entity
    found = [e for e in suite.entities if e.category == own.category and e.name != own.name and e.references]
    if not found:
        raise SuiteError(f"suite: prompt {prompt.id!r}: category {own.category!r} has no other entity with references")
    return min(found, key=lambda each: hashlib.sha256(f"{prompt.id}/{each.name}".encode()).hexdigest())


def _sent(reference: SuiteReference) -> Reference:
    return Reference(
        image=reference.image,
        caption=reference.caption,
        author=reference.author,
        source=reference.source,
        license=reference.license,
    )
