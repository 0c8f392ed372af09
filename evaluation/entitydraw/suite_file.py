"""Suites: files that say which entities are asked for, with which prompts, and what they look like.

JSON or YAML::

    format: reimagen-entitydraw-suite/1
    name: mine
    about: where it comes from
    categories:
      dogs:                                     # templates of the category; {name} is the slot
        - a {name} running on a beach
    entities:
      - name: Chortai
        category: dogs
        frequency: 12                           # how often the world shows it; the top half of a category is "frequent"
        references:                             # what it looks like, best first
          - image: chortai/1.jpg                # beside the suite file; or `pair`, the key of a pair of the corpus
            caption: a Chortai, standing
            author: ...                         # and source, license
        prompts:                                # of this entity alone, in place of its category's
          - template: "{name}, noto style, on a blue background"
            target: noto--chortai               # the corpus's pair that is asked for: what a perfect answer shows

Without `entities`, they are those of a folder of the user's own: CATEGORY/ENTITY/*.jpg (png, webp, svg), each picture's caption
in a .txt of its name beside it (the entity's name where there is none), and frequency.json at the top, a number by entity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.corpus import Pair, iter_pairs
from common.images import ImageError, rasterize
from evaluation.entitydraw.suite_folder import KINDS, FolderError, folder_entities

FORMAT = "reimagen-entitydraw-suite/1"
SLOT = "{name}"
_PROBE_SIDE = 8


class SuiteError(ValueError):
    """A suite's file is wrong; the message names file, field and value."""


@dataclass(frozen=True, kw_only=True)
class SuiteReference:
    """A picture of an entity with its caption; `pair` is the key of a corpus's pair, empty for a file of the suite's own."""

    image: bytes
    image_format: str
    caption: str
    pair: str = ""
    author: str = ""
    source: str = ""
    license: str = ""


@dataclass(frozen=True, kw_only=True)
class SuiteEntity:
    """An entity that is asked for."""

    name: str
    category: str
    frequency: float
    frequent: bool
    references: tuple[SuiteReference, ...]


