"""Suites: what is read, what is refused and how, and the suites that are shipped."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.images import encode_png
from common.scenes import Scene
from evaluation.entitydraw.command import SHIPPED, SUITES, load_suite
from evaluation.entitydraw.requests import asked, seeds_of
from evaluation.entitydraw.scoring import scene_of
from evaluation.entitydraw.suite_file import FORMAT, Suite, SuiteError, read_suite, slug
from evaluation.entitydraw.systems import BUILT_IN, System, SystemInvalid, read_systems
from retrieval_svc.iconify import is_held_out
from tests.evaluation.entitydraw.conftest import suite_document
from tests.evaluation.test_features import draw, pair

CATEGORIES = {"animals", "flags", "food", "objects", "people", "places"}


def test_a_suite_is_read(suite: Suite) -> None:
    assert [prompt.id for prompt in suite.prompts][:2] == ["guide-dog-1", "guide-dog-2"]
    first = suite.prompts[0]
    assert first.text == "guide dog, noto style, on a blue background"
    assert first.target is not None and first.target.key == "noto--guide-dog"
    assert [r.pair for r in first.entity.references] == ["noto--guide-dog", "twemoji--guide-dog", "openmoji--guide-dog"]
    assert first.entity.references[0].license == "CC-BY-4.0", "what the corpus says of a pair is kept"
    assert {e.name for e in suite.entities if e.frequent} == {"guide dog", "red apple"}, "the top half of three is two"


def test_a_part_is_the_same_whatever_the_order_and_grows(suite: Suite) -> None:
    everything = [prompt.id for prompt in suite.part(0)]
    assert sorted(everything) == sorted(prompt.id for prompt in suite.prompts)
    turned = replace(suite, prompts=suite.prompts[::-1])
    assert [prompt.id for prompt in turned.part(2)] == everything[:2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format="other"), r"format: 'other' is not 'reimagen-entitydraw-suite/1'"),
        (lambda d: d.update(colour=1), r"the file: 'colour' is no field of it"),
        (lambda d: d.pop("name"), "the file: has no name"),
        (lambda d: d.update(categories={"things": ["a dog"]}), r"categories.things\[0\]: 'a dog' has no slot \{name\}"),
        (lambda d: d["entities"][1].update(category="stars"), r"entities\[1\].category: 'stars' is none of"),
        (lambda d: d["entities"][1].update(frequency=-3), r"entities\[1\].frequency: -3 is no number of at least 0"),
        (lambda d: d["entities"][1].update(frequency=True), r"entities\[1\].frequency: True is no number"),
        (
            lambda d: d["entities"][2].update(name="Guide Dog"),
            r"entities\[2\]: name: 'Guide Dog' is named like 'guide dog'",
        ),
        (lambda d: d["entities"][0].update(prompts="no"), r"entities\[0\].prompts: 'no' is no list"),
        (
            lambda d: d["entities"][0]["references"][0].update(pair="x"),
            r"references\[0\].pair: 'x' is no pair of the corpus",
        ),
        (
            lambda d: d["entities"][0].update(references=[{"caption": "c"}]),
            r"caption: the reference has neither image nor",
        ),
        (
            lambda d: d["entities"][0].update(references=[{}]),
            r"references\[0\]: the reference has neither image nor pair",
        ),
        (
            lambda d: d["entities"][0].update(references=[{"image": "gone.png"}]),
            r"references\[0\].image: 'gone.png' cannot",
        ),
        (
            lambda d: d["entities"][0].update(references=[{"image": "a.gif"}]),
            r"references\[0\].image: 'a.gif' ends with",
        ),
        (lambda d: d.pop("entities"), "entities: are not in it"),
    ],
)
def test_a_bad_suite_names_file_field_and_value(change: Any, said: str, corpus: Path, tmp_path: Path) -> None:
    document = suite_document()
    change(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(SuiteError, match=said) as error:
        read_suite(path, corpus)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["{", "a: [1", "\x00"])
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_what_is_no_json_or_yaml_is_said(text: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.{kind}"
    path.write_text(text)
    with pytest.raises(SuiteError, match=re.escape(str(path))):
        read_suite(path)


def test_pairs_need_a_corpus(suite_file: Path) -> None:
    with pytest.raises(SuiteError, match=r"target: 'noto--guide-dog' is a pair of a corpus, and none is named"):
        read_suite(suite_file)


def test_the_users_own_pictures(tmp_path: Path) -> None:
    for category, name in (("dogs", "Chortai"), ("foods", "Picarones"), ("dogs", "Braque")):
        home = tmp_path / "mine" / category / name
        home.mkdir(parents=True)
        (home / "1.png").write_bytes(encode_png(draw(pair("disk"), Scene(), 64)))
        (home / "2.png").write_bytes(encode_png(draw(pair("bar"), Scene(), 64)))
    (tmp_path / "mine" / "dogs" / "Chortai" / "1.txt").write_text("a Chortai, standing\n")
    (tmp_path / "mine" / "frequency.json").write_text('{"Chortai": 3, "Braque": 8}')
    suite = load_suite("entitydrawbench", tmp_path, tmp_path / "mine")
    assert len(suite.prompts) == 15 and {e.name: e.frequent for e in suite.entities} == {
        "Braque": True,
        "Chortai": False,
        "Picarones": True,
    }
    chortai = next(e for e in suite.entities if e.name == "Chortai")
    assert [r.caption for r in chortai.references] == ["a Chortai, standing", "Chortai"]
    given = asked(suite, BUILT_IN["given"], next(p for p in suite.prompts if p.entity is chortai))
    assert len(given.request((1,)).references) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(SuiteError, match="holds no CATEGORY/ENTITY"):
        load_suite("entitydrawbench", tmp_path, tmp_path / "empty")
    with pytest.raises(SuiteError, match="'nonsense' is none of demo, entitydrawbench"):
        load_suite("nonsense", tmp_path)


def test_the_shipped_benchmark_has_the_papers_categories() -> None:
    document = yaml.safe_load((SUITES / SHIPPED["entitydrawbench"]).read_text())
    assert set(document["categories"]) == {"dogs", "landmarks", "foods", "birds", "characters"}
    assert all(len(set(templates)) == 5 for templates in document["categories"].values())


def test_the_shipped_demonstration_asks_for_held_out_entities_in_natural_categories() -> None:
    document = json.loads((SUITES / SHIPPED["demo"]).read_text())
    prompts = [(entity, prompt) for entity in document["entities"] for prompt in entity["prompts"]]
    assert document["format"] == FORMAT and len(prompts) >= 250
    assert set(Counter(entity["category"] for entity, _ in prompts)) == CATEGORIES == set(document["categories"])
    for entity, prompt in prompts:
        assert is_held_out(slug(entity["name"])), entity["name"]
        assert scene_of(prompt["template"]) is not None, "the text can be measured"
        assert {"pair": prompt["target"]} in entity["references"] and len(entity["references"]) >= 2


def test_seeds_are_the_same_for_every_system_and_differ_between_prompts(suite: Suite) -> None:
    first, second = suite.prompts[:2]
    assert seeds_of(suite, first, 4)[:2] == seeds_of(suite, first, 2)
    assert not set(seeds_of(suite, first, 4)) & set(seeds_of(suite, second, 4))


def test_a_system_becomes_a_request(suite: Suite) -> None:
    prompt = suite.prompts[0]
    looked_up = asked(suite, System(name="s", steps=3, eta=0.5, k=3), prompt).request((5, 6))
    assert (looked_up.k, looked_up.exclude_exact, looked_up.seeds, looked_up.stop_at) == (3, True, (5, 6), 64)
    assert looked_up.stages[0].steps == 3 and looked_up.stages[0].eta == 0.5
    without = asked(suite, System(name="s", excluded="entity"), prompt).request((5,))
    assert without.excluded_pair_ids == ("noto--guide-dog", "twemoji--guide-dog", "openmoji--guide-dog")
    given = asked(suite, BUILT_IN["given"], prompt)
    assert [r.pair for r in given.references] == ["twemoji--guide-dog", "openmoji--guide-dog"], (
        "never the one asked for"
    )
    assert given.request((5,)).k is None
    assert asked(suite, BUILT_IN["none"], prompt).request((5,)).without_neighbors
    mixed = asked(suite, System(name="m", neighbors="mixed", prompt="{name} and {other}{rest}"), prompt)
    assert mixed.other is not None and mixed.other.name != "guide dog"
    assert mixed.text == f"guide dog and {mixed.other.name}, noto style, on a blue background"
    assert [r.pair.partition("--")[2] for r in mixed.references] == ["guide-dog", slug(mixed.other.name)]
    wrong = asked(suite, System(name="w", neighbors="wrong"), prompt)
    assert wrong.other == mixed.other and {r.pair.partition("--")[2] for r in wrong.references} == {
        slug(wrong.other.name)
    }


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "a b"}, "name: 'a b' holds something else"),
        ({"name": "a", "neighbors": "far"}, "neighbors: 'far' is not one of retrieved"),
        ({"name": "a", "k": 0}, "k: 0 is not at least 1"),
        ({"name": "a", "seeds": 1}, "seeds: is no field of a system"),
        ({"k": 1}, "name: is missing"),
        ({"name": "a", "prompt": "x"}, "prompt: 'x' has neither"),
        ({"name": 3}, "name: 3 is no text"),
        ({"name": "a", "k": True}, "k: True is no whole number"),
        ({"name": "a", "steps": "many"}, "steps: 'many' is no whole number"),
        ({"name": "a", "eta": "1e-3"}, "eta: '1e-3' is no number"),
        ({"name": "a", "prompt": 3}, "prompt: 3 is no text"),
        ({"name": "a", "method": 3}, "method: 3 is no text"),
        ({"name": "a", "method": None}, "method: None is no text"),
    ],
)
def test_a_bad_row_of_a_system_names_field_and_value(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "systems.yaml"
    path.write_text(json.dumps([row]))
    with pytest.raises(SystemInvalid, match=said) as error:
        read_systems([str(path)])
    assert str(path) in str(error.value)


def test_a_file_without_rows_is_said(tmp_path: Path) -> None:
    (tmp_path / "systems.yaml").write_text("[]")
    with pytest.raises(SystemInvalid, match=r"systems.yaml holds no row"):
        read_systems([str(tmp_path / "systems.yaml")])


def test_systems_are_named_once() -> None:
    with pytest.raises(SystemInvalid, match="'none' is named twice"):
        read_systems(["none", "none"])
    with pytest.raises(SystemInvalid, match="'x' is none of retrieved, given, none"):
        read_systems(["x"])
