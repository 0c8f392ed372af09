"""A prompt is taken apart into entity, facets and scene phrases, and nothing of an entity is lost."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.corpus import CorpusError, Facet
from common.prompt import MAX_PROMPT_CHARACTERS
from common.service.errors import InvalidArgument
from retrieval_svc.query import Vocabulary

STYLES = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat")
SCENES = (
    "on a white background",
    "on a orange background",
    "on a blue background",
    "small in the top left corner",
)
STYLE = Facet(name="style", template="{value} style", values=STYLES)
VOCABULARY = Vocabulary((STYLE,), SCENES)


@pytest.mark.parametrize(
    ("prompt", "entity", "style", "scenes"),
    [
        ("guide dog, noto style, on a blue background", "guide dog", "noto", ["on a blue background"]),
        ("A  Guide Dog , NOTO Style.", "guide dog", "noto", []),
        ("guide dog noto style on a blue background", "guide dog", "noto", ["on a blue background"]),
        (
            "guide dog in the noto style and on a blue background",
            "guide dog",
            "noto",
            ["on a blue background"],
        ),
        ("guide dog on a blue background, noto style", "guide dog", "noto", ["on a blue background"]),
        ("noto style, guide dog", "guide dog", "noto", []),
        ("guide dog (Fluent Emoji Flat style)", "guide dog", "fluent-emoji-flat", []),
        ("guide dog, fluent-emoji-flat style", "guide dog", "fluent-emoji-flat", []),
        ("guide dog in fluent emoji style", "guide dog", "fluent-emoji", []),
        ("guide dog, noto v1 style", "guide dog", "noto-v1", []),
        ("guide dog, tw emoji style", "guide dog", "twemoji", []),
        ("cat, on an orange background", "cat", None, ["on a orange background"]),
        ("cat, small in top-left corner, on blue background", "cat", None, [SCENES[3], SCENES[2]]),
        ("guide dog, noto style, noto style", "guide dog", "noto", []),
        ("old style house", "old style house", None, []),
        ("old style house, noto style", "old style house", "noto", []),
        ("noto style house", "noto style house", None, []),
        ("knight on a horse", "knight on a horse", None, []),
        ("blue background", "blue background", None, []),
        ("gangnam style, noto style", "gangnam style", "noto", []),
        ("small corner shop", "small corner shop", None, []),
        ("the", "the", None, []),
        ("flag: Côte d\u2019Ivoire", "flag: côte d\u2019ivoire", None, []),
        ("1st place medal", "1st place medal", None, []),
    ],
)
def test_a_prompt_is_taken_apart(prompt: str, entity: str, style: str | None, scenes: list[str]) -> None:
    understood = VOCABULARY.understand(prompt)
    assert understood.entity == entity
    assert understood.facets == ({"style": style} if style else {})
    assert list(understood.scene_phrases) == scenes
    assert understood.details == ()


def test_what_is_neither_facet_nor_scene_is_a_detail() -> None:
    understood = VOCABULARY.understand("a guide dog, wearing a hat, noto style")
    assert (understood.entity, understood.details) == ("guide dog", ("wearing a hat",))


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("x" * (MAX_PROMPT_CHARACTERS + 1), str(MAX_PROMPT_CHARACTERS + 1)),
        ("noto style, on a blue background", "no entity"),
        ("!?, ...", "no entity"),
        ("guide dog, vaporwave style", "'vaporwave', which is not one of noto, noto-v1"),
        ("guide dog, in the vaporwave style", "'vaporwave'"),
        ("guide dog, on a blue background, 80s neon style", "'80s neon'"),
        ("guide dog, noto style, twemoji style", "two values of style: 'noto' and 'twemoji'"),
    ],
)
def test_a_wrong_prompt_is_refused_by_name(prompt: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        VOCABULARY.understand(prompt)
    ((field, description),) = caught.value.violations
    assert field == "prompt"
    assert named in description


def test_captions_keep_what_prompts_may_not_say() -> None:
    assert VOCABULARY.understand_caption("dog, vaporwave style").details == ("vaporwave style",)
    assert VOCABULARY.understand_caption("noto style").entity == "noto style"
    assert VOCABULARY.understand_caption("dog, noto style, twemoji style").facets == {"style": "noto"}
    assert VOCABULARY.understand_caption("dog " * 2000).entity.startswith("dog dog")


def test_other_templates() -> None:
    by = Facet(name="artist", template="by {value}", values=("Claude Monet", "Edvard Munch"))
    vocabulary = Vocabulary((STYLE, by), ())
    understood = vocabulary.understand("the bridge by claude monet, noto style")
    assert understood.entity == "bridge"
    assert understood.facets == {"artist": "Claude Monet", "style": "noto"}
    assert vocabulary.understand("house by the sea").entity == "house by the sea"
    with pytest.raises(InvalidArgument, match="names artist 'banksy'"):
        vocabulary.understand("bridge, by banksy")


@pytest.mark.parametrize(
    "facet",
    [
        Facet(name="style", template="style", values=("noto",)),
        Facet(name="style", template="{value} style", values=("noto-v1", "Noto V1")),
        Facet(name="style", template="{value} style", values=("-",)),
    ],
)
def test_a_vocabulary_that_cannot_be_told_apart_is_refused(facet: Facet) -> None:
    with pytest.raises(CorpusError, match="facet 'style'"):
        Vocabulary((facet,), ())


WORDS = st.text(alphabet="abcdefghijklmnopqrstuvwxyzéß0123456789", min_size=1, max_size=8)
ENTITIES = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)


def _spelled(draw: st.DrawFn, value: str) -> str:
    spaced = value.replace("-", draw(st.sampled_from(["-", " ", ""])))
    return draw(st.sampled_from([spaced, spaced.upper(), spaced.title()]))


@st.composite
def prompts(draw: st.DrawFn) -> tuple[str, str, str | None, set[str]]:
    entity = draw(ENTITIES)
    style = draw(st.sampled_from([None, *STYLES]))
    scenes = draw(st.lists(st.sampled_from(SCENES), unique=True, max_size=2))
    parts = [*([f"{_spelled(draw, style)} style"] if style else []), *scenes]
    parts = draw(st.permutations(parts))
    joined = draw(st.sampled_from([", ", ",", " , "])).join([entity, *parts])
    return joined, entity, style, set(scenes)


@given(prompts())
def test_any_entity_comes_through_whole(case: tuple[str, str, str | None, set[str]]) -> None:
    prompt, entity, style, scenes = case
    folded = entity.casefold()
    assume(not folded.startswith(("a ", "an ", "the ")) and not folded.endswith((" and", " style")))
    understood = VOCABULARY.understand(prompt)
    assert understood.entity == folded
    assert understood.facets == ({"style": style} if style else {})
    assert set(understood.scene_phrases) == scenes
    assert understood.details == ()


@given(st.text(max_size=200))
def test_any_text_is_understood_or_refused(prompt: str) -> None:
    try:
        understood = VOCABULARY.understand(prompt)
    except InvalidArgument:
        return
    assert understood.entity
    assert VOCABULARY.understand_caption(prompt).entity == understood.entity
