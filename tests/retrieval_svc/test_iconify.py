"""The demonstration corpus: one entity under all its names, skin tones left out, held-out entities held out everywhere."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from common.corpus import CorpusError, iter_pairs, read_manifest
from common.scenes import Scene, caption, scene_phrases
from retrieval_svc import iconify
from retrieval_svc.iconify import (
    SETS,
    IconSet,
    build_demonstration_corpus,
    canonical_slugs,
    fetch_sets,
    is_held_out,
    iter_icon_pairs,
    read_set,
)

BODY = '<circle cx="8" cy="8" r="6" fill="#336699"/>'
ICONS = Path(__file__).resolve().parents[2] / "build" / "demo" / "icons"


def icon_set(prefix: str, names: list[str], aliases: dict[str, str] | None = None, body: str = BODY) -> IconSet:
    return IconSet(
        prefix=prefix,
        version="1.0",
        icons={name: {"body": body, "width": 16, "height": 16} for name in names},
        aliases=aliases or {},
        author=f"{prefix} authors",
        url=f"https://example.org/{prefix}",
        license="MIT",
    )


def written_set(folder: Path, names: dict[str, dict[str, Any]], aliases: dict[str, Any] | None = None) -> Path:
    """A fetched set on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    icons = {"prefix": folder.name, "icons": names, "aliases": aliases or {}, "width": 36, "height": 36}
    (folder / "icons.json").write_text(json.dumps(icons))
    described = {
        "author": {"name": "Someone", "url": "https://example.org"},
        "license": {"title": "MIT", "spdx": "MIT"},
    }
    (folder / "info.json").write_text(json.dumps(described))
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3"}))
    return folder


def together(slugs: dict[str, str], *names: str) -> bool:
    return len({slugs[n] for n in names}) == 1


# ---- names -------------------------------------------------------------------------------------------------------


def test_an_alias_joins_two_names() -> None:
    slugs = canonical_slugs(
        [icon_set("a", ["dog-face", "cat"], {"puppy": "dog-face"}), icon_set("b", ["puppy", "cat"])]
    )
    assert together(slugs, "dog-face", "puppy")
    assert not together(slugs, "dog-face", "cat")


def test_squashed_names_are_joined_and_read_as_words() -> None:
    slugs = canonical_slugs(
        [icon_set("a", ["alarmclock"]), icon_set("b", ["alarm-clock"]), icon_set("c", ["alarmclock"])]
    )
    assert together(slugs, "alarmclock", "alarm-clock")
    one_each = canonical_slugs([icon_set("a", ["alarmclock"]), icon_set("b", ["alarm-clock"])])
    assert set(one_each.values()) == {"alarm-clock"}


def test_the_spelling_of_most_sets_is_the_name() -> None:
    sets = [icon_set(p, ["hot-dog"]) for p in "abc"] + [icon_set("d", ["hotdog"], {"hot-dog": "hotdog"})]
    assert set(canonical_slugs(sets).values()) == {"hot-dog"}


def test_two_icons_that_one_set_draws_apart_stay_apart() -> None:
    """Whatever another set's aliases say."""
    apart = icon_set("a", ["man", "person"])
    slugs = canonical_slugs([apart, icon_set("b", ["person"], {"man": "person"})])
    assert not together(slugs, "man", "person")


def test_names_joined_through_a_third_share_their_fate() -> None:
    """One set calls both by a third name: they are one entity, so that neither shows what the other holds out."""
    apart = icon_set("a", ["man", "person"])
    sets = [apart, icon_set("b", ["human"], {"man": "human", "person": "human"})]
    pairs = list(iter_icon_pairs(sets, lambda entity: None))
    assert len({p.held_out for p in pairs}) == 1
    assert together(canonical_slugs(sets), "man", "human") or together(canonical_slugs(sets), "person", "human")


def test_names_do_not_depend_on_the_order_of_sets() -> None:
    sets = [
        icon_set("a", ["x-ray", "dog"], {"hound": "dog"}),
        icon_set("b", ["xray", "hound"]),
        icon_set("c", ["hound", "cat"], {"kitten": "cat"}),
    ]
    assert canonical_slugs(sets) == canonical_slugs(sets[::-1])


