"""Which style is a picture drawn in? A classifier that has seen training entities alone.

Multinomial logistic regression (scikit-learn) on standardized features of the packaged dual encoder's trunk (EfficientNet,
trained on ImageNet and on training entities) at 64 pixels, of pictures in the scenes that prompts name. It is fitted on the
spot and deterministically, equally many pictures a style, and carries its accuracy on true pictures of held-out entities,
in scenes: a drawn picture cannot be expected to be told better than those.

Limits: it tells the ten styles of the demonstration corpus apart, not how well one is drawn; a copied neighbor has its own
style, right or wrong.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression

from common.corpus import Pair, iter_pairs, read_manifest
from common.dual_encoder import load_dual_encoder, pixels_of
from common.files import write_atomic
from common.scenes import sample_scene
from evaluation.features import SIDE
from evaluation.scores.entity import Encoder
from evaluation.scores.sides import shrunk_to
from evaluation.suite import draw

FORMAT = "reimagen-style-classifier/1"
PER_STYLE = 200  # pictures fitted on
HELD_OUT_PER_STYLE = 60  # pictures its accuracy is of
REGULARIZATION = 0.01  # scikit-learn's C
_BATCH = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class StyleClassifier:
    """A fitted classifier over features of one encoder.

    Attributes:
        styles: the classes, sorted.
        weights, biases: float32 [S, D] and [S], standardization folded in.
        encoder: names what the features are of.
        corpus: fingerprint of the corpus it was fitted on.
        held_out_accuracy: share of true pictures of held-out entities whose style it tells; of `held_out_pictures`.
    """

    styles: tuple[str, ...]
    weights: np.ndarray
    biases: np.ndarray
    encoder: str
    corpus: str
    held_out_accuracy: float
    held_out_pictures: int

    def styles_of(self, features: np.ndarray) -> list[str]:
        """The style of each row of features [N, D].

        Raises:
            ValueError: another width, or a number that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.weights.shape[1] or not np.isfinite(features).all():
            raise ValueError(f"features: {list(features.shape)} is not finite [N, {self.weights.shape[1]}]")
        best = (features @ self.weights.T + self.biases).argmax(1)
        return [self.styles[i] for i in best]

    def right(self, features: np.ndarray, styles: Sequence[str]) -> np.ndarray:
        """float64 [N]: 1.0 where a picture is in the style that was asked for."""
        found = self.styles_of(features)
        if len(found) != len(styles):
            raise ValueError(f"styles: {len(styles)} for {len(found)} pictures")
        return np.array([float(a == b) for a, b in zip(found, styles, strict=True)])


class TrunkFeatures:
    """Features of the packaged dual encoder's trunk: an `Encoder` of square pictures of 64, 128, 256, ... pixels."""

    def __init__(self, folder: Path) -> None:
        """Load; CheckpointError names what is wrong with the folder."""
        self._model, digest, _ = load_dual_encoder(folder)
        self.name = f"trunk-{digest[:12]}"

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """float32 [N, F]."""
        small = [shrunk_to(picture, SIDE) for picture in pictures]
        parts = [
            self._model.standardized(self._model.tower(pixels_of(small[i : i + _BATCH], self._model.config.side)))
            for i in range(0, len(small), _BATCH)
        ]
        return torch.cat(parts).numpy() if parts else np.zeros((0, self._model.config.num_features), np.float32)


