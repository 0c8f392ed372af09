"""A knowledge base as a corpus: whatever was imported into retrieval can be trained on."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from client.knowledge_base import KnowledgeBases
from client.retrieval_types import StoredPair
from common.corpus import IMAGE_FORMATS, MAX_KEY_BYTES, CorpusManifest, Facet, Pair, check_replaced, write_corpus
from trainer.dataset import Progress

HELD_OUT_OF = 10  # one entity in so many is held out where that is asked for

log = logging.getLogger(__name__)


def corpus_of_knowledge_base(
    bases: KnowledgeBases, name: str, folder: Path, *, hold_out: bool, progress: Progress
) -> CorpusManifest:
    """Write the pairs of a knowledge base as a corpus that takes `folder`'s place.

    Pairs that are stored without their picture are left out, with a warning. Held out stays what the corpus that was
    imported says is held out.

    Args:
        hold_out: also hold out one entity in HELD_OUT_OF, by the hash of its name (of the pair's id where it has none).

    Raises:
        RetrievalFailed: the service cannot be reached, or has no such knowledge base.
        CorpusError: two pairs cannot be told apart; or `folder` holds something else than a corpus.
        ValueError: the knowledge base holds no picture.
    """
    check_replaced(folder)  # before the work
    stats = bases.stats(name)
    facets = stats.knowledge_base.facets
    pairs = _pairs(bases, name, stats.num_pairs, hold_out, progress)
    first = next(pairs, None)
    if first is None:
        raise ValueError(f"knowledge-base: {name} holds no pair with a picture")
    return write_corpus(
        folder,
        chain((first,), pairs),
        name=name,
        version=str(stats.stored_generation),
        facets=tuple(Facet(**vars(facet)) for facet in facets),
        scene_phrases=stats.knowledge_base.scene_phrases,
    )


def corpus_key(pair_id: str) -> str:
    """The id, if it can be a corpus' key; else its readable part and a hash of it."""
    if not re.search(r"[./\\]", pair_id) and len(pair_id.encode()) <= MAX_KEY_BYTES:
        return pair_id
    readable = re.sub(r"[^0-9A-Za-z_-]+", "-", pair_id)[-60:]
    return f"{readable}-{hashlib.sha256(pair_id.encode()).hexdigest()[:16]}"


def _pairs(bases: KnowledgeBases, name: str, total: int, hold_out: bool, progress: Progress) -> Iterator[Pair]:
    without, held_out = 0, 0
    for number, listed in enumerate(bases.list_pairs(name), start=1):
        stored = bases.get(name, listed.pair_id) if listed.image_format in IMAGE_FORMATS else listed
        if stored.image:
            pair = _pair(stored, hold_out)
            held_out += pair.held_out
            yield pair
        else:
            without += 1
        progress("pairs", number, max(total, number))
    if without:
        log.warning("%d pairs of %s are stored without their picture and are left out", without, name)
    hint = "" if held_out else f": a run needs some, and --hold-out holds out one entity in {HELD_OUT_OF}"
    log.info("%d pairs are held out of training%s", held_out, hint)


def _pair(stored: StoredPair, hold_out: bool) -> Pair:
    key = corpus_key(stored.pair_id)
    named = stored.entity or stored.pair_id
    extra = {k: v for k, v in stored.attributes.items() if k not in ("held_out", "pair_id")}
    return Pair(
        key=key,
        caption=stored.caption,
        image=stored.image,
        image_format=stored.image_format,
        entity=stored.entity,
        facets=dict(stored.facets),
        author=stored.author,
        source=stored.source,
        license=stored.license,
        held_out=stored.attributes.get("held_out") == "true" or (hold_out and _drawn(named)),
        extra=extra if key == stored.pair_id else extra | {"pair_id": stored.pair_id},
    )


def _drawn(entity: str) -> bool:
    return int(hashlib.sha256(entity.encode()).hexdigest(), 16) % HELD_OUT_OF == 0