def test_every_icon_has_a_name_and_names_are_icons() -> None:
    sets = [icon_set("a", ["one", "two"], {"uno": "one"}), icon_set("b", ["uno", "drei"])]
    slugs = canonical_slugs(sets)
    names = {n for s in sets for n in s.icons}
    assert set(slugs) == names
    assert set(slugs.values()) <= names
    assert all(slugs[s] == s for s in slugs.values())


# ---- skin tones --------------------------------------------------------------------------------------------------


TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def kept(tmp_path: Path, names: list[str]) -> set[str]:
    return set(read_set(written_set(tmp_path / "set", {n: {"body": BODY} for n in names})).icons)


def test_skin_tones_are_left_out(tmp_path: Path) -> None:
    spoken = [f"waving-hand-{t}-skin-tone" for t in TONES]
    short = [f"thumbs-up-{t}" for t in TONES]
    inside = [f"woman-{t}-judge" for t in TONES] + [f"man-{t}-skin-tone-pilot" for t in TONES]
    bases = ["waving-hand", "thumbs-up", "woman-judge", "man-pilot"]
    assert kept(tmp_path, [*bases, *spoken, *short, *inside]) == set(bases)


def test_pairs_of_tones_are_left_out(tmp_path: Path) -> None:
    pairs = [f"handshake-{a}-skin-tone-{b}-skin-tone" for a in TONES for b in TONES]
    assert kept(tmp_path, ["handshake", *pairs]) == {"handshake"}


@pytest.mark.parametrize(
    "names",
    [
        ["police-car", "police-car-light"],
        ["light-bulb", "bulb"],
        ["light-rail", "rail"],
        ["light-blue-heart", "blue-heart"],
        ["vertical-traffic-light", "vertical-traffic"],
        ["speaker-medium-volume", "speaker-volume", "speaker-low-volume", "speaker-high-volume"],
        ["black-medium-small-square", "black-medium-square", "black-small-square", "black-large-square"],
        ["white-medium-square", "white-square"],
        ["battery", "battery-medium"],
        ["dark-moon", "moon"],
    ],
    ids=lambda names: names[0],
)
def test_what_only_sounds_like_a_tone_is_kept(tmp_path: Path, names: list[str]) -> None:
    """A skin tone has sisters in the other tones; a police car light has none."""
    assert kept(tmp_path, names) == set(names)


def test_hidden_icons_and_turned_aliases_are_left_out(tmp_path: Path) -> None:
    names = {"old": {"body": BODY, "hidden": True}, "new": {"body": BODY}, "wide": {"body": BODY, "width": 72}}
    aliases = {"fresh": {"parent": "new"}, "upside": {"parent": "new", "vFlip": True}, "ancient": {"parent": "old"}}
    found = read_set(written_set(tmp_path / "set", names, aliases))
    assert set(found.icons) == {"new", "wide"}
    assert found.aliases == {"fresh": "new"}
    assert (found.icons["new"]["width"], found.icons["wide"]["width"], found.icons["wide"]["height"]) == (36, 72, 36)
    assert (found.prefix, found.version, found.author, found.license) == ("set", "1.2.3", "Someone", "MIT")


# ---- held out ----------------------------------------------------------------------------------------------------


def test_one_slug_in_ten_is_held_out_by_its_hash() -> None:
    for slug in ("guide-dog", "alarm-clock", "x", "", "piñata"):
        assert is_held_out(slug) == (int(hashlib.sha256(slug.encode("utf-8")).hexdigest(), 16) % 10 == 0)
    assert [i for i in range(60) if is_held_out(f"thing-{i}")] == [0, 5, 12, 28, 35, 53, 58]
    share = sum(is_held_out(f"thing-{i}") for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)


