"""A snapshot into a service that runs, be it on a Qdrant cluster: `retrieval_svc restore` makes libraries alone.

The snapshot is checked and restored into a library that is thrown away, a service of our own serves it, and every pair is asked
of that one and told to the other. Pairs that are there already are left as they are: it may be ended and begun again.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from client.knowledge_base import KnowledgeBases
from client.retrieval_types import KnowledgeBaseInfo, StoredPair
from deploy.operators.restore_drill import DrillFailed, served
from retrieval_svc.snapshot import restore


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What came of it.

    Attributes:
        outcomes: pairs by what the service did with them: `created`, `replaced`, `unchanged`.
        more: pairs that the service has and the snapshot has not: they are left.
    """

    outcomes: Mapping[str, int]
    more: int


def restore_to(snapshot: Path, target: KnowledgeBases, name: str) -> Restored:
    """Put a snapshot's pairs into a knowledge base of a service, which is made if it is not there.

    Args:
        snapshot: its folder; a copy of it has room where temporary files go.
        target: the service, asked with an admin key.
        name: of the knowledge base.

    Raises:
        SnapshotError: the snapshot is damaged or incomplete.
        InvalidArgument: the name cannot be.
        DrillFailed: the service refuses a pair of it.
        ValueError: the knowledge base that is there has other facets, scene phrases or embeddings.
    """
    with tempfile.TemporaryDirectory(prefix="restore-") as folder:
        work = Path(folder)
        restore(snapshot, work / "library", name)
        with served(work / "library", work / "snapshots", work) as saved:
            return copy(saved, target, name)


def copy(saved: KnowledgeBases, target: KnowledgeBases, name: str) -> Restored:
    """Every pair of a knowledge base into that of the same name of another service; see `restore_to`."""
    info = _info(saved, name)
    assert info is not None, "it was restored"
    make_alike(target, info)
    outcomes: Counter[str] = Counter()
    ids: set[str] = set()
    for said in target.upsert(name, _pairs(saved, info)):
        if said.outcome == "rejected":
            raise DrillFailed(f"{said.pair_id}: {said.field}: {said.reason}")
        outcomes[said.outcome] += 1
        ids.add(said.pair_id)
    there = {pair.pair_id for pair in target.list_pairs(name)}
    if missing := ids - there:
        raise DrillFailed(
            f"{name}: {len(missing)} pairs are not there after they were stored, {min(missing)!r} one of them"
        )
    return Restored(outcomes=dict(outcomes), more=len(there - ids))


def _info(bases: KnowledgeBases, name: str) -> KnowledgeBaseInfo | None:
    return next((base for base in bases.list() if base.name == name), None)


def make_alike(target: KnowledgeBases, info: KnowledgeBaseInfo) -> None:
    """Have a service make the knowledge base of this name if it has none; one that is there must be as this one.

    One without embeddings may get some from the service's CLIP model; embeddings of one model are not mixed with another's.

    Raises:
        ValueError: it has other facets, scene phrases or embeddings, or the service has another CLIP model; none is made then.
    """
    made, there = False, _info(target, info.name)
    if there is None:
        made, size = True, info.embedding_size
        there = target.create(info.name, facets=info.facets, scene_phrases=info.scene_phrases, embedding_size=size)
    if different := _different(there, info):
        if made:
            target.delete(info.name)
        advice = "" if made else ": delete it first"
        raise ValueError(f"knowledge base: {info.name!r} has other {different} there than in the snapshot{advice}")


def _different(there: KnowledgeBaseInfo, info: KnowledgeBaseInfo) -> str:
    parts = ["facets", "scene_phrases"]
    if info.embedding_size:
        parts += ["embedding_size", *(["embedding_model"] if there.embedding_model and info.embedding_model else [])]
    return next((part for part in parts if getattr(there, part) != getattr(info, part)), "")


def _pairs(saved: KnowledgeBases, info: KnowledgeBaseInfo) -> Iterator[StoredPair]:
    """Whole pairs, each by a call of its own; pictures that are elsewhere stay there."""
    total = saved.stats(info.name).num_pairs
    listed = tqdm(
        saved.list_pairs(info.name), desc="restore", unit=" pairs", total=total, disable=None, file=sys.stderr
    )
    for pair in listed:
        yield saved.get(
            info.name, pair.pair_id, include_image=not pair.image_uri, include_embedding=bool(info.embedding_size)
        )
