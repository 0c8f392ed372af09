"""Which style is a picture drawn in? A classifier that has seen training entities alone.

Multinomial logistic regression (scikit-learn) on `style_features.StyleFeatures` (or any other encoder) at 64 pixels, of
pictures in the scenes that prompts name. It is fitted on the spot and deterministically, equally many pictures a style, and
carries its accuracy on true pictures of held-out entities, in scenes: a drawn picture cannot be expected to be told better
than those. On the demonstration corpus that is 0.73 of 600 pictures in ten styles (0.54 with the trunk's features alone).

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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression

from common.corpus import Pair, iter_pairs, read_manifest
from common.files import write_atomic
from common.scenes import sample_scene
from evaluation.features import SIDE
from evaluation.scores.entity import Encoder
from evaluation.suite import draw

FORMAT = "reimagen-style-classifier/2"
PER_STYLE = 200  # pictures fitted on
HELD_OUT_PER_STYLE = 60  # pictures its accuracy is of
REGULARIZATION = 3.0  # scikit-learn's C
_BATCH = 64

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class StyleClassifier:
    """A fitted classifier over features of one encoder.

    Attributes:
        styles: the classes, sorted.
        weights, biases: float32 [S, D] and [S].
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
    fitted = LogisticRegression(C=REGULARIZATION, max_iter=1000)
    fitted.fit(features, [styles.index(pair.facets["style"]) for pair in training])
    weights, biases = _by_class(np.asarray(fitted.coef_), np.asarray(fitted.intercept_))
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
    # scikit-learn's rows lie column by column, which safetensors would write as they lie.
    arrays = {"weights": np.ascontiguousarray(classifier.weights), "biases": np.ascontiguousarray(classifier.biases)}
    write_atomic(path, save(arrays, metadata=header))


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


def training_pictures(corpus: Path, per_style: int = PER_STYLE) -> list[np.ndarray]:
    """The pictures that the classifier, and the words of its features, are fitted on."""
    return [_shown(pair) for pair in _chosen(corpus, per_style, 0)[0]]


def _shown(pair: Pair) -> np.ndarray:
    return draw(pair, sample_scene(random.Random(f"style/{pair.key}")), SIDE)


def _features(pairs: Sequence[Pair], encoder: Encoder, progress: Progress, task: str) -> np.ndarray:
    found = []
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        found.append(encoder([_shown(pair) for pair in batch]))
        progress(task, start + len(batch), len(pairs))
    return np.concatenate(found).astype(np.float64)
