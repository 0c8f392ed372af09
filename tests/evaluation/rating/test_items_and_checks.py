"""What is rated, the attention checks among it, and the bytes that a browser gets."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.images import ImageError, encode_png
from evaluation.entitydraw.results import RunError
from evaluation.rating.checks import KINDS, MUST_SAY, make_check, passes, possible_kinds
from evaluation.rating.items import Shown, load_items
from evaluation.rating.pictures import Renderer, changed
from tests.evaluation.rating.sample_run import ENTITIES, SYSTEMS, change_rows, drawing, make_run, sample_items


def test_an_item_is_what_a_system_drew_for_a_prompt(tmp_path: Path) -> None:
    items = sample_items(tmp_path / "run")
    assert [(i.system, i.prompt_id) for i in items] == [(s, p) for s in SYSTEMS for p in sorted(ENTITIES)]
    assert all([shown.seed for shown in item.pictures] == [0, 1, 2, 3] for item in items)
    assert all(item.check is None and len(item.references) == 2 for item in items)
    by_prompt = {item.prompt_id: item.references for item in items}
    assert all(item.references == by_prompt[item.prompt_id] for item in items), "the same for all systems"


def test_each_picture_can_be_an_item(tmp_path: Path) -> None:
    items = load_items([make_run(tmp_path / "run").path], "each")
    assert len(items) == len({item.item_id for item in items}) == len(SYSTEMS) * len(ENTITIES) * 4
    assert all(len(item.pictures) == 1 for item in items)


def test_references_are_the_same_for_a_system_that_was_given_none(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [replace(r, suite_references=()) if r.system == SYSTEMS[0] else r for r in folder.rows()]
    folder.write_rows(rows)
    assert all(len(item.references) == 2 for item in load_items([folder.path]))


def test_systems_of_the_same_name_are_told_apart_by_their_run(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, systems=("ours", name)) for name in ("monday", "tuesday"))
    names = {item.system for item in load_items([one.path, two.path])}
    assert names == {"monday/ours", "tuesday/ours", "monday", "tuesday"}
    again = make_run(tmp_path / "other" / "monday", systems=("ours",))
    with pytest.raises(ValueError, match="two runs have folders of the same name"):
        load_items([one.path, again.path])


def test_a_picture_drawn_anew_is_another_item(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    before = {item.item_id for item in load_items([folder.path])}
    change_rows(folder, sha256="f" * 64)
    assert len(before & {item.item_id for item in load_items([folder.path])}) == len(before) - 1


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "pictures/../../outside.png"])
@pytest.mark.parametrize("field", ["file", "suite_references"])
def test_files_outside_of_the_run_are_refused(tmp_path: Path, field: str, name: str) -> None:
    folder = make_run(tmp_path / "run")
    (tmp_path / "outside.png").write_bytes(encode_png(drawing(1, 8)))
    change_rows(folder, **{field: name if field == "file" else (name,)})
    with pytest.raises(ValueError, match=r"names '.*', which is not inside the run"):
        load_items([folder.path])


def test_runs_that_cannot_be_rated(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json does not exist"):
        load_items([tmp_path])
    folder = make_run(tmp_path / "empty")
    folder.write_rows([])
    with pytest.raises(ValueError, match="holds no picture"):
        load_items([folder.path])
    folder = make_run(tmp_path / "bare")
    folder.write_rows(replace(row, suite_references=()) for row in folder.rows())
    with pytest.raises(ValueError, match="prompt clock-tower has no picture of its entity to compare with"):
        load_items([folder.path])
    change_rows(folder, suite_references=("references/gone.png",))
    with pytest.raises(ValueError, match=r"names references/gone\.png, which is not there"):
        load_items([folder.path])


@pytest.mark.parametrize("kind", KINDS)
def test_a_check_looks_like_an_item(tmp_path: Path, kind: str) -> None:
    items = sample_items(tmp_path / "run")
    for number in range(20):
        check = make_check(items, f"rater-{number}", kind)  # type: ignore[arg-type]
        subject = next(item for item in items if item.prompt_id == check.prompt_id)
        assert check == make_check(items, f"rater-{number}", kind)  # type: ignore[arg-type]
        assert check.check == kind and check.system == ""
        assert len(check.pictures) == len(set(check.pictures)) == 4
        sources = {shown.path for shown in check.pictures}
        if kind == "wrong":
            assert not sources & set(subject.references)
            assert {i.category for i in items if sources & set(i.references)}.isdisjoint({subject.category})
        else:
            assert sources == {subject.references[-1]}
        if kind == "real":
            assert check.references == subject.references[:-1], "what is judged is not what it is compared with"


def test_one_entity_alone_cannot_be_mistaken(tmp_path: Path) -> None:
    assert possible_kinds(sample_items(tmp_path / "one", entities=("old-oak",))) == ("real", "broken")
    assert possible_kinds(sample_items(tmp_path / "two", entities=("old-oak", "red-apple"))) == KINDS


def test_whoever_does_not_look_fails_checks() -> None:
    for answer, right in ((1, 1), (0, 2)):
        assert sum(passes(kind, answer, answer) for kind in KINDS) == right
    for kind, (question, answer) in MUST_SAY.items():
        given = {"photorealism": answer, "faithfulness": answer}
        assert passes(kind, **given) and not passes(kind, **{**given, question: 1 - answer})


def test_bytes_hold_pixels_alone_and_one_size_for_all(tmp_path: Path) -> None:
    items = sample_items(tmp_path / "run")
    renderer = Renderer(64)
    for shown in [*items[0].pictures, *items[-1].pictures, *(Shown(path=path) for path in items[0].references)]:
        body = renderer.encode(shown)
        assert body[:4] == b"RIFF" and body[8:16] == b"WEBPVP8L", "no chunk but the pixels"
        assert int.from_bytes(body[16:20], "little") + 20 in (len(body), len(body) - 1)
        assert b"secret" not in body
        picture = Image.open(io.BytesIO(body))
        assert picture.size == (64, 64) and not picture.info.keys() & {"exif", "xmp", "icc_profile"}
    path = tmp_path / "exact.png"
    path.write_bytes(encode_png(drawing(5, 64)))
    assert np.array_equal(Image.open(io.BytesIO(renderer.encode(Shown(path=path)))).convert("RGB"), drawing(5, 64))


def test_changes_of_checks() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    here = Path("picture.png")
    assert changed(pixels, Shown(path=here)) is pixels
    assert np.array_equal(changed(pixels, Shown(path=here, change="mirrored")), pixels[:, ::-1])
    closer = changed(pixels, Shown(path=here, change="closer"))
    assert closer.shape == pixels.shape
    assert np.array_equal(changed(pixels, Shown(path=here, change="closer-mirrored")), closer[:, ::-1])
    scrambled = changed(pixels, Shown(path=here, change="scrambled", seed=1))
    assert (scrambled != pixels).any(-1).mean() > 0.9
    assert np.array_equal(np.sort(scrambled.reshape(-1, 3), 0), np.sort(pixels.reshape(-1, 3), 0)), "the same pixels"
    assert not np.array_equal(scrambled, changed(pixels, Shown(path=here, change="scrambled", seed=2)))


def test_what_is_no_picture_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(encode_png(drawing(1, 32))[:60])
    with pytest.raises(ImageError):
        Renderer(64).encode(Shown(path=path))
