"""A dual encoder measured on held-out entities: does a text find its picture among a hundred?

Three galleries, each of one picture a held-out entity:

- `one_style`: all in one style on white, for each style that has enough. Only the entity tells its picture from the rest:
  this is the figure that counts.
- `scenes`: any style, each in a scene of its own, as prompts are. Style and scene tell as well, so it is easier.
- `names`: any style on white, asked for by the entity's name alone.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.corpus import Pair, iter_pairs
from common.files import write_atomic, write_json
from common.images import contact_sheet, encode_png
from common.scenes import Scene, caption, sample_scene
from evaluation.suite import draw
from retrieval_svc.embedding import Embedder

GALLERY = 100
SIDE = 128  # pictures are given at least at this side, in pixels
CUTOFFS = (1, 5, 10)
SHEET_ROWS, SHEET_COLUMNS = 16, 6
_SMALL_WORDS = {"a", "for", "in", "of", "the", "with"}
_RIGHT, _FRAME = (30, 150, 60), 6

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One query and its picture."""

    text: str
    pair: Pair
    scene: Scene

    def picture(self, side: int = SIDE) -> np.ndarray:
        """uint8 [side, side, 3]."""
        return draw(self.pair, self.scene, side)


def galleries(corpus: Path, count: int = GALLERY) -> dict[str, list[Asked]]:
    """The galleries by name; `one_style/<style>` once for each style. The same corpus gives the same ones.

    Raises:
        ValueError: the corpus has too few held-out entities.
    """
    pairs = sorted((pair for pair in iter_pairs(corpus) if pair.held_out), key=lambda p: _order(p.key))
    first_of: dict[str, Pair] = {}
    by_style: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        first_of.setdefault(pair.entity, pair)
        by_style[pair.facets["style"]].setdefault(pair.entity, pair)
    if len(first_of) < count:
        raise ValueError(f"corpus: {corpus} has {len(first_of)} held-out entities, {count} are asked for")
    chosen = [first_of[entity] for entity in sorted(first_of, key=_order)[:count]]
    found = {
        "scenes": [_in_scene(pair, sample_scene(random.Random(f"clip/{pair.key}"))) for pair in chosen],
        "names": [Asked(text=pair.entity, pair=pair, scene=Scene()) for pair in chosen],
    }
    for style, of_style in sorted(by_style.items()):
        if len(of_style) >= count:
            entities = sorted(of_style, key=_order)[:count]
            found[f"one_style/{style}"] = [_in_scene(of_style[entity], Scene()) for entity in entities]
    return found


def _order(name: str) -> str:
    return hashlib.sha256(f"clip recall/{name}".encode()).hexdigest()


def _in_scene(pair: Pair, scene: Scene) -> Asked:
    return Asked(text=caption(pair.entity, pair.facets["style"], scene), pair=pair, scene=scene)


def told_words(name: str) -> frozenset[str]:
    """The words that tell an entity: "flag for kenya" and "flag kenya 2" have the same."""
    return frozenset(word for word in re.findall(r"[a-z]+", name.lower()) if word not in _SMALL_WORDS)


def seen_in_training(corpus: Path) -> frozenset[frozenset[str]]:
    """The words of each entity that is not held out: some of them are held-out entities, said otherwise."""
    return frozenset(told_words(pair.entity) for pair in iter_pairs(corpus) if not pair.held_out)


