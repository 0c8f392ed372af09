"""Understanding a prompt: which of its words name the entity, and which a facet (style) or a scene.

Styles and scenes are not entities: "guide dog, noto style, on a blue background" asks the knowledge base for
a guide dog, not for blue things. What counts as a facet or a scene is the corpus' own closed vocabulary, and
only in a recognized position: a whole comma-separated part, or the end of one. So "old style house" and
"knight on a horse" stay whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from common.corpus import CorpusError, Facet
from common.prompt import MAX_PROMPT_CHARACTERS
from common.service.errors import InvalidArgument

ARTICLES = frozenset({"a", "an", "the"})

_FIELD = "prompt"
_SLOT = "{value}"
_WORD = re.compile(r"[^\W_]+")
_EDGES = " .;:!?-\u2013\u2014|/()[]{}\"'\u201c\u201d\u2018\u2019"
_JOINING = " and"  # "in noto style and on a blue background"


@dataclass(frozen=True, kw_only=True)
class UnderstoodPrompt:
    """A prompt taken apart, case-folded; facet values and scene phrases are in the vocabulary's spelling."""

    entity: str
    details: tuple[str, ...] = ()
    facets: Mapping[str, str] = field(default_factory=dict)
    scene_phrases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Word:
    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """What a part of a prompt ends with, and where that starts; `facet` is empty for a scene phrase."""

    start: int
    facet: str
    value: str


@dataclass(frozen=True, kw_only=True)
class _FacetForm:
    """A facet ready for comparison: the template's words around the value; each value as one word."""

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    values: Mapping[str, str]
    max_value_words: int


class Vocabulary:
    """The facets and the scene phrases of one corpus, ready to be found in prompts."""

    def __init__(self, facets: Sequence[Facet], scene_phrases: Iterable[str]) -> None:
        """Prepare the comparison.

        Raises:
            CorpusError: a template lacks "{value}", or two values of a facet read the same but for hyphens
                and case.
        """
        self._facets = tuple(_facet_form(facet) for facet in facets)
        self._scenes = {_bare(_words(phrase)): phrase for phrase in scene_phrases}
        self._scene_lengths = sorted({len(words) for words in self._scenes if words}, reverse=True)

    def understand(self, prompt: str) -> UnderstoodPrompt:
        """Take a user's prompt apart.

        Raises:
            InvalidArgument: the prompt is empty, too long, names no entity, names a value that a facet does
                not have ("guide dog, vaporwave style"), or two values of one facet.
        """
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InvalidArgument(_FIELD, f"has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are taken")
        if not prompt.strip():
            raise InvalidArgument(_FIELD, "is empty")
        understood = self._take_apart(prompt, strict=True)
        if not _words(understood.entity):
            raise InvalidArgument(_FIELD, f"{prompt.strip()!r} names no entity to look up")
        return understood

    def understand_caption(self, caption: str) -> UnderstoodPrompt:
        """Take a stored caption apart; what does not fit the vocabulary stays with the entity."""
        understood = self._take_apart(caption, strict=False)
        return understood if _words(understood.entity) else UnderstoodPrompt(entity=_folded(caption).strip(_EDGES))

    def _take_apart(self, prompt: str, *, strict: bool) -> UnderstoodPrompt:
        facets: dict[str, str] = {}
        scenes: list[str] = []
        parts: list[str] = []
        for part in _folded(prompt).split(","):
            rest, endings = self._strip_endings(part)
            for ending in endings:
                if not ending.facet:
                    scenes.append(ending.value)
                elif facets.setdefault(ending.facet, ending.value) != ending.value and strict:
                    both = f"{facets[ending.facet]!r} and {ending.value!r}"
                    raise InvalidArgument(_FIELD, f"names two values of {ending.facet}: {both}")
            if rest:
                parts.append(rest)
        if strict:
            # The first part that is left is the entity, whatever it looks like ("gangnam style").
            for part in parts[1:]:
                self._refuse_unknown_value(part)
        return UnderstoodPrompt(
            entity=without_article(parts[0]) if parts else "",
            details=tuple(parts[1:]),
            facets=facets,
            scene_phrases=tuple(dict.fromkeys(scenes)),
        )

    def _strip_endings(self, part: str) -> tuple[str, list[_Ending]]:
        """`part` without the facets and scene phrases at its end, and these in their order."""
        rest, endings = part.strip(_EDGES), list[_Ending]()
        while rest and (ending := self._ending(rest)):
            endings.insert(0, ending)
            rest = rest[: ending.start].strip(_EDGES).removesuffix(_JOINING).strip(_EDGES)
        return rest, endings

    def _ending(self, part: str) -> _Ending | None:
        words = _words(part)
        bare = [word for word in words if word.text not in ARTICLES]
        for length in self._scene_lengths:
            phrase = self._scenes.get(tuple(word.text for word in bare[-length:]))
            if phrase is not None and length <= len(bare):
                return _Ending(start=bare[-length].start, facet="", value=phrase)
        return next(filter(None, (_facet_at_end(facet, words) for facet in self._facets)), None)

    def _refuse_unknown_value(self, part: str) -> None:
        words = [word.text for word in _words(part)]
        for facet in self._facets:
            before, after = facet.before, facet.after
            if not (before or after) or len(words) <= len(before) + len(after):
                continue
            end = len(words) - len(after)
            if tuple(words[: len(before)]) == before and tuple(words[end:]) == after:
                value = " ".join(words[_skip_lead_in(words[:end], len(before)) : end])
                known = ", ".join(facet.values.values())
                raise InvalidArgument(_FIELD, f"names {facet.name} {value!r}, which is not one of {known}")


