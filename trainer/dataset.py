"""What a training step reads, prepared once: pictures, text states, neighbors. All are plain arrays on disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from common.corpus import CorpusError, CorpusManifest, Pair, iter_shard, read_manifest
from common.files import replacing_folder, write_json
from common.images import rasterize, shrink
from common.scenes import Scene, caption, sample_scene
from common.text import TextEncoder
from trainer.array_file import array_file, write_array

RENDER_SIZE = 256
NUM_SCENES = 4  # captions encoded per pair: the first is plain white, which is also the knowledge base's caption
TAG = "2"
BATCH = 256  # captions encoded together
CHUNK = 8 * BATCH  # captions among which those of similar lengths are sought; all their states are in memory

Progress = Callable[[str, int, int], None]
"""(task, done, total)."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared corpus, opened.

    Attributes:
        keys, entities, styles, held_out: of each pair [N].
        scenes: NUM_SCENES scenes of each pair, the first plain white.
        pictures: premultiplied RGBA uint8 [N, side, side, 4] by side, memory-mapped.
        states: token states of every caption, end to end, float16 [T, width].
        offsets: first token of caption (pair * NUM_SCENES + variant), int64 [N * NUM_SCENES + 1]; where pairs are
            trained as they are, of each pair's one caption, [N + 1].
        neighbors: indices of each pair's nearest other pairs, -1 where there are fewer, int32 [N, candidates].
        text_encoder: what encoded the captions, as presets name it.
    """

    folder: Path
    fingerprint: str
    keys: list[str]
    entities: list[str]
    styles: list[str]
    held_out: np.ndarray
    scenes: list[list[Scene]]
    pictures: dict[int, np.ndarray]
    states: np.ndarray
    offsets: np.ndarray
    neighbors: np.ndarray
    text_encoder: str = ""

    def text(self, captions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """States float32 [B, L, width] and mask bool [B, L] of caption numbers (pair * NUM_SCENES + variant)."""
        shared = NUM_SCENES * len(self.keys) // (len(self.offsets) - 1)  # NUM_SCENES where a pair has one caption
        spans = [(int(self.offsets[c // shared]), int(self.offsets[c // shared + 1])) for c in captions]
        longest = max((end - start for start, end in spans), default=1)
        states = np.zeros((len(spans), longest, self.states.shape[1]), np.float32)
        mask = np.zeros((len(spans), longest), bool)
        for row, (start, end) in enumerate(spans):
            states[row, : end - start] = self.states[start:end]
            mask[row, : end - start] = True
        return states, mask


def scenes_of(key: str, *, as_it_is: bool = False) -> list[Scene]:
    """The scenes in which a pair is trained, drawn from its key: plain white first; all of them where it stays as it is."""
    if as_it_is:
        return [Scene()] * NUM_SCENES
    rng = random.Random(f"scenes/{key}")
    drawn = [Scene()]
    while len(drawn) < NUM_SCENES:
        scene = sample_scene(rng)
        if scene != Scene():
            drawn.append(scene)
    return drawn


def spoken_caption(key: str, variant: int, entity: str, style: str, scene: Scene) -> str:
    """The caption as a person might type it: three in ten of the drawn ones begin with an article."""
    words = caption(entity, style, scene)
    rng = random.Random(f"article/{key}/{variant}")
    if variant == 0 or rng.random() >= 0.3:
        return words
    own = "an" if entity[:1] in tuple("aeiou") else "a"
    return f"{rng.choice((own, own, 'the'))} {words}"


def prepare(
    corpus: Path, folder: Path, encoder: Callable[[], TextEncoder], progress: Progress, *, text_encoder: str = ""
) -> None:
    """Write pictures and text states of `corpus` under `folder`, each part once; what is there is kept.

    A corpus whose manifest has scene phrases is of drawings, which are trained in scenes of their own, under captions
    that say so; any other's pairs are trained as they are, under their own captions.

    Neighbors are written by `trainer.knn`, through the retrieval service.

    Args:
        encoder: loads the text encoder, which presets name `text_encoder`.

    Raises:
        CorpusError: it holds no pair, or more or fewer than its manifest says, and see `iter_pairs`.
    """
    manifest = read_manifest(corpus)
    fingerprint = manifest.fingerprint
    done = folder / "prepared.json"
    there = json.loads(done.read_text()) if done.is_file() else {"of": None}
    if there["of"] == f"{TAG}/{fingerprint}" and there.get("text_encoder", "") == text_encoder:
        return
    if manifest.num_pairs < 1:
        raise CorpusError(f"corpus: {corpus}: num_pairs is {manifest.num_pairs}: there is nothing to train on")
    as_they_are = not manifest.scene_phrases
    parts = folder / f"{TAG}-{fingerprint[:12]}"
    if not (parts / "pictures").is_dir():
        _render(_pairs(corpus, manifest), manifest.num_pairs, parts / "pictures", progress)
    if not (parts / _text_folder(text_encoder)).is_dir():
        pairs, count = _pairs(corpus, manifest), manifest.num_pairs if as_they_are else NUM_SCENES * manifest.num_pairs
        texts = (pair.caption for pair in pairs) if as_they_are else _spoken(pairs)
        _encode(texts, count, parts / _text_folder(text_encoder), encoder(), progress)
    described = [
        {"key": p.key, "entity": p.entity, "style": p.facets.get("style", ""), "held_out": p.held_out}
        for p in _pairs(corpus, manifest)
    ]
    of = {"of": f"{TAG}/{fingerprint}", "fingerprint": fingerprint, "text_encoder": text_encoder}
    of |= {"as_they_are": as_they_are}
    write_json(done, {**of, "pairs": described})


def _pairs(corpus: Path, manifest: CorpusManifest) -> Iterator[Pair]:
    """The pairs of the corpus that this manifest describes, though another may have taken its place meanwhile."""
    num = 0
    for num, pair in enumerate((p for shard in manifest.shards for p in iter_shard(corpus, shard)), start=1):
        if num > manifest.num_pairs:
            break
        yield pair
    if num != manifest.num_pairs:
        held = "more" if num > manifest.num_pairs else num
        raise CorpusError(f"corpus: {corpus}: num_pairs is {manifest.num_pairs}, and its shards hold {held}")


def _text_folder(text_encoder: str) -> str:
    """Each encoder's states have a folder of their own; the packaged one's have had theirs from the beginning."""
    return f"text-{hashlib.sha256(text_encoder.encode()).hexdigest()[:12]}" if text_encoder else "text"


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` and `knn` wrote.

    Raises:
        FileNotFoundError: a part is missing; the message names it.
    """
    found = folder / "prepared.json"
    if not found.is_file():
        raise FileNotFoundError(f"--data: {folder} holds no prepared corpus; run `python -m trainer prepare` first")
    document = json.loads(found.read_text())
    neighbors = folder / "knn" / f"{document['fingerprint']}.npy"
    if not neighbors.is_file():
        raise FileNotFoundError(
            f"--data: {folder} holds no neighbors of its corpus ({neighbors.name}); run `python -m trainer knn` first"
        )
    pairs, parts = document["pairs"], folder / f"{TAG}-{document['fingerprint'][:12]}"
    text_encoder = document.get("text_encoder", "")
    text = parts / _text_folder(text_encoder)
    return Prepared(
        folder=folder,
        fingerprint=document["fingerprint"],
        keys=[p["key"] for p in pairs],
        entities=[p["entity"] for p in pairs],
        styles=[p["style"] for p in pairs],
        held_out=np.array([p["held_out"] for p in pairs]),
        scenes=[scenes_of(p["key"], as_it_is=document.get("as_they_are", False)) for p in pairs],
        pictures={int(f.stem): np.load(f, mmap_mode="r") for f in (parts / "pictures").glob("*.npy")},
        states=np.load(text / "states.npy", mmap_mode="r"),
        offsets=np.load(text / "offsets.npy"),
        neighbors=np.load(neighbors),
        text_encoder=text_encoder,
    )


