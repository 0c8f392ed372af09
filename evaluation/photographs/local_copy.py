"""A user's local copy of COCO or WikiImages, as prompts and reference pictures.

Read by retrieval's importers: COCO's `captions_*.json` with its folder of pictures, WebQA's JSON with the paper's caption
filter. Pictures are made square as is usual for FID on COCO: the middle square, shrunk to 256 pixels (Pillow, bicubic).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from common.images import ImageError, decode_rgb
from evaluation.photographs.protocol import SIDE, Protocol
from retrieval_svc.imports.formats import open_source
from retrieval_svc.imports.records import Options, Record, Rejected, Source, Unreadable, pair_id_of

MAX_SEED = 2**63 - 1
_LATER_CAPTION = re.compile(r"-[2-9]\d*$|-1\d+$")  # the key of a picture's second and later captions


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: a caption with its own picture.

    Attributes:
        number: its place in the run, from 0.
        key: names it in the local copy.
        excluded: ids under which the importer keeps its picture: never to be its neighbor.
        seed: of its picture in every point of the sweep.
    """

    number: int
    key: str
    text: str
    excluded: tuple[str, ...]
    seed: int


@dataclass(frozen=True, kw_only=True)
class LocalCopy:
    """What is read.

    Attributes:
        fingerprint: of the files and how they are read.
        prompts: in the order in which they are drawn.
        references: records of the pictures to compare with.
        rejected: how many records were not taken (unreadable, filtered).
    """

    fingerprint: str
    prompts: tuple[Prompt, ...]
    references: tuple[Record, ...]
    rejected: int


def open_local_copy(protocol: Protocol, source: Path, images: Path | None, count: int, seed: int) -> LocalCopy:
    """Choose prompts, the same for the same files, count and seed; pictures are not read yet.

    Raises:
        SourceError: it is no such copy.
        ValueError: it holds fewer captions than prompts are asked for.
    """
    options = Options(images=images, captions=protocol.captions)
    opened = open_source(source, protocol.name, options)
    records = list(opened.records())
    captions = [record for record in records if isinstance(record, Record)]
    if not 1 <= count <= len(captions):
        why = Counter(record.reason for record in records if isinstance(record, Rejected)).most_common(1)
        dropped = f"; {len(records) - len(captions)} do not, {why[0][1]} of them: {why[0][0]}" if why else ""
        raise ValueError(f"--prompts: {count} asked for, {source} has {len(captions)} captions that qualify{dropped}")
    chosen = random.Random(f"{protocol.name} {seed}").sample(captions, count)
    own = chosen if protocol.reference == "prompts" else _pictures(protocol, source, options)
    return LocalCopy(
        fingerprint=opened.fingerprint,
        prompts=tuple(_prompt(i, r, opened, seed, protocol.captions == "all") for i, r in enumerate(chosen)),
        references=tuple(own),
        rejected=len(records) - len(captions),
    )


def _pictures(protocol: Protocol, source: Path, options: Options) -> list[Record]:
    """Each picture once."""
    opened = open_source(source, protocol.name, replace(options, captions="first"))
    return [record for record in opened.records() if isinstance(record, Record)]


def _prompt(number: int, record: Record, source: Source, seed: int, several: bool) -> Prompt:
    keys = dict.fromkeys((record.key, _LATER_CAPTION.sub("", record.key) if several else record.key))
    name = f"{seed} {record.key}"
    return Prompt(
        number=number,
        key=record.key,
        text=record.caption,
        excluded=tuple(pair_id_of(source.name, key) for key in keys),
        seed=int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) & MAX_SEED,
    )


def reference_pictures(records: Sequence[Record]) -> Iterator[np.ndarray]:
    """uint8 [256, 256, 3] of each record.

    Raises:
        ValueError: a picture cannot be read; the message names it.
    """
    for record in records:
        try:
            assert record.load is not None, "the importers of photographs give files"
            yield middle_square(decode_rgb(record.load()), SIDE)
        except (Unreadable, ImageError, OSError) as error:
            raise ValueError(f"source: picture of {record.key} cannot be read ({error})") from None


def middle_square(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle square of uint8 [H, W, 3], resampled to [side, side, 3]."""
    height, width = picture.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = Image.fromarray(np.ascontiguousarray(picture[top : top + edge, left : left + edge]))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