def ranks(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Rank (1 is best) of candidate i for query i by inner product, both [N, D]; equals count against it."""
    scores = queries @ candidates.T
    return (scores >= scores.diagonal()[:, None]).sum(1)


def recall_figures(found: np.ndarray) -> dict[str, float]:
    """Recall at each cutoff, and the median rank, of ranks [N]."""
    recalls = {f"recall_{k}": round(float(np.mean(found <= k)), 4) for k in CUTOFFS}
    return recalls | {"median_rank": float(np.median(found))}


def evaluate_clip(
    embedder: Embedder, corpus: Path, progress: Progress, count: int = GALLERY
) -> tuple[dict[str, Any], np.ndarray]:
    """All figures by flat name, and a contact sheet of the first queries of the first one-style gallery.

    `one_style_*` are means over the styles; `chance_recall_10` is what a blind guess reaches. `*_new_words` leaves out
    the queries whose words some training entity has too, though under another name.
    """
    asked, seen, new = galleries(corpus, count), seen_in_training(corpus), list[bool]()
    measured: dict[str, dict[str, dict[str, float]]] = {}
    sheet = np.zeros((1, 1, 3), np.uint8)
    for i, (name, gallery) in enumerate(asked.items()):
        pictures = [item.picture() for item in gallery]
        texts, images = embedder.texts([item.text for item in gallery]), embedder.images(pictures)
        found = ranks(texts, images)
        if name.startswith("one_style/"):
            new += [
                bool(r <= 10)
                for r, item in zip(found, gallery, strict=True)
                if told_words(item.pair.entity) not in seen
            ]
        measured[name] = {
            "text_to_image": recall_figures(found),
            "image_to_text": recall_figures(ranks(images, texts)),
        }
        if name.startswith("one_style/") and sheet.size == 3:
            sheet = result_sheet([item.text for item in gallery], pictures, texts @ images.T)
        progress("galleries", i + 1, len(asked))
    styles = sorted(name for name in measured if name.startswith("one_style/"))
    if not styles:
        raise ValueError(f"corpus: {corpus} has no style with {count} held-out entities")
    figures: dict[str, Any] = {"model": embedder.name, "gallery": count, "styles": len(styles)}
    figures |= {f"chance_recall_{k}": round(min(k, count) / count, 4) for k in CUTOFFS}
    for way in ("text_to_image", "image_to_text"):
        for figure in (*(f"recall_{k}" for k in CUTOFFS), "median_rank"):
            mean = np.mean([measured[style][way][figure] for style in styles])
            figures[f"one_style_{way}_{figure}"] = round(float(mean), 4)
        for name in ("scenes", "names"):
            figures |= {f"{name}_{way}_{figure}": value for figure, value in measured[name][way].items()}
    figures["one_style_queries_new_words"] = len(new)
    figures["one_style_text_to_image_recall_10_new_words"] = round(float(np.mean(new)), 4) if new else 0.0
    for style in styles:
        figures[f"{style.replace('/', '_')}_recall_10"] = measured[style]["text_to_image"]["recall_10"]
    return figures, sheet


def result_sheet(texts: Sequence[str], pictures: Sequence[np.ndarray], scores: np.ndarray) -> np.ndarray:
    """Two queries a row, each with its true picture and its best results; the right one is framed in green."""
    rows, labels = [], []
    for start in range(0, min(SHEET_ROWS * 2, len(texts) - 1), 2):
        row, said = [], []
        for query in (start, start + 1):
            best = np.argsort(-scores[query], kind="stable")
            place = int(np.flatnonzero(best == query)[0]) + 1
            row.append(pictures[query])
            row += [_framed(pictures[i]) if i == query else pictures[i] for i in best[:SHEET_COLUMNS]]
            said.append(f"{texts[query]} (rank {place})")
        rows.append(row)
        labels.append("true picture, then the best results:   " + "   |   ".join(said))
    return contact_sheet(rows, labels, cell=64)


def _framed(picture: np.ndarray) -> np.ndarray:
    framed = np.full_like(picture, _RIGHT)
    framed[_FRAME:-_FRAME, _FRAME:-_FRAME] = picture[_FRAME:-_FRAME, _FRAME:-_FRAME]
    return framed


def write_clip_results(folder: Path, figures: dict[str, Any], sheet: np.ndarray) -> None:
    """Write `clip.json` and `clip.png`."""
    write_json(folder / "clip.json", figures)
    write_atomic(folder / "clip.png", encode_png(sheet))