def _render(pairs: Iterable[Pair], count: int, folder: Path, progress: Progress) -> None:
    sides = [RENDER_SIZE >> shift for shift in range(6)]  # 256 to 8: three grown sizes, and a small entity in each
    with replacing_folder(folder) as temporary, ExitStack() as files:
        arrays = {side: files.enter_context(array_file(temporary / f"{side}.npy", "|u1")) for side in sides}
        for i, pair in enumerate(pairs):
            full = rasterize(pair.image, pair.image_format, RENDER_SIZE)
            for side, array in arrays.items():
                array.append((full if side == RENDER_SIZE else shrink(full, RENDER_SIZE // side))[None])
            progress("pictures", i + 1, count)


def _spoken(pairs: Iterable[Pair]) -> Iterator[str]:
    """NUM_SCENES captions of each pair."""
    for pair in pairs:
        for variant, scene in enumerate(scenes_of(pair.key)):
            yield spoken_caption(pair.key, variant, pair.entity, pair.facets.get("style", ""), scene)


def _encode(texts: Iterable[str], count: int, folder: Path, encoder: TextEncoder, progress: Progress) -> None:
    """Write the states of `count` texts, end to end. Those of one chunk are all that is in memory."""
    offsets, remaining = [0], iter(texts)
    with replacing_folder(folder) as temporary, array_file(temporary / "states.npy", "<f2") as file:
        while chunk := list(islice(remaining, CHUNK)):
            for states in _encoded(chunk, encoder, lambda done: progress("captions", len(offsets) - 1 + done, count)):
                file.append(states)
                offsets.append(offsets[-1] + len(states))
        write_array(temporary / "offsets.npy", np.array(offsets, "<i8"))


def _encoded(texts: Sequence[str], encoder: TextEncoder, progress: Callable[[int], None]) -> list[np.ndarray]:
    """States float16 [L, width] of each text."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: little padding
    encoded: list[np.ndarray] = [np.empty(0)] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        states, mask = encoder.encode([texts[i] for i in chosen])
        for row, i in enumerate(chosen):
            encoded[i] = states[row][mask[row]].numpy().astype(np.float16)
        progress(start + len(chosen))
    return encoded
