"""What tells styles apart: a bag of small patches, beside the packaged trunk's features.

A style is lines, shading and palette more than shape. So every 3 x 3 patch (in CIE Lab) that touches what stands out from the
picture's border color is assigned to the nearest of 256 words, and the picture is the square roots of their shares
(Varma & Zisserman 2009; Jégou & Chum 2012 for the root). The words are k-means centers of patches of training entities
(`fit_patch_words`), shipped in `patch_words.safetensors`. Beside them stand the trunk's standardized features, at little
weight.

Limits: patches at 64 pixels; from larger pictures only their means are seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from skimage.color import rgb2lab
from sklearn.cluster import MiniBatchKMeans

from common.dual_encoder import load_dual_encoder, pixels_of
from common.files import sha256_file, write_atomic
from evaluation.features import RING, SIDE
from evaluation.scores.sides import shrunk_to

NUM_WORDS = 256
PATCH = 3
PATCHES_PER_PICTURE = 20
STANDS_OUT = 5.0  # in CIE Lab: faint shading tells styles
TRUNK_WEIGHT = 0.03
_BATCH = 64


class StyleFeatures:
    """An `Encoder` of square pictures of 64, 128, 256, ... pixels."""

    def __init__(self, folder: Path) -> None:
        """Load the dual encoder of `folder` and the shipped words.

        Raises:
            CheckpointError, ValueError: what is wrong with which file.
        """
        self._model, digest, _ = load_dual_encoder(folder)
        path = packaged_patch_words()
        self._words = read_patch_words(path)
        self.name = f"patches-2-{sha256_file(path)[:8]}-trunk-{digest[:8]}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, F]."""
        small = [shrunk_to(picture, SIDE) for picture in pictures]
        trunk = [
            self._model.standardized(self._model.tower(pixels_of(small[i : i + _BATCH], self._model.config.side)))
            for i in range(0, len(small), _BATCH)
        ]
        if not trunk:
            return np.zeros((0, self._model.config.num_features + len(self._words)), np.float32)
        bags = np.stack([bag_of_words(picture, self._words) for picture in small])
        return np.concatenate([TRUNK_WEIGHT * torch.cat(trunk).numpy(), bags], axis=1).astype(np.float32)


def bag_of_words(picture: np.ndarray, words: np.ndarray) -> np.ndarray:
    """float64 [W] of unit length (or all zeros, of an empty picture) of uint8 [64, 64, 3] and words [W, 27]."""
    patches = patches_of(picture)
    if not len(patches):
        return np.zeros(len(words))
    nearest = ((words**2).sum(1) - 2.0 * patches @ words.T).argmin(1)
    return np.sqrt(np.bincount(nearest, minlength=len(words)) / len(nearest))


def patches_of(picture: np.ndarray) -> np.ndarray:
    """float32 [P, 27]: Lab patches that touch what stands out from the border's color; uint8 [64, 64, 3]."""
    lab = rgb2lab(picture).astype(np.float32)
    ring = np.ones(lab.shape[:2], bool)
    ring[RING:-RING, RING:-RING] = False
    stands_out = np.linalg.norm(lab - np.median(lab[ring], axis=0), axis=-1) > STANDS_OUT
    places = np.lib.stride_tricks.sliding_window_view(stands_out, (PATCH, PATCH)).any((-1, -2))
    windows = np.lib.stride_tricks.sliding_window_view(lab, (PATCH, PATCH), axis=(0, 1))
    return windows.reshape(*places.shape, -1)[places] / 100.0


def fit_patch_words(pictures: Sequence[np.ndarray], num_words: int = NUM_WORDS) -> np.ndarray:
    """float32 [W, 27] of uint8 pictures [64, 64, 3]; the same pictures give the same words."""
    rng = np.random.default_rng(0)
    chosen = []
    for picture in pictures:
        patches = patches_of(picture)
        chosen.append(patches[rng.choice(len(patches), min(len(patches), PATCHES_PER_PICTURE), replace=False)])
    fitted = MiniBatchKMeans(num_words, random_state=0, batch_size=4096, n_init="auto", max_iter=15)
    return np.asarray(fitted.fit(np.concatenate(chosen)).cluster_centers_, np.float32)


def packaged_patch_words() -> Path:
    """The shipped words: of `style.training_pictures` of the demonstration corpus."""
    return Path(__file__).with_name("patch_words.safetensors")


def write_patch_words(path: Path, words: np.ndarray) -> None:
    """Write words, atomically."""
    write_atomic(path, save({"words": np.ascontiguousarray(words)}))


def read_patch_words(path: Path) -> np.ndarray:
    """Read what `write_patch_words` wrote.

    Raises:
        ValueError: it is missing, damaged, or holds something else.
    """
    try:
        words = load_file(path)["words"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"patch words: {path} cannot be read ({error})") from None
    if words.ndim != 2 or words.shape[1] != 3 * PATCH * PATCH or not np.isfinite(words).all():
        raise ValueError(f"patch words: {path} holds {list(words.shape)}, not finite [words, {3 * PATCH * PATCH}]")
    return words
