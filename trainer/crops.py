"""Large crops of vector pictures, drawn once: what the last super-resolution stage trains on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.corpus import iter_pairs, read_manifest
from common.files import replacing_folder
from common.images import rasterize
from trainer.array_file import array_file, write_array
from trainer.dataset import Progress

DRAWN_SIZE = 1024
CROP = 256
PER_PICTURE = 3
EVERY = 16  # one picture in so many is drawn: crops of a thousand pictures already differ enough


def prepare_crops(corpus: Path, folder: Path, progress: Progress) -> None:
    """Write `<folder>/crops-1024` (`pixels.npy` premultiplied RGBA uint8 [M, CROP, CROP, 4], `owners.npy` [M]).

    Of each drawn picture the PER_PICTURE crops with most edges among a few are kept. What is there is kept.
    """
    target = folder / f"crops-{DRAWN_SIZE}"
    fingerprint = read_manifest(corpus).fingerprint
    if (target / "corpus.txt").is_file() and (target / "corpus.txt").read_text() == fingerprint:
        return
    total = -(-read_manifest(corpus).num_pairs // EVERY)
    with replacing_folder(target) as temporary, array_file(temporary / "pixels.npy", "|u1") as pixels:
        owners = np.repeat(np.arange(total) * EVERY, PER_PICTURE)
        rng = np.random.default_rng(0)
        for number, pair in enumerate(iter_pairs(corpus)):
            if number % EVERY:
                continue
            full = rasterize(pair.image, pair.image_format, DRAWN_SIZE)
            corners = rng.integers(0, (DRAWN_SIZE - CROP) // 4 + 1, (3 * PER_PICTURE, 2)) * 4
            found = [full[top : top + CROP, left : left + CROP] for top, left in corners]
            found.sort(key=lambda crop: -float(crop[::4, ::4].std()))
            pixels.append(np.stack(found[:PER_PICTURE]))
            progress("crops", number // EVERY + 1, total)
        write_array(temporary / "owners.npy", owners)
        (temporary / "corpus.txt").write_text(fingerprint)