def test_an_entity_is_held_out_under_every_name() -> None:
    """All spellings take the hash of the one slug."""
    number = next(i for i in range(100) if is_held_out(f"odd-thing-{i}") and not is_held_out(f"oddthing{i}"))
    held, squashed = f"odd-thing-{number}", f"oddthing{number}"
    alias = next(a for a in (f"other-{i}" for i in range(100)) if not is_held_out(a))
    sets = [
        icon_set("a", [held]),
        icon_set("b", [held, "dog"], {alias: held}),
        icon_set("c", [squashed]),
        icon_set("d", [alias]),
    ]
    pairs = list(iter_icon_pairs(sets, lambda entity: None))
    assert {p.extra["icon"] for p in pairs if p.held_out} >= {held, squashed, alias}
    assert {p.entity for p in pairs if p.held_out and p.extra["icon"] != "dog"} == {held.replace("-", " ")}


# ---- pairs -------------------------------------------------------------------------------------------------------


def test_pairs_say_where_they_come_from() -> None:
    (pair,) = iter_icon_pairs([icon_set("noto", ["guide-dog"])], lambda entity: None)
    assert pair.key == "noto--guide-dog"
    assert pair.caption == caption("guide dog", "noto", Scene()) == "guide dog, noto style, on a white background"
    assert (pair.entity, dict(pair.facets)) == ("guide dog", {"style": "noto"})
    assert (pair.author, pair.source, pair.license) == ("noto authors", "https://example.org/noto", "MIT")
    assert pair.image_format == "svg" and BODY.encode() in pair.image
    assert pair.extra == {"set_version": "1.0", "icon": "guide-dog"}


def test_icons_that_show_nothing_are_left_out() -> None:
    sets = [icon_set("a", ["blank"], body=""), icon_set("b", ["broken"], body="<rect"), icon_set("c", ["drawn"])]
    assert [p.key for p in iter_icon_pairs(sets, lambda entity: None)] == ["c--drawn"]


def test_a_set_draws_an_entity_once() -> None:
    sets = [icon_set("a", ["alarm-clock", "alarmclock"]), icon_set("b", ["alarm-clock"])]
    keys = [p.key for p in iter_icon_pairs(sets, lambda entity: None)]
    assert len(keys) == len(set(keys))


# ---- building ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Ten fetched sets of two icons."""
    for prefix, version in SETS.items():
        folder = written_set(tmp_path / "cache" / prefix, {"dog": {"body": BODY}, prefix: {"body": BODY}})
        folder.rename(folder.with_name(f"{prefix}-{version}"))
    return tmp_path / "cache"


def no_npm(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is fetched")


def test_build_once_from_what_was_fetched(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", no_npm)
    told: list[tuple[str, int, str]] = []
    manifest = build_demonstration_corpus(tmp_path / "corpus", cache, lambda *item: told.append(item))
    pairs = list(iter_pairs(tmp_path / "corpus"))
    assert manifest.num_pairs == len(pairs) == 20
    assert [f.values for f in manifest.facets] == [tuple(SETS)]
    assert manifest.scene_phrases == scene_phrases()
    assert [s["name"] for s in manifest.sources] == list(SETS)
    assert all(s["license"] and s["author"] and s["version"] for s in manifest.sources)
    assert sum(task == "icon sets" for task, _, _ in told) == 10
    assert sum(task == "pictures" for task, _, _ in told) == 20
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()}
    assert build_demonstration_corpus(tmp_path / "corpus", cache) == manifest
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "corpus").iterdir()} == before


def test_the_same_sets_give_the_same_corpus(cache: Path, tmp_path: Path) -> None:
    assert (
        build_demonstration_corpus(tmp_path / "a", cache).fingerprint
        == build_demonstration_corpus(tmp_path / "b", cache).fingerprint
    )


def test_a_corpus_of_an_older_version_is_built_anew(cache: Path, tmp_path: Path) -> None:
    manifest = build_demonstration_corpus(tmp_path / "corpus", cache)
    document = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps(document | {"version": "0"}))
    assert build_demonstration_corpus(tmp_path / "corpus", cache) == manifest
    assert read_manifest(tmp_path / "corpus").version == iconify.VERSION