def without_article(text: str) -> str:
    """`text` without a leading "a", "an" or "the", unless nothing else would be left."""
    head, _, rest = text.partition(" ")
    return rest.lstrip() if head in ARTICLES and _WORD.search(rest) else text


def value_key(value: str) -> str:
    """What two spellings of a facet value share: "Fluent Emoji" is "fluent-emoji"; empty for what holds no words."""
    return "".join(word.text for word in _words(_folded(value)))


def _facet_form(facet: Facet) -> _FacetForm:
    if facet.template.count(_SLOT) != 1:
        raise CorpusError(f"corpus: facet {facet.name!r} has template {facet.template!r}, which must hold {_SLOT} once")
    before, after = (tuple(w.text for w in _words(_folded(side))) for side in facet.template.split(_SLOT))
    values: dict[str, str] = {}
    for value in facet.values:
        squeezed = value_key(value)
        if not squeezed or squeezed in values:
            raise CorpusError(
                f"corpus: facet {facet.name!r}: value {value!r} is empty or reads as {values.get(squeezed)!r}"
            )
        values[squeezed] = value
    longest = max(map(len, values), default=0)  # "fx emoji" is "fxemoji": a value may be spelled in any number of words
    return _FacetForm(name=facet.name, before=before, after=after, values=values, max_value_words=longest)


def _facet_at_end(facet: _FacetForm, words: Sequence[_Word]) -> _Ending | None:
    """The facet with a known value at the end of `words`, with its "in the"; the longest value wins."""
    texts = [word.text for word in words]
    end = len(texts) - len(facet.after)
    if end < 1 or tuple(texts[end:]) != facet.after:
        return None
    for length in range(min(facet.max_value_words, end - len(facet.before)), 0, -1):
        value = facet.values.get("".join(texts[end - length : end]))
        first = end - length - len(facet.before)
        if value is not None and tuple(texts[first : end - length]) == facet.before:
            while first > 0 and texts[first - 1] in ARTICLES:
                first -= 1
            if first > 0 and texts[first - 1] == "in":
                first -= 1
            return _Ending(start=words[first].start, facet=facet.name, value=value)
    return None


def _skip_lead_in(words: Sequence[str], start: int) -> int:
    """The index after "in", "in the" and the like, so that an error names the value alone."""
    while start < len(words) - 1 and (words[start] == "in" or words[start] in ARTICLES):
        start += 1
    return start


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _words(folded: str) -> list[_Word]:
    return [_Word(text=match.group(), start=match.start()) for match in _WORD.finditer(folded)]


def _bare(words: Iterable[_Word]) -> tuple[str, ...]:
    return tuple(word.text for word in words if word.text not in ARTICLES)
