"""What the dual encoder's training reads, computed once: features of every training picture, mean states of its texts.

The image trunk stays as it is, so a picture's features are computed once a view and a step costs next to nothing.
Held-out pairs have none: nothing of them is computed, so nothing of them can be trained on.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.dual_encoder import ImageTower, mean_states, pixels_of
from common.files import write_atomic
from common.scenes import WHITE, Scene, compose
from common.text import TextEncoder
from trainer.dataset import NUM_SCENES, Prepared, Progress

CHUNK = 512  # pairs computed between two files: what is lost when it is stopped
_SOURCE = 128  # side of the pictures that views are made from
TAG = "1"


@dataclass(frozen=True, kw_only=True)
class Features:
    """The training pairs of a prepared corpus.

    Attributes:
        pairs: their numbers in the prepared corpus [M]; none is held out.
        images: features of each view [M, V, F] float16; view 0 is the plain picture, view v shows scene v.
        captions: mean token states of the caption of each view's scene [M, V, D] float32.
        names: of the entity alone [M, D] float32.
        entity: number of each pair's entity [M].
        style: number of each pair's style [M].
    """

    pairs: np.ndarray
    images: np.ndarray
    captions: np.ndarray
    names: np.ndarray
    entity: np.ndarray
    style: np.ndarray


def view_of(prepared: Prepared, pair: int, view: int, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: the picture as it is (view 0), or moved, turned a little and tinted in scene `view`."""
    if view == 0:
        full = compose(lambda n: prepared.pictures[n][pair], Scene(), min(_SOURCE, max(prepared.pictures)))
        return np.asarray(Image.fromarray(full).resize((side, side), Image.Resampling.BILINEAR))
    scene = prepared.scenes[pair][view]
    source = min(_SOURCE, max(prepared.pictures))
    picture = Image.fromarray(compose(lambda n: prepared.pictures[n][pair], scene, source))
    rng = random.Random(f"view/{prepared.keys[pair]}/{view}")
    zoom, turn = rng.uniform(0.95, 1.25), np.deg2rad(rng.uniform(-10, 10))
    shift = [rng.uniform(-0.05, 0.05) * source for _ in range(2)]
    cos, sin, middle = zoom * np.cos(turn), zoom * np.sin(turn), source / 2
    matrix = (
        cos,
        -sin,
        middle - cos * middle + sin * middle + shift[0],
        sin,
        cos,
        middle - sin * middle - cos * middle + shift[1],
    )
    fill = scene.rgb if scene.color else WHITE
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=fill
    )
    gain = np.array([rng.uniform(0.9, 1.1) for _ in range(3)])
    resized = np.asarray(moved.resize((side, side), Image.Resampling.BILINEAR))
    return np.clip(resized * gain, 0, 255).astype(np.uint8)


def write_features(
    prepared: Prepared,
    folder: Path,
    tower: ImageTower,
    views: int,
    encoder: Callable[[], TextEncoder],
    progress: Progress,
) -> Features:
    """Compute what is not in `folder` yet, chunk by chunk, and open it all.

    Args:
        folder: of this corpus and this trunk: the caller names it after both.
        tower: the trunk, in evaluation mode.
        views: V, at most NUM_SCENES.
    """
    pairs = np.flatnonzero(~prepared.held_out)
    names = sorted({prepared.entities[pair] for pair in pairs})
    number = {name: i for i, name in enumerate(names)}
    entity = np.array([number[prepared.entities[pair]] for pair in pairs])
    images = [_images(prepared, folder, tower, view, pairs, progress) for view in range(views)]
    styles = sorted(set(prepared.styles))
    return Features(
        pairs=pairs,
        images=np.stack(images, 1),
        captions=_captions(prepared, pairs, views),
        names=_names(names, folder, encoder, progress)[entity],
        entity=entity,
        style=np.array([styles.index(prepared.styles[pair]) for pair in pairs]),
    )


def _images(
    prepared: Prepared, folder: Path, tower: ImageTower, view: int, pairs: np.ndarray, progress: Progress
) -> np.ndarray:
    chunks = []
    for start in range(0, len(pairs), CHUNK):
        path = folder / f"{TAG}-view-{view}-{start:06d}.npy"
        if not path.is_file():
            _write_array(path, _features(prepared, tower, view, pairs[start : start + CHUNK]))
        chunks.append(np.load(path))
        progress(f"view {view}", min(start + CHUNK, len(pairs)), len(pairs))
    return np.concatenate(chunks)


@torch.inference_mode()
def _features(prepared: Prepared, tower: ImageTower, view: int, pairs: np.ndarray, batch: int = 32) -> np.ndarray:
    side, found = tower.config.side, []
    for start in range(0, len(pairs), batch):
        pictures = [view_of(prepared, int(pair), view, side) for pair in pairs[start : start + batch]]
        found.append(tower(pixels_of(pictures, side)).numpy().astype(np.float16))
    return np.concatenate(found)


def _captions(prepared: Prepared, pairs: np.ndarray, views: int) -> np.ndarray:
    """Means of the prepared states of captions pair * NUM_SCENES + view."""
    numbers = (pairs[:, None] * NUM_SCENES + np.arange(views)).ravel()
    means = [prepared.states[prepared.offsets[n] : prepared.offsets[n + 1]].mean(0, dtype=np.float32) for n in numbers]
    return np.stack(means).reshape(len(pairs), views, -1)


def _names(
    names: list[str], folder: Path, encoder: Callable[[], TextEncoder], progress: Progress, batch: int = 128
) -> np.ndarray:
    path = folder / f"{TAG}-names.npy"
    if path.is_file():
        return np.load(path)
    text, found = encoder(), np.zeros((0, 0), np.float32)
    order = sorted(range(len(names)), key=lambda i: len(names[i]))  # similar lengths together: little padding
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        means = mean_states(*text.encode([names[i] for i in chosen])).numpy()
        if not found.size:
            found = np.zeros((len(names), means.shape[1]), np.float32)
        found[chosen] = means
        progress("entities", start + len(chosen), len(order))
    _write_array(path, found)
    return found


def _write_array(path: Path, array: np.ndarray) -> None:
    stream = io.BytesIO()
    np.save(stream, array)
    write_atomic(path, stream.getvalue())
