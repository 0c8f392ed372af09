"""Preparing a corpus: what is on disk is what the corpus says, each part once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.corpus import CorpusError, read_manifest
from common.files import write_json
from common.images import over_color, rasterize, shrink, to_unit
from common.scenes import Scene, caption
from tests.trainer.shapes import LetterEncoder, letters, shape_pairs, write_nearest, write_shapes
from tests.trainer.test_array_file import files_of_at_most
from trainer import dataset
from trainer.batches import rng_of
from trainer.dataset import NUM_SCENES, RENDER_SIZE, Prepared, open_prepared, prepare, scenes_of, spoken_caption
from trainer.fit_command import open_source
from trainer.presets import preset
from trainer.sources import NeighborSource


def silent(task: str, done: int, total: int) -> None:
    """A progress that is not shown."""


def test_pairs_are_in_corpus_order(prepared_folder: Path, corpus_folder: Path) -> None:
    opened = open_prepared(prepared_folder)
    pairs = shape_pairs()
    assert opened.keys == [p.key for p in pairs]
    assert opened.entities == [p.entity for p in pairs]
    assert opened.styles == [p.facets["style"] for p in pairs]
    assert opened.held_out.tolist() == [p.held_out for p in pairs]
    assert opened.fingerprint == read_manifest(corpus_folder).fingerprint


def test_pictures_are_the_drawn_pairs_at_every_size(prepared_folder: Path) -> None:
    opened = open_prepared(prepared_folder)
    assert {256, 128, 64, 32, 16} <= set(opened.pictures)
    for i, pair in list(enumerate(shape_pairs()))[::5]:
        full = rasterize(pair.image, "svg", RENDER_SIZE)
        for side, pictures in opened.pictures.items():
            expected = shrink(full, RENDER_SIZE // side)
            np.testing.assert_array_equal(pictures[i], expected, err_msg=f"{pair.key} at {side}")


def test_text_is_of_the_captions_asked_for(prepared_folder: Path) -> None:
    opened = open_prepared(prepared_folder)
    pairs = shape_pairs()
    asked = [3 * NUM_SCENES, 7 * NUM_SCENES + 2, 23 * NUM_SCENES + 3, 0]
    states, mask = opened.text(asked)
    assert states.dtype == np.float32 and mask.dtype == bool
    for row, number in enumerate(asked):
        pair, variant = pairs[number // NUM_SCENES], number % NUM_SCENES
        scene = opened.scenes[number // NUM_SCENES][variant]
        said = spoken_caption(pair.key, variant, pair.entity, pair.facets["style"], scene)
        assert letters(states[row], mask[row]) == said
    assert not states[~mask].any()
    assert mask.any(0).all(), "no column of padding alone"


def test_captions_are_encoded_a_chunk_at_a_time(
    prepared_folder: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks that the number of captions is no multiple of, the same states at the same places."""
    together = []
    encode = LetterEncoder.encode
    monkeypatch.setattr(LetterEncoder, "encode", lambda self, texts: together.append(len(texts)) or encode(self, texts))
    monkeypatch.setattr(dataset, "BATCH", 3)
    monkeypatch.setattr(dataset, "CHUNK", 7)
    told = []
    prepare(corpus_folder, tmp_path, LetterEncoder, lambda task, done, total: told.append((task, done, total)))  # type: ignore[arg-type]
    count = NUM_SCENES * len(shape_pairs())
    assert count % 7 and set(together) <= {1, 2, 3} and sum(together) == count
    captions = [done for task, done, total in told if task == "captions" and total == count]
    assert captions == sorted(set(captions)) and captions[-1] == count
    for name in ("states.npy", "offsets.npy"):
        (at_once,), (in_chunks,) = prepared_folder.glob(f"*/text/{name}"), tmp_path.glob(f"*/text/{name}")
        assert at_once.read_bytes() == in_chunks.read_bytes()