@dataclass(frozen=True, kw_only=True)
class SuitePrompt:
    """One prompt.

    Attributes:
        id: names it in a run's folder.
        template: with the slot.
        target: the pair that a perfect answer shows; None where the suite says none.
    """

    id: str
    template: str
    entity: SuiteEntity
    target: Pair | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.template.replace(SLOT, self.entity.name)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is drawn; `sha256` is the file's."""

    name: str
    about: str
    file: str
    sha256: str
    entities: tuple[SuiteEntity, ...]
    prompts: tuple[SuitePrompt, ...]

    def part(self, count: int) -> tuple[SuitePrompt, ...]:
        """`count` prompts, the first in the order of their ids' sha256: chosen by nobody. 0: all."""
        ordered = sorted(self.prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).hexdigest())
        return tuple(ordered[: count or None])


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A value of the file, with its place in it."""

    value: Any
    file: Path
    place: str = ""

    def wrong(self, reason: str) -> SuiteError:
        return SuiteError(f"suite: {self.file}: {self.place or 'the file'}: {reason}")

    def fields(self, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, _Node]:
        """The object's values by name."""
        if not isinstance(self.value, dict):
            raise self.wrong(f"{_shown(self.value)} is no object")
        for name in self.value:
            if name not in (*needed, *optional):
                raise self.wrong(f"{name!r} is no field of it; there are {', '.join((*needed, *optional))}")
        for name in needed:
            if name not in self.value:
                raise self.wrong(f"has no {name}")
        return {name: self._at(f"{self.place}.{name}".lstrip("."), value) for name, value in self.value.items()}

    def named(self) -> dict[str, _Node]:
        """The values of an object whose names are free."""
        if not isinstance(self.value, dict) or not self.value:
            raise self.wrong(f"{_shown(self.value)} is no object, or an empty one")
        return {str(name): self._at(f"{self.place}.{name}", value) for name, value in self.value.items()}

    def items(self) -> list[_Node]:
        """The list's values."""
        if not isinstance(self.value, list) or not self.value:
            raise self.wrong(f"{_shown(self.value)} is no list, or an empty one")
        return [self._at(f"{self.place}[{i}]", value) for i, value in enumerate(self.value)]

    def text(self) -> str:
        """A text that says something."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong(f"{_shown(self.value)} is no text, or an empty one")
        return self.value.strip()

    def number(self) -> float:
        """A number that is not negative."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not 0 <= self.value < 1e18:
            raise self.wrong(f"{_shown(self.value)} is no number of at least 0")
        return float(self.value)

    def template(self) -> str:
        """A text with the slot."""
        text = self.text()
        if SLOT not in text:
            raise self.wrong(f"{text!r} has no slot {SLOT}")
        return text

    def _at(self, place: str, value: Any) -> _Node:
        return _Node(value=value, file=self.file, place=place)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_suite(path: Path, corpus: Path | None = None, references: Path | None = None) -> Suite:
    """Read a suite's file and the pictures that it names.

    Args:
        path: `.json`, `.yaml` or `.yml`.
        corpus: what its `pair`s and `target`s are keys of.
        references: the folder of entities, of a suite that has none.

    Raises:
        SuiteError: something is wrong; names the file, the field and the value.
        CorpusError: the corpus is damaged.
    """
    top = _Node(value=_parsed(path), file=path).fields(("format", "name", "categories"), ("about", "entities"))
    top["entities"] = _entities(path, top, references)
    if top["format"].value != FORMAT:
        raise top["format"].wrong(f"{_shown(top['format'].value)} is not {FORMAT!r}")
    templates = {name: [t.template() for t in node.items()] for name, node in top["categories"].named().items()}
    described = [_Described.of(node, templates) for node in top["entities"].items()]
    pairs = _pairs({node.text(): node for entity in described for node in entity.keys}, corpus)
    frequent = _frequent(described)
    entities: list[SuiteEntity] = []
    prompts: list[SuitePrompt] = []
    for each in described:
        entity = SuiteEntity(
            name=each.name,
            category=each.category,
            frequency=each.frequency,
            frequent=each.name in frequent,
            references=tuple(_reference(fields, pairs) for fields in each.references),
        )
        entities.append(entity)
        for i, (template, target) in enumerate(each.prompts or [(t, None) for t in templates[each.category]], 1):
            asked = pairs[target.text()] if target else None
            prompts.append(SuitePrompt(id=f"{each.slug}-{i}", template=template, entity=entity, target=asked))
    _check_ids(top["entities"], described)
    return Suite(
        name=slug(top["name"].text()),
        about=top["about"].text() if "about" in top else "",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        entities=tuple(entities),
        prompts=tuple(prompts),
    )


def _entities(path: Path, top: Mapping[str, _Node], references: Path | None) -> _Node:
    if "entities" in top:
        if references is not None:
            raise top["entities"].wrong(f"stand in the file; the folder {references} is not read")
        return top["entities"]
    if references is None:
        raise SuiteError(
            f"suite: {path}: entities: are not in it; name a folder CATEGORY/ENTITY/*.jpg of your pictures"
        )
    try:
        return _Node(value=folder_entities(references), file=references / path.name, place="entities")
    except FolderError as error:
        raise SuiteError(f"suite: {error}") from None


