"""The style classifier on a corpus whose styles are known: thin lines, filled shapes, pale shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.corpus import Pair, write_corpus
from common.scenes import Scene
from evaluation.scores.style import (
    fit_style_classifier,
    read_style_classifier,
    training_pictures,
    write_style_classifier,
)
from evaluation.scores.style_features import (
    StyleFeatures,
    bag_of_words,
    fit_patch_words,
    packaged_patch_words,
    patches_of,
    read_patch_words,
    write_patch_words,
)
from evaluation.suite import draw
from retrieval_svc.clip import packaged_clip

LOOKS = {"lines": 'fill="none" stroke="#222" stroke-width="1"', "filled": 'fill="#922"', "pale": 'fill="#fdd"'}


def pairs() -> list[Pair]:
    """Twelve entities (circles and bars of many sizes) in three styles; every third is held out."""
    found = []
    for e in range(12):
        shape = (
            f'<circle cx="16" cy="16" r="{6 + e / 2}"'
            if e % 2
            else f'<rect x="4" y="{4 + e}" width="24" height="{3 + e}"'
        )
        for style, look in LOOKS.items():
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">{shape} {look}/></svg>'
            pair = Pair(
                key=f"{style}--{e}", caption=f"{e}", image=svg.encode(), image_format="svg", entity=f"entity {e}"
            )
            found.append(replace(pair, facets={"style": style}, held_out=e % 3 == 0))
    return found


def silent(task: str, done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("styles") / "corpus"
    write_corpus(folder, pairs(), name="styles", version="1")
    return folder


@pytest.fixture(scope="module")
def encoder() -> StyleFeatures:
    return StyleFeatures(Path(packaged_clip()))


def test_held_out_pictures_are_told_by_their_style(corpus: Path, encoder: StyleFeatures, tmp_path: Path) -> None:
    fitted = fit_style_classifier(corpus, encoder, encoder.name, silent)
    assert fitted.styles == ("filled", "lines", "pale") and fitted.held_out_pictures == 12
    assert fitted.held_out_accuracy >= 0.9
    held_out = [pair for pair in pairs() if pair.held_out]
    large = encoder([draw(pair, Scene(), 256) for pair in held_out])
    styles = [pair.facets["style"] for pair in held_out]
    right = fitted.right(large, styles)
    assert right.mean() >= 0.8, "also of larger pictures"
    assert fitted.right(large, styles[1:] + styles[:1]).mean() < 0.5
    write_style_classifier(tmp_path / "style.safetensors", fitted)
    again = read_style_classifier(tmp_path / "style.safetensors")
    assert again.styles_of(large) == fitted.styles_of(large)
    assert (again.held_out_accuracy, again.encoder, again.corpus) == (
        fitted.held_out_accuracy,
        encoder.name,
        fitted.corpus,
    )
    same = fit_style_classifier(corpus, encoder, encoder.name, silent)
    assert np.array_equal(same.weights, fitted.weights), "deterministic"
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "style.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"style classifier: .*cut\.safetensors cannot be read"):
        read_style_classifier(tmp_path / "cut.safetensors")
    for wrong in (large[:, :5], np.full_like(large, np.nan)):
        with pytest.raises(ValueError, match="is not finite"):
            fitted.styles_of(wrong)


def test_held_out_entities_are_measured_on_and_never_fitted_on(corpus: Path, tmp_path: Path) -> None:
    """Held-out pictures with swapped styles lower the accuracy, and change no weight."""

    words = read_patch_words(packaged_patch_words())

    def bags(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([bag_of_words(picture, words) for picture in pictures])

    turn = dict(zip(LOOKS, [*list(LOOKS)[1:], next(iter(LOOKS))], strict=True))
    swapped = [replace(p, facets={"style": turn[p.facets["style"]]}) if p.held_out else p for p in pairs()]
    write_corpus(tmp_path / "swapped", swapped, name="styles", version="1")
    right = fit_style_classifier(corpus, bags, "bags", silent)
    wrong = fit_style_classifier(tmp_path / "swapped", bags, "bags", silent)
    assert np.array_equal(right.weights, wrong.weights)
    assert wrong.held_out_accuracy < right.held_out_accuracy
    few = [pair for pair in pairs() if pair.facets["style"] == "pale"]
    write_corpus(tmp_path / "one", few, name="styles", version="1")
    with pytest.raises(ValueError, match="has not two styles"):
        fit_style_classifier(tmp_path / "one", bags, "bags", silent)


def test_a_bag_of_patches_does_not_ask_where_they_are(corpus: Path, tmp_path: Path) -> None:
    words = read_patch_words(packaged_patch_words())
    picture = training_pictures(corpus)[0]
    rolled = np.roll(draw(pairs()[3], Scene(corner="top left"), 64), 20, axis=1)
    assert bag_of_words(rolled, words) == pytest.approx(bag_of_words(np.roll(rolled, 6, axis=0), words))
    empty = np.full((64, 64, 3), 90, np.uint8)
    assert len(patches_of(empty)) == 0 and not bag_of_words(empty, words).any()
    bag = bag_of_words(picture, words)
    assert np.linalg.norm(bag) == pytest.approx(1.0)
    made = fit_patch_words(training_pictures(corpus), 16)
    assert made.shape == (16, 27) and np.array_equal(made, fit_patch_words(training_pictures(corpus), 16))
    write_patch_words(tmp_path / "words.safetensors", made)
    assert np.array_equal(read_patch_words(tmp_path / "words.safetensors"), made)
    write_patch_words(tmp_path / "nan.safetensors", np.full_like(made, np.nan))
    for name in ("nan.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=f"patch words: .*{name}"):
            read_patch_words(tmp_path / name)
