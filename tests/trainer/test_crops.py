"""Crops of large drawings: pieces of the picture they say they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.images import rasterize
from tests.trainer.shapes import shape_pairs, write_shapes
from trainer import crops
from trainer.crops import CROP, DRAWN_SIZE, EVERY, PER_PICTURE, prepare_crops


def test_crops_are_pieces_of_their_owners(tmp_path: Path) -> None:
    pairs = [replace(p, key=f"{p.key}-{n}") for n in range(2) for p in shape_pairs()][: EVERY + 1]
    write_shapes(tmp_path / "corpus", pairs)
    prepare_crops(tmp_path / "corpus", tmp_path, lambda *told: None)
    pixels = np.load(tmp_path / "crops-1024" / "pixels.npy")
    owners = np.load(tmp_path / "crops-1024" / "owners.npy")
    assert owners.tolist() == [0] * PER_PICTURE + [EVERY] * PER_PICTURE
    assert pixels.shape == (2 * PER_PICTURE, CROP, CROP, 4)
    for row, owner in enumerate(owners):
        whole = rasterize(pairs[owner].image, "svg", DRAWN_SIZE)
        windows = np.lib.stride_tricks.sliding_window_view(whole, (CROP, CROP, 4))[::4, ::4, 0]
        # Candidates by two corners' pixels first: comparing every window whole would take long.
        probe = (windows[..., 0, 0, :] == pixels[row, 0, 0]).all(-1) & (
            windows[..., -1, -1, :] == pixels[row, -1, -1]
        ).all(-1)
        assert any(np.array_equal(windows[r, c], pixels[row]) for r, c in np.argwhere(probe)), "on the grid of 4 pixels"
        assert pixels[row].std() > 0, "with edges"


def test_crops_of_another_corpus_are_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops, "EVERY", 24)
    pairs = shape_pairs()
    for name, chosen in (("a", pairs), ("b", pairs[9:] + pairs[:9])):
        write_shapes(tmp_path / name, chosen, version=name)
        prepare_crops(tmp_path / name, tmp_path, lambda *told: None)
        pixels = np.load(tmp_path / "crops-1024" / "pixels.npy", mmap_mode="r")
        colors = {tuple(c) for c in rasterize(chosen[0].image, "svg", 64).reshape(-1, 4)[::7] if c[3] == 255}
        assert any((pixels[0] == c).all(-1).any() for c in colors), "the first crop is of this corpus's first picture"