def slug(name: str) -> str:
    """A name as folders have it: a-z, 0-9 and single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"suite: {path}: cannot be read ({error})") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise SuiteError(f"suite: {path}: is not {'JSON' if path.suffix == '.json' else 'YAML'} ({said})") from None


@dataclass(frozen=True, kw_only=True)
class _Described:
    """An entity as the file says it, checked as far as that goes without pictures."""

    node: _Node
    name: str
    category: str
    frequency: float
    references: list[dict[str, _Node]]
    prompts: list[tuple[str, _Node | None]] = field(default_factory=list)

    @classmethod
    def of(cls, node: _Node, templates: Mapping[str, object]) -> _Described:
        fields = node.fields(("name", "category"), ("frequency", "references", "prompts"))
        category = fields["category"].text()
        if category not in templates:
            raise fields["category"].wrong(f"{category!r} is none of the categories: {', '.join(templates)}")
        given = fields["references"].items() if "references" in fields else []
        if empty := next((each for each in given if each.value == {}), None):
            raise empty.wrong("the reference has neither image nor pair")
        asked = fields["prompts"].items() if "prompts" in fields else []
        prompts = [each.fields(("template",), ("target",)) for each in asked]
        return cls(
            node=node,
            name=fields["name"].text(),
            category=category,
            frequency=fields["frequency"].number() if "frequency" in fields else 0.0,
            references=[each.fields((), ("image", "pair", "caption", "author", "source", "license")) for each in given],
            prompts=[(each["template"].template(), each.get("target")) for each in prompts],
        )

    @property
    def slug(self) -> str:
        return slug(self.name)

    @property
    def keys(self) -> list[_Node]:
        """The keys of pairs that it names."""
        named = [each["pair"] for each in self.references if "pair" in each]
        return named + [target for _, target in self.prompts if target]


def _pairs(wanted: Mapping[str, _Node], corpus: Path | None) -> dict[str, Pair]:
    if not wanted:
        return {}
    first_key, first = next(iter(wanted.items()))
    if corpus is None:
        raise first.wrong(f"{first_key!r} is a pair of a corpus, and none is named")
    found = {pair.key: pair for pair in iter_pairs(corpus) if pair.key in wanted}
    for key, node in wanted.items():
        if key not in found:
            raise node.wrong(f"{key!r} is no pair of the corpus {corpus}")
    return found


def _reference(fields: Mapping[str, _Node], pairs: Mapping[str, Pair]) -> SuiteReference:
    said = {name: fields[name].text() for name in ("caption", "author", "source", "license") if name in fields}
    if "pair" in fields:
        pair = pairs[fields["pair"].text()]
        if "image" in fields:
            raise fields["image"].wrong("stands beside a pair; one of the two is the picture")
        known = {"caption": pair.caption, "author": pair.author, "source": pair.source, "license": pair.license}
        return SuiteReference(image=pair.image, image_format=pair.image_format, pair=pair.key, **(known | said))
    if "image" not in fields:
        raise next(iter(fields.values())).wrong("the reference has neither image nor pair")
    node = fields["image"]
    path = node.file.parent / node.text()
    if path.suffix.lower() not in KINDS:
        raise node.wrong(f"{node.value!r} ends with none of {', '.join(KINDS)}")
    try:
        image = path.read_bytes()
        rasterize(image, KINDS[path.suffix.lower()], _PROBE_SIDE)
    except (OSError, ImageError) as error:
        raise node.wrong(f"{node.value!r} cannot be read ({error})") from None
    return SuiteReference(image=image, image_format=KINDS[path.suffix.lower()], **({"caption": ""} | said))


def _frequent(described: Sequence[_Described]) -> set[str]:
    """The names in the top half of their category by frequency; of equal ones the first by name."""
    of_category: dict[str, list[_Described]] = defaultdict(list)
    for each in described:
        of_category[each.category].append(each)
    ordered = [sorted(found, key=lambda each: (-each.frequency, each.name)) for found in of_category.values()]
    return {each.name for found in ordered for each in found[: (len(found) + 1) // 2]}


def _check_ids(entities: _Node, described: Sequence[_Described]) -> None:
    first: dict[str, _Described] = {}
    for each in described:
        if not each.slug:
            raise each.node.wrong(f"name: {each.name!r} has no letter a-z and no digit, which its folder is named by")
        if each.slug in first:
            raise each.node.wrong(f"name: {each.name!r} is named like {first[each.slug].name!r} ({each.slug})")
        first[each.slug] = each