def test_a_set_that_cannot_be_fetched_is_named_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "npm error\nnpm error 404 Not Found\n")

    for child in (cache / f"noto-{SETS['noto']}").iterdir():
        child.unlink()
    (cache / f"noto-{SETS['noto']}").rmdir()
    before = sorted(cache.iterdir())
    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(CorpusError, match=r"@iconify-json/noto@.*404 Not Found"):
        fetch_sets(cache, lambda prefix: None)
    assert sorted(cache.iterdir()) == before


# ---- the real sets -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[IconSet]:
    """The fetched sets of the demonstration, where `make knowledge-base` has been run."""
    folders = [ICONS / f"{prefix}-{version}" for prefix, version in SETS.items()]
    if not all(f.is_dir() for f in folders):
        pytest.skip("the icon sets are not fetched: run `make knowledge-base`")
    return [read_set(f) for f in folders]


@pytest.fixture(scope="module")
def slugs(real: list[IconSet]) -> dict[str, str]:
    return canonical_slugs(real)


def test_real_sets_are_whole(real: list[IconSet], slugs: dict[str, str]) -> None:
    assert [s.prefix for s in real] == list(SETS)
    assert all(s.license and s.author for s in real)
    styles: dict[str, set[str]] = defaultdict(set)
    for icons in real:
        for name in icons.icons:
            styles[slugs[name]].add(icons.prefix)
    assert sum(len(s.icons) for s in real) > 15_000
    assert sum(len(s) >= 3 for s in styles.values()) > 1_600
    for icons in real:
        assert not [n for n in icons.icons if "skin-tone" in n]


def test_real_emoji_that_only_sound_like_tones_are_there(real: list[IconSet]) -> None:
    for prefix in ("noto", "twemoji", "openmoji"):
        names = set(next(s for s in real if s.prefix == prefix).icons)
        wanted = {f"{c}-medium-{size}" for c in ("black", "white") for size in ("square", "small-square")}
        assert wanted | {"police-car-light", "light-bulb"} <= names, prefix


def test_no_real_held_out_entity_appears_under_another_name(real: list[IconSet], slugs: dict[str, str]) -> None:
    """Neither by another spelling, nor by an alias of a set that draws just one of the two."""
    squashed: dict[str, set[str]] = defaultdict(set)
    for name, slug in slugs.items():
        squashed[name.replace("-", "")].add(slug)
    drawn_apart = [set(s.icons) for s in real]
    split = {k: v for k, v in squashed.items() if len(v) > 1}
    assert not split
    leaks = []
    for icons in real:
        for alias, name in icons.aliases.items():
            if alias not in slugs or any({alias, name} <= names for names in drawn_apart):
                continue
            if is_held_out(slugs[alias]) != is_held_out(slugs[name]):
                leaks.append((icons.prefix, alias, name))
    assert not leaks


def test_few_real_icons_that_one_set_draws_apart_are_joined(real: list[IconSet], slugs: dict[str, str]) -> None:
    """A third name can join two drawings of a set (one of them is then lost); it must stay an exception."""
    lost = 0
    for icons in real:
        by_slug: dict[str, set[str]] = defaultdict(set)
        for name, icon in icons.icons.items():
            by_slug[slugs[name]].add(icon["body"])
        lost += sum(len(bodies) - 1 for bodies in by_slug.values())
    assert lost <= 15


def test_the_real_corpus_holds_out_by_the_rule() -> None:
    """In the built corpus, keys, entities and the flag agree."""
    folder = ICONS.parent / "corpus"
    if not (folder / "corpus.json").is_file():
        pytest.skip("the demonstration corpus is not built: run `make knowledge-base`")
    held: dict[bool, set[str]] = {True: set(), False: set()}
    for pair in islice(iter_pairs(folder), 6000):
        slug = pair.key.split("--", 1)[1]
        assert pair.entity == slug.replace("-", " ")
        assert pair.held_out == is_held_out(slug)
        held[pair.held_out].add(pair.entity.replace(" ", ""))
    assert not held[True] & held[False]
    assert 0.07 < len(held[True]) / len(held[True] | held[False]) < 0.13
