"""Systems: rows that say how prompts are drawn. What is compared are two rows over the same prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from evaluation.entitydraw.suite_file import slug

Source = Literal["retrieved", "given", "none", "wrong", "mixed"]
"""Where neighbors come from: looked up; the suite's references of the entity; nowhere; another entity's references in their
place (a probe); one reference of each of two entities (a probe)."""
Excluded = Literal["exact", "nothing", "entity"]
"""What retrieval leaves out: the pair that is asked for; nothing; every pair of the entity that the suite knows."""


_NONE = type(None)
_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "str": ("text", (str,)),
    "str | None": ("text", (str, _NONE)),
    "int": ("whole number", (int,)),
    "int | None": ("whole number", (int, _NONE)),
    "float | None": ("number", (int, float, _NONE)),
}
"""What may stand in a field, by its annotation; sources and the like are checked one by one."""


class SystemInvalid(ValueError):
    """A system's row is wrong; the message names the field and the value."""


@dataclass(frozen=True, kw_only=True)
class System:
    """How prompts are drawn; None leaves a knob to the service.

    Attributes:
        name: as folders have it.
        neighbors: where they come from.
        k: how many.
        excluded: what retrieval leaves out.
        prompt: what is made of the suite's prompt, with {prompt} for it, or {name}, {rest} (what follows the name in it) and
            {other} (another entity's name).
        stop_at: the last stage.
        method, knowledge_base, negative_prompt: see generator.proto.
        steps, sampler, guidance_strategy, text_weight, neighbor_weight, eta, thresholding: of the 64 px stage.
    """

    name: str
    neighbors: Source = "retrieved"
    k: int = 2
    excluded: Excluded = "exact"
    prompt: str = "{prompt}"
    stop_at: int = 64
    method: str = ""
    knowledge_base: str = ""
    negative_prompt: str = ""
    steps: int | None = None
    sampler: str | None = None
    guidance_strategy: str | None = None
    text_weight: float | None = None
    neighbor_weight: float | None = None
    eta: float | None = None
    thresholding: str | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value, (kind, allowed) = getattr(self, each.name), _KINDS.get(str(each.type), ("", ()))
            if kind and (isinstance(value, bool) or not isinstance(value, allowed)):
                raise SystemInvalid(f"{each.name}: {value!r} is no {kind}")
        if not self.name or self.name != slug(self.name):
            raise SystemInvalid(f"name: {self.name!r} holds something else than a-z, 0-9 and hyphens")
        for name, known in (("neighbors", get_args(Source)), ("excluded", get_args(Excluded))):
            if getattr(self, name) not in known:
                raise SystemInvalid(f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.k < 1:
            raise SystemInvalid(f"k: {self.k!r} is not at least 1; neighbors: none draws without any")
        if "{prompt}" not in self.prompt and "{name}" not in self.prompt:
            raise SystemInvalid(f"prompt: {self.prompt!r} has neither {{prompt}} nor {{name}}")

    @property
    def has_other(self) -> bool:
        """Whether a second entity has a part in it."""
        return self.neighbors in ("wrong", "mixed") or "{other}" in self.prompt

    def to_json(self) -> dict[str, Any]:
        """What departs from the defaults, and the name."""
        return {name: value for name, value in asdict(self).items() if name == "name" or value != _DEFAULTS[name]}


_DEFAULTS = {each.name: each.default for each in fields(System)}
BUILT_IN: dict[str, System] = {
    "retrieved": System(name="retrieved"),
    "given": System(name="given", neighbors="given"),
    "none": System(name="none", neighbors="none"),
}


def system_of(document: Mapping[str, Any]) -> System:
    """A row of a file.

    Raises:
        SystemInvalid: a name is unknown, or a value cannot be.
    """
    for name in document:
        if name not in _DEFAULTS:
            raise SystemInvalid(f"{name}: is no field of a system; there are {', '.join(_DEFAULTS)}")
    if "name" not in document:
        raise SystemInvalid("name: is missing")
    return System(**document)


def read_systems(names: Sequence[str]) -> tuple[System, ...]:
    """The systems of that name; a name that ends with .json or .yaml is a file with a list of rows.

    Raises:
        SystemInvalid: a name is none, or a file is wrong.
    """
    found: list[System] = []
    for name in names:
        if name in BUILT_IN:
            found.append(BUILT_IN[name])
        elif Path(name).suffix in (".json", ".yaml", ".yml"):
            found += _read(Path(name))
        else:
            raise SystemInvalid(
                f"system: {name!r} is none of {', '.join(BUILT_IN)}, and no .json or .yaml file of rows"
            )
    for system in found:
        if sum(other.name == system.name for other in found) > 1:
            raise SystemInvalid(f"system: {system.name!r} is named twice")
    return tuple(found)


def _read(path: Path) -> list[System]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SystemInvalid(f"system: {path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemInvalid(f"system: {path} is no list of rows")
    if not rows:
        raise SystemInvalid(f"system: {path} holds no row")
    try:
        return [system_of(row) for row in rows]
    except SystemInvalid as error:
        raise SystemInvalid(f"system: {path}: {error}") from None
