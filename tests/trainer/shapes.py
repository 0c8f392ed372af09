"""What the trainer's tests train on: eight entities in three styles, colored shapes as SVG; two are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.corpus import Facet, Pair, read_manifest, write_corpus
from common.scenes import Scene, caption, scene_phrases
from trainer.dataset import Prepared

WIDTH = 384
ENTITIES = {
    "red circle": '<circle cx="8" cy="8" r="7" fill="#e02020"/>',
    "blue circle": '<circle cx="8" cy="8" r="7" fill="#2040e0"/>',
    "green square": '<rect x="2" y="2" width="12" height="12" fill="#20a040"/>',
    "orange square": '<rect x="2" y="2" width="12" height="12" fill="#f09020"/>',
    "purple triangle": '<path d="M8 1 15 15 1 15z" fill="#8030b0"/>',
    "yellow triangle": '<path d="M8 1 15 15 1 15z" fill="#f0d020"/>',
    "black cross": '<path d="M6 1h4v5h5v4h-5v5h-4v-5h-5v-4h5z" fill="#101010"/>',
    "pink cross": '<path d="M6 1h4v5h5v4h-5v5h-4v-5h-5v-4h5z" fill="#f090c0"/>',
}
STYLES = {"plain": "", "outlined": ' stroke="#000000"', "faint": ' opacity="0.5"'}
HELD_OUT = ("orange square", "pink cross")


@dataclass
class LetterEncoder:
    """States of one token a letter, each told by the letter alone: which caption was read can be seen in them."""

    width: int = WIDTH
    calls: int = 0

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.calls += 1
        longest = max(len(t) for t in texts)
        states, mask = torch.zeros(len(texts), longest, self.width), torch.zeros(len(texts), longest, dtype=torch.bool)
        for row, text in enumerate(texts):
            for column, letter in enumerate(text):
                states[row, column, 0] = ord(letter)
                states[row, column, 1 + ord(letter) % (self.width - 1)] = 1.0
                mask[row, column] = True
        return states, mask


def letters(states: np.ndarray, mask: np.ndarray) -> str:
    """The caption that these states are of."""
    return "".join(chr(round(float(s[0]))) for s in states[mask])


def shape_pairs() -> list[Pair]:
    """The corpus: entity by entity, in three styles."""
    made = []
    for entity, body in ENTITIES.items():
        for style, drawn in STYLES.items():
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{body.replace("/>", drawn + "/>")}</svg>'
            )
            made.append(
                Pair(
                    key=f"{style}--{entity.replace(' ', '-')}",
                    caption=caption(entity, style, Scene()),
                    image=svg.encode(),
                    image_format="svg",
                    entity=entity,
                    facets={"style": style},
                    held_out=entity in HELD_OUT,
                )
            )
    return made


def write_shapes(
    folder: Path, pairs: list[Pair], version: str = "1", phrases: tuple[str, ...] = scene_phrases()
) -> None:
    facets = (Facet(name="style", template="{value} style", values=tuple(STYLES)),)
    write_corpus(folder, pairs, name="shapes", version=version, facets=facets, scene_phrases=phrases)


def nearest(pairs: Sequence[Pair]) -> np.ndarray:
    """The same entity in other styles first, then the entities that share its shape; held-out ones for held-out alone."""
    rows = []
    for i, pair in enumerate(pairs):
        same = [j for j, p in enumerate(pairs) if j != i and p.entity == pair.entity]
        shape = pair.entity.split()[1]
        like = [j for j, p in enumerate(pairs) if p.entity != pair.entity and p.entity.split()[1] == shape]
        allowed = [j for j in same + like if pair.held_out or not pairs[j].held_out]
        rows.append((allowed + [-1] * 8)[:8])
    return np.array(rows, np.int32)


def write_nearest(corpus: Path, folder: Path, pairs: Sequence[Pair]) -> None:
    """What `trainer.knn` writes, by hand."""
    (folder / "knn").mkdir(parents=True, exist_ok=True)
    np.save(folder / "knn" / f"{read_manifest(corpus).fingerprint}.npy", nearest(pairs))


def marked(num: int, held_out: Sequence[int], neighbors: np.ndarray) -> Prepared:
    """Pairs whose pictures are one opaque color each, so that a batch tells which pairs it shows (see `shown`)."""
    pictures = {}
    for side in (8, 16, 32, 64):
        pictures[side] = np.empty((num, side, side, 4), np.uint8)
        pictures[side][:] = np.array([0, 201, 78, 255], np.uint8)
        pictures[side][..., 0] = np.arange(num)[:, None, None]
    keys = [f"plain--pair-{i}" for i in range(num)]
    scenes = [[Scene(), Scene(color="red"), Scene(corner="top left"), Scene(color="blue", corner="bottom right")]] * num
    states = np.arange(num * 4 * WIDTH, dtype=np.float32).reshape(num * 4, WIDTH) % 7
    return Prepared(
        folder=Path("nowhere"),
        fingerprint=hashlib.sha256(b"marked").hexdigest(),
        keys=keys,
        entities=[f"pair {i}" for i in range(num)],
        styles=["plain"] * num,
        held_out=np.isin(np.arange(num), list(held_out)),
        scenes=scenes,
        pictures=pictures,
        states=states.astype(np.float16),
        offsets=np.arange(num * 4 + 1),
        neighbors=neighbors.astype(np.int32),
    )


def shown(pictures: Tensor) -> list[int]:
    """The pair that each picture [B, 3, H, W] of a `marked` corpus shows."""
    levels = ((pictures + 1.0) * 127.5).round().to(torch.int64)
    found = []
    for picture in levels:
        inked = (picture[1] == 201) & (picture[2] == 78)
        values: Any = picture[0][inked].unique()
        assert len(values) == 1, "a picture shows one pair"
        found.append(int(values[0]))
    return found
