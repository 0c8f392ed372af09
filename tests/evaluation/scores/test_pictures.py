"""Scores of single pictures, on pictures whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import pdist

from common.images import rasterize
from common.scenes import Scene
from evaluation.features import entity_features
from evaluation.scores.alignment import backgrounds_right, placements_right
from evaluation.scores.clip_score import clip_scores, clip_scores_of, ref_clip_scores
from evaluation.scores.color_drift import color_drift
from evaluation.scores.copies import (
    copy_likeness,
    copy_likenesses,
    feature_copies,
    near_copies,
    near_copy_rate,
)
from evaluation.scores.diversity import diversity, prompt_diversities
from evaluation.scores.edge_width import edge_widths
from evaluation.scores.entity import best_of, entity_figures, entity_ranks, found_within, hand_made
from evaluation.suite import draw
from retrieval_svc.clip import ClipEmbedder
from tests.evaluation.test_features import SHAPES, pair
from tests.retrieval_svc.tiny_clip import save_tiny, tiny_clip

RNG = np.random.default_rng(8)
NAMES = list(SHAPES)
PLAIN = Scene()


def picture(name: str, scene: Scene = PLAIN, side: int = 64) -> np.ndarray:
    return draw(pair(name), scene, side)


def neighbor(name: str) -> np.ndarray:
    return rasterize(pair(name).image, "svg", 64)


def noisy(pixels: np.ndarray, levels: float) -> np.ndarray:
    return np.clip(pixels + RNG.normal(0, levels, pixels.shape), 0, 255).astype(np.uint8)


def test_an_entity_is_found_among_others_at_any_size() -> None:
    gallery = hand_made([picture(name) for name in NAMES])
    drawn = hand_made(
        [noisy(picture(name, side=side), 10) for name, side in zip(NAMES, (64, 128, 256, 64), strict=True)]
    )
    ranks = entity_ranks(drawn, [gallery] * 4, range(4))
    assert ranks.tolist() == [1, 1, 1, 1]
    figures = entity_figures(ranks)
    assert (figures.r1.estimate, figures.r5.estimate, figures.mrr.estimate) == (1.0, 1.0, 1.0)
    assert figures.r1.low is not None and figures.r1.low < 0.5, "four pictures prove little"
    assert np.array_equal(gallery[0], entity_features(picture(NAMES[0])))


def test_who_draws_the_same_for_everything_has_found_nothing() -> None:
    gallery = hand_made([picture(name) for name in NAMES])
    blank = hand_made([np.full((64, 64, 3), level, np.uint8) for level in (0, 128, 255, 77)])
    assert entity_ranks(blank, [gallery] * 4, range(4)).tolist() == [4, 4, 4, 4], "like nothing: ties count against"
    same = hand_made([picture("disk")] * 4)
    assert sorted(entity_ranks(same, [gallery] * 4, range(4)).tolist()) == [1, 2, 3, 4]


def test_ranks_become_figures() -> None:
    ranks = np.array([1, 3, 6, 2])
    figures = entity_figures(ranks)
    assert (figures.r1.estimate, figures.r5.estimate) == (0.25, 0.75)
    assert figures.mrr.estimate == pytest.approx((1 + 1 / 3 + 1 / 6 + 1 / 2) / 4)
    assert best_of(ranks, ["b", "a", "b", "a"]).tolist() == [1, 2]
    assert found_within(ranks, 2).tolist() == [1.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="ranks: 0 is below 1"):
        entity_figures(np.array([0, 1]))
    with pytest.raises(ValueError):
        entity_figures(np.array([], np.int64))


def test_features_that_are_not_finite_find_nothing() -> None:
    """A comparison with NaN is false everywhere, which would be rank 0."""
    gallery = np.eye(3)
    for drawn, galleries, said in (
        (np.array([[np.nan, 0, 0]]), [gallery], r"drawn\[0\]"),
        (gallery[:1], [np.full((3, 3), np.inf)], r"galleries\[0\]\[0\]"),
        (gallery[:1], [np.eye(2)], r"targets\[0\]: 0 of a gallery \[2, 2\]"),
        (gallery[:1], [], "1 pictures, 0 galleries"),
    ):
        with pytest.raises(ValueError, match=said):
            entity_ranks(drawn, galleries, [0] * len(galleries) if galleries else [])
    with pytest.raises(ValueError, match=r"targets\[0\]: 3 of a gallery"):
        entity_ranks(gallery[:1], [gallery], [3])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_clip(), tmp_path_factory.mktemp("clip") / "tiny-clip")


def test_the_clip_score_is_what_transformers_own_logits_say(clip_folder: Path) -> None:
    embedder = ClipEmbedder(str(clip_folder))
    prompts = ["a red dog", "castle on a hill"]
    pictures = [RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in prompts]
    model = tiny_clip()
    tokens = embedder._model._tokenizer(prompts, padding=True, return_tensors="pt")  # type: ignore[attr-defined]
    pixels = embedder._model._processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt")  # type: ignore[attr-defined]
    with torch.no_grad():
        asked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        said = model(**asked, pixel_values=pixels["pixel_values"])
        cosines = (said.logits_per_image / model.logit_scale.exp()).diagonal().numpy()
    assert clip_scores_of(embedder, prompts, pictures) == pytest.approx(2.5 * np.maximum(cosines, 0.0), abs=1e-5)
    prefixed = clip_scores_of(embedder, prompts, pictures, prefix="a red castle ")
    assert prefixed != pytest.approx(2.5 * np.maximum(cosines, 0.0), abs=1e-3)


def test_clip_scores_of_known_angles() -> None:
    texts = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    pictures = np.array([[5.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
    assert clip_scores(texts, pictures) == pytest.approx([2.5, 0.0, 2.5 / np.sqrt(2)])
    both = ref_clip_scores(texts, pictures, [np.array([[1.0, 0.0], [0.0, 1.0]])] * 3)
    score, best = 2.5 / np.sqrt(2), 1 / np.sqrt(2)
    assert both == pytest.approx([2 * 2.5 / 3.5, 0.0, 2 * score * best / (score + best)])
    assert clip_scores(np.zeros((0, 2)), np.zeros((0, 2))).shape == (0,)
    for wrong, said in (([[0.0, 0.0]] * 3, r"pictures\[0\]: is all zeros"), ([[np.nan, 1.0]] * 3, r"pictures\[0\]")):
        with pytest.raises(ValueError, match=said):
            clip_scores(texts, np.array(wrong))


@pytest.mark.parametrize("corner", [None, "top left", "bottom right"])
@pytest.mark.parametrize("color", [None, "yellow"])
def test_a_pasted_neighbor_is_a_copy_wherever_it_lies(corner: str | None, color: str | None) -> None:
    scene = Scene(color=color, corner=corner)
    for name in ("triangle", "ring"):
        pasted = picture(name, scene)
        assert copy_likeness(pasted, neighbor(name)) > 0.95
        assert copy_likeness(noisy(pasted, 4), neighbor(name)) > 0.7
        assert copy_likeness(picture(name, scene, 256), neighbor(name)) > 0.95, "of a larger picture, too"
        other = copy_likeness(pasted, neighbor("bar"))
        assert other < 0.6, f"another entity in the same scene: {other}"


def test_a_neighbor_moved_and_scaled_is_still_a_copy() -> None:
    small = Image.fromarray(picture("triangle", side=128)).resize((40, 40), Image.Resampling.BOX)
    canvas = np.full((64, 64, 3), 255, np.uint8)
    canvas[5:45, 17:57] = np.asarray(small)
    assert copy_likeness(canvas, neighbor("triangle")) > 0.85
    turned = np.ascontiguousarray(np.rot90(picture("triangle")))
    assert copy_likeness(turned, neighbor("triangle")) < 0.7, "turned it is none, as documented"


def test_an_empty_background_is_no_likeness() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    assert copy_likeness(white, neighbor("ring")) < 0.5
    dot = white.copy()
    dot[30:34, 30:34] = (200, 0, 0)
    assert copy_likeness(dot, neighbor("ring")) < 0.6
    nothing = np.zeros((64, 64, 4), np.uint8)
    assert copy_likeness(white, nothing) == 1.0 and copy_likeness(dot, nothing) < 0.9


def test_near_copies_are_counted() -> None:
    pictures = [picture("disk"), picture("disk"), picture("disk")]
    likenesses = copy_likenesses(pictures, [[neighbor("bar"), neighbor("disk")], [neighbor("bar")], []])
    assert near_copies(likenesses).tolist() == [1.0, 0.0, 0.0] and likenesses[2] == -1.0
    assert near_copy_rate(likenesses).estimate == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        near_copy_rate(np.array([]))
    with pytest.raises(ValueError, match="neighbor: uint8"):
        copy_likeness(pictures[0], neighbor("disk")[:32])
    with pytest.raises(ValueError, match="cannot be shrunk"):
        copy_likeness(pictures[0][:50], neighbor("disk"))
    features = feature_copies(np.eye(2), [np.array([[0.0, 1.0], [1.0, 1.0]]), np.zeros((0, 2))])
    assert features == pytest.approx([1 / np.sqrt(2), -1.0])


def test_diversity_is_scipys_mean_cosine_distance() -> None:
    features = RNG.normal(size=(8, 5))
    prompts = ["a", "b", "a", "b", "a", "b", "a", "b"]
    wanted = [pdist(features[[i for i, p in enumerate(prompts) if p == name]], "cosine").mean() for name in "ab"]
    assert prompt_diversities(features, prompts) == pytest.approx(wanted)
    assert diversity(features, prompts).estimate == pytest.approx(np.mean(wanted))
    assert diversity(np.tile(features[:1], (4, 1)), ["a"] * 2 + ["b"] * 2).estimate == pytest.approx(0.0, abs=1e-12)
    assert prompt_diversities(np.array([[1.0, 0.0], [-1.0, 0.0]]), ["a", "a"]) == pytest.approx([2.0])
    with pytest.raises(ValueError, match="'b' has one picture"):
        diversity(features[:3], ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"features\[1\]: is all zeros"):
        diversity(np.array([[1.0, 0.0], [0.0, 0.0]]), ["a", "a"])


def test_drift_is_what_was_added() -> None:
    small = RNG.integers(20, 200, (16, 16, 3), dtype=np.uint8)
    large = np.repeat(np.repeat(small, 4, 0), 4, 1)
    assert color_drift(small, large) == 0.0
    assert color_drift(small, large + np.uint8(7)) == 7.0
    redder = large.copy()
    redder[..., 0] += 9
    assert color_drift(small, redder) == pytest.approx(3.0)
    assert color_drift(small, small) == 0.0
    for wrong in (large[:30], large.astype(np.float32), np.zeros((0, 0, 3), np.uint8)):
        with pytest.raises(ValueError, match="picture"):
            color_drift(small, wrong)


def test_an_edge_is_as_wide_as_its_ramp() -> None:
    for width in (1, 2, 4, 8):
        ramp = np.clip((np.arange(64) - 32) / width, 0.0, 1.0) * 200
        picture = np.round(np.tile(ramp[None, :, None], (64, 1, 3))).astype(np.uint8)
        for turned in (picture, picture.swapaxes(0, 1)):
            assert np.median(edge_widths(np.ascontiguousarray(turned))) == pytest.approx(width, rel=0.05)
    blocks = np.zeros((256, 256, 3), np.uint8)
    blocks[64:192, 64:192, 1] = 255  # one channel alone
    assert np.median(edge_widths(blocks)) == 1.0
    flat = np.full((64, 64, 3), 90, np.uint8)
    gradient = np.repeat(np.arange(64, dtype=np.uint8)[:, None, None], 64, 1).repeat(3, 2)
    assert len(edge_widths(flat)) == len(edge_widths(gradient)) == 0
    for wrong in (flat[:16, :16], flat[:30], flat.astype(np.float32)):
        with pytest.raises(ValueError, match="picture"):
            edge_widths(wrong)


def test_colors_and_corners_are_judged_where_they_are_named() -> None:
    scenes = [Scene(color="blue"), Scene(corner="top right"), Scene(color="red", corner="bottom left"), Scene()]
    true = [picture("triangle", scene, 128) for scene in scenes]
    color, corner = backgrounds_right(true, scenes), placements_right(true, scenes)
    assert color.tolist()[0::2] == [1.0, 1.0] and np.isnan(color[[1, 3]]).all()
    assert corner.tolist()[1:3] == [1.0, 1.0] and np.isnan(corner[[0, 3]]).all()
    wrong = [true[i] for i in (2, 0, 1, 3)]
    assert np.nansum(backgrounds_right(wrong, scenes)) == 0.0 and np.nansum(placements_right(wrong, scenes)) == 0.0
    with pytest.raises(ValueError, match="3 for 4 scenes"):
        placements_right(true[:3], scenes)