def test_a_full_disk_is_an_error(corpus_folder: Path, tmp_path: Path) -> None:
    """To the last byte: what does not fit is not taken for what was asked."""
    written = tmp_path / "text"
    texts = [pair.caption for pair in shape_pairs()]
    dataset._encode(texts, len(texts), written, LetterEncoder(width=2), silent)  # type: ignore[arg-type]
    sizes = {path.name: path.stat().st_size for path in written.iterdir()}
    assert sizes["states.npy"] > sizes["offsets.npy"] > 300
    for room in sizes["states.npy"] - 1, sizes["states.npy"] // 2, sizes["offsets.npy"] - 1:
        with files_of_at_most(room), pytest.raises(OSError, match="File too large"):
            dataset._encode(texts, len(texts), tmp_path / "again", LetterEncoder(width=2), silent)  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    ("said", "error"), [(23, "hold more"), (25, "hold 24"), (0, "num_pairs is 0: there is nothing")]
)
def test_a_corpus_of_another_number_of_pairs_than_it_says(
    said: int, error: str, corpus_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    manifest = tmp_path / "corpus" / "corpus.json"
    write_json(manifest, json.loads(manifest.read_text()) | {"num_pairs": said})
    with pytest.raises(CorpusError, match=error):
        prepare(tmp_path / "corpus", tmp_path / "data", LetterEncoder, silent)  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.npy"))


def test_a_corpus_that_is_replaced_meanwhile(corpus_folder: Path, tmp_path: Path) -> None:
    """Its captions do not come beside another's pictures."""
    corpus = tmp_path / "corpus"
    shutil.copytree(corpus_folder, corpus)

    def replaced(task: str, done: int, total: int) -> None:
        if (task, done) == ("pictures", total):
            write_shapes(corpus, shape_pairs()[::-1], version="2")

    with pytest.raises(CorpusError, match="altered"):
        prepare(corpus, tmp_path / "data", LetterEncoder, replaced)  # type: ignore[arg-type]
    assert not (tmp_path / "data" / "prepared.json").exists()


def test_the_first_variant_is_the_knowledge_bases_caption(prepared_folder: Path) -> None:
    opened = open_prepared(prepared_folder)
    for i, pair in enumerate(shape_pairs()):
        states, mask = opened.text([i * NUM_SCENES])
        assert letters(states[0], mask[0]) == pair.caption
        assert opened.scenes[i][0] == Scene()


def test_pictures_that_are_no_drawings_are_trained_as_they_are_under_their_own_captions(tmp_path: Path) -> None:
    """A corpus without scene phrases: photographs, whose captions nobody may make up."""
    pairs = [replace(p, caption=f"what somebody wrote about picture {i}") for i, p in enumerate(shape_pairs())]
    write_shapes(tmp_path / "corpus", pairs, phrases=())
    prepare(tmp_path / "corpus", tmp_path / "data", LetterEncoder, lambda task, done, total: None)  # type: ignore[arg-type]
    write_nearest(tmp_path / "corpus", tmp_path / "data", pairs)
    opened = open_prepared(tmp_path / "data")
    assert len(opened.offsets) == len(pairs) + 1, "one caption a pair"
    for variant in range(NUM_SCENES):
        states, mask = opened.text([7 * NUM_SCENES + variant, 3 * NUM_SCENES])
        assert letters(states[0], mask[0]) == pairs[7].caption and letters(states[1], mask[1]) == pairs[3].caption
        assert opened.scenes[7][variant] == Scene()
    batch = NeighborSource(prepared=opened, preset=preset("tiny-64")).batch(rng_of(0, 0), 16)
    white = to_unit(over_color(np.asarray(opened.pictures[16]), (255, 255, 255))) - batch.x0[0].movedim(0, -1).numpy()
    assert np.abs(white).max((1, 2, 3)).min() < 1e-6, "each is a picture of the corpus as it is"


def test_scenes_follow_from_the_key() -> None:
    drawn = [scenes_of(f"noto--thing-{i}") for i in range(300)]
    assert drawn[7] == scenes_of("noto--thing-7")
    assert all(len(s) == NUM_SCENES and s[0] == Scene() and Scene() not in s[1:] for s in drawn)
    others = [scene for scenes in drawn for scene in scenes[1:]]
    assert {s.color for s in others} > {None, "red"} and {s.corner for s in others} > {None, "top left"}
    assert len({tuple(s) for s in drawn}) > 250


def test_captions_are_said_as_a_person_might() -> None:
    """Three in ten of the drawn captions begin with an article, and with the right one."""
    said = [spoken_caption(f"k{i}", 1, "apple", "noto", Scene(color="red")) for i in range(400)]
    words = caption("apple", "noto", Scene(color="red"))
    assert all(s.endswith(words) for s in said)
    articles = [s.removesuffix(words) for s in said]
    assert set(articles) <= {"", "an ", "the "}, "no 'a apple'"
    assert 0.2 < sum(a != "" for a in articles) / 400 < 0.4
    assert set(spoken_caption(f"k{i}", 1, "dog", "noto", Scene())[:4] for i in range(400)) == {"dog,", "a do", "the "}
    assert spoken_caption("k", 0, "apple", "noto", Scene()) == caption("apple", "noto", Scene())


def test_preparing_again_does_nothing(prepared_folder: Path, corpus_folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in prepared_folder.rglob("*")}
    encoder = LetterEncoder()
    prepare(corpus_folder, prepared_folder, lambda: encoder, silent)  # type: ignore[arg-type, return-value]
    assert encoder.calls == 0
    assert {p: p.stat().st_mtime_ns for p in prepared_folder.rglob("*")} == before


def test_an_interrupted_preparation_is_taken_up(corpus_folder: Path, tmp_path: Path) -> None:
    def fails() -> LetterEncoder:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_folder, tmp_path, fails, silent)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="prepare"):
        open_prepared(tmp_path)
    drawn = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
    assert drawn, "pictures were done"
    prepare(corpus_folder, tmp_path, LetterEncoder, silent)  # type: ignore[arg-type]
    assert {p: p.stat().st_mtime_ns for p in drawn} == drawn, "and are kept"
    write_nearest(corpus_folder, tmp_path, shape_pairs())
    assert len(open_prepared(tmp_path).keys) == 24