def fit_style_classifier(
    corpus: Path,
    encoder: Encoder,
    encoder_name: str,
    progress: Progress,
    *,
    per_style: int = PER_STYLE,
    held_out_per_style: int = HELD_OUT_PER_STYLE,
) -> StyleClassifier:
    """Fit on training entities, and measure on held-out ones; the same corpus gives the same classifier.

    Raises:
        ValueError: the corpus has fewer than two styles, or a style without training or held-out pictures.
    """
    training, held_out = _chosen(corpus, per_style, held_out_per_style)
    styles = tuple(sorted({pair.facets["style"] for pair in training}))
    if len(styles) < 2 or styles != tuple(sorted({pair.facets["style"] for pair in held_out})):
        raise ValueError(f"corpus: {corpus} has not two styles with training and with held-out entities each")
    features = _features(training, encoder, progress, "style: training pictures")
    mean, scale = features.mean(0), np.maximum(features.std(0), 1e-6)
    fitted = LogisticRegression(C=REGULARIZATION, max_iter=1000)
    fitted.fit((features - mean) / scale, [styles.index(pair.facets["style"]) for pair in training])
    weights, biases = _by_class(np.asarray(fitted.coef_), np.asarray(fitted.intercept_))
    weights, biases = weights / scale, biases - (weights / scale) @ mean
    blank = StyleClassifier(
        styles=styles,
        weights=weights.astype(np.float32),
        biases=biases.astype(np.float32),
        encoder=encoder_name,
        corpus=read_manifest(corpus).fingerprint,
        held_out_accuracy=0.0,
        held_out_pictures=0,
    )
    told = blank.right(
        _features(held_out, encoder, progress, "style: held-out pictures"), [p.facets["style"] for p in held_out]
    )
    return _measured(blank, told)


def write_style_classifier(path: Path, classifier: StyleClassifier) -> None:
    """Write a classifier as safetensors, atomically."""
    header = {
        "format": FORMAT,
        "styles": json.dumps(classifier.styles),
        "encoder": classifier.encoder,
        "corpus": classifier.corpus,
        "held_out_accuracy": repr(classifier.held_out_accuracy),
        "held_out_pictures": str(classifier.held_out_pictures),
    }
    write_atomic(path, save({"weights": classifier.weights, "biases": classifier.biases}, metadata=header))


def read_style_classifier(path: Path) -> StyleClassifier:
    """Read what `write_style_classifier` wrote.

    Raises:
        ValueError: it is missing, damaged or of another format; the message names it.
    """
    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, Any] = file.metadata() or {}
            weights, biases = file.get_tensor("weights"), file.get_tensor("biases")
        if header.get("format") != FORMAT:
            raise ValueError(f"format {header.get('format')!r}, expected {FORMAT!r}")
        styles = tuple(json.loads(header["styles"]))
        if weights.shape[:1] != (len(styles),) or biases.shape != (len(styles),):
            raise ValueError(f"{len(styles)} styles, weights {list(weights.shape)}")
        return StyleClassifier(
            styles=styles,
            weights=weights,
            biases=biases,
            encoder=header["encoder"],
            corpus=header["corpus"],
            held_out_accuracy=float(header["held_out_accuracy"]),
            held_out_pictures=int(header["held_out_pictures"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"style classifier: {path} cannot be read ({error})") from None


def _measured(classifier: StyleClassifier, told: np.ndarray) -> StyleClassifier:
    return replace(classifier, held_out_accuracy=float(told.mean()), held_out_pictures=len(told))


def _by_class(coefficients: np.ndarray, intercepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One row a class; of two classes scikit-learn keeps the second's alone."""
    if len(coefficients) > 1:
        return coefficients, intercepts
    return np.concatenate([np.zeros_like(coefficients), coefficients]), np.concatenate([[0.0], intercepts])


def _chosen(corpus: Path, per_style: int, held_out_per_style: int) -> tuple[list[Pair], list[Pair]]:
    by_style: dict[tuple[bool, str], list[Pair]] = defaultdict(list)
    for pair in iter_pairs(corpus):
        if "style" in pair.facets:
            by_style[pair.held_out, pair.facets["style"]].append(pair)
    counts = {False: per_style, True: held_out_per_style}
    chosen: dict[bool, list[Pair]] = {False: [], True: []}
    for (held_out, _), pairs in sorted(by_style.items(), key=lambda item: item[0]):
        chosen[held_out] += sorted(pairs, key=lambda pair: _order(pair.key))[: counts[held_out]]
    return chosen[False], chosen[True]


def _order(key: str) -> str:
    return hashlib.sha256(f"style classifier/{key}".encode()).hexdigest()


def _features(pairs: Sequence[Pair], encoder: Encoder, progress: Progress, task: str) -> np.ndarray:
    found = []
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        found.append(encoder([draw(pair, sample_scene(random.Random(f"style/{pair.key}")), SIDE) for pair in batch]))
        progress(task, start + len(batch), len(pairs))
    return np.concatenate(found).astype(np.float64)