@pytest.mark.parametrize("part", ["knn/*.npy", "states.npy", "offsets.npy", "prepared*.json"])
def test_missing_parts_are_named(prepared_folder: Path, tmp_path: Path, part: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared_folder, folder)
    (gone,) = folder.rglob(part)
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="prepared" if part.startswith("prepared") else gone.name):
        open_prepared(folder)


def test_another_corpus_in_the_same_folder_is_prepared_anew(tmp_path: Path) -> None:
    """A rebuilt corpus must not be trained with the pictures of the one before."""
    first, second = (
        shape_pairs(),
        [replace(p, image=q.image) for p, q in zip(shape_pairs(), shape_pairs()[::-1], strict=True)],
    )
    for name, pairs in (("a", first), ("b", second[:21])):
        write_shapes(tmp_path / name, pairs, version=name)
        prepare(tmp_path / name, tmp_path / "prepared", LetterEncoder, silent)  # type: ignore[arg-type]
        write_nearest(tmp_path / name, tmp_path / "prepared", pairs)
        opened = open_prepared(tmp_path / "prepared")
        assert opened.fingerprint == read_manifest(tmp_path / name).fingerprint
        assert len(opened.keys) == len(pairs) == len(opened.pictures[16])
        assert len(opened.offsets) == len(pairs) * NUM_SCENES + 1
        np.testing.assert_array_equal(opened.pictures[256][0], rasterize(pairs[0].image, "svg", 256))


def test_each_text_encoder_has_its_own_states(corpus_folder: Path, tmp_path: Path) -> None:
    """Another encoder's captions lie beside the first's; pictures are drawn once."""
    folder = tmp_path / "prepared"
    prepare(corpus_folder, folder, LetterEncoder, silent)  # type: ignore[arg-type]
    write_nearest(corpus_folder, folder, shape_pairs())
    pictures = next(folder.glob("*/pictures/256.npy"))
    drawn = pictures.stat().st_mtime_ns
    wide = LetterEncoder(width=512)
    prepare(corpus_folder, folder, lambda: wide, silent, text_encoder="wide")  # type: ignore[arg-type, return-value]
    opened = open_prepared(folder)
    assert (opened.text_encoder, opened.states.shape[1]) == ("wide", 512)
    assert pictures.stat().st_mtime_ns == drawn
    calls = wide.calls
    prepare(corpus_folder, folder, lambda: wide, silent, text_encoder="wide")  # type: ignore[arg-type, return-value]
    prepare(corpus_folder, folder, LetterEncoder, silent)  # type: ignore[arg-type]
    assert wide.calls == calls and open_prepared(folder).states.shape[1] == LetterEncoder.width


def test_captions_of_another_encoder_than_the_presets_are_refused(prepared: Prepared) -> None:
    assert open_source(preset("tiny-64"), prepared)
    with pytest.raises(ValueError, match="384 wide; paper-64 reads 'google/t5-v1_1-xxl', 4096 wide"):
        open_source(preset("paper-64"), prepared)
    with pytest.raises(ValueError, match="encoded by 'other', 384 wide; tiny-64 reads 'the packaged encoder'"):
        open_source(preset("tiny-64"), replace(prepared, text_encoder="other"))
    assert open_source(preset("tiny-256"), replace(prepared, text_encoder="other")), "it reads no text"
