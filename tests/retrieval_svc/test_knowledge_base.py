"""gamma(p, B) while B changes: the right entity, nothing that was deleted, nothing lost, every outcome told."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.service.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from retrieval_svc.edge_shard import copy_folder
from retrieval_svc.knowledge_base import KnowledgeBase
from retrieval_svc.manifest import BM25, KnowledgeBaseError, read_manifest
from retrieval_svc.pairs import Change, NewPair, Outcome, PairFilter, point_of
from retrieval_svc.retrieval import Method, Query, QueryWeights, Retrieval
from tests.retrieval_svc.small_pairs import FakeEmbedder, make_picture, make_small, small_pairs

VISIBLE_S = 1.0


def _ids(retrieval: Retrieval) -> list[str]:
    return [neighbor.pair.pair_id for neighbor in retrieval.neighbors]


def _found(knowledge_base: KnowledgeBase, prompt: str, k: int = 10, method: Method = Method.BM25) -> list[str]:
    return _ids(knowledge_base.retrieve(Query(prompt=prompt, k=k, method=method)))


def _outcomes(knowledge_base: KnowledgeBase, *pairs: NewPair) -> list[Outcome]:
    return [upserted.outcome for upserted in knowledge_base.upsert(pairs)[0]]


def _pair(pair_id: str, **changes: object) -> NewPair:
    number = int(hashlib.sha256(pair_id.encode()).hexdigest()[:4], 16)
    given = {"caption": "zeppelin, noto style", "image": make_picture(number)}
    return NewPair(pair_id=pair_id, **(given | changes))  # type: ignore[arg-type]


def test_a_neighbor_is_the_stored_pair(knowledge_base: KnowledgeBase) -> None:
    stored = {pair.pair_id: pair for pair in small_pairs()}["twemoji--guide-dog"]
    (best,) = knowledge_base.retrieve(Query(prompt="guide dog, twemoji style", k=1)).neighbors
    pair = best.pair
    assert (pair.pair_id, pair.caption, pair.entity) == (stored.pair_id, stored.caption, "guide dog")
    assert (best.image, pair.image_format) == (stored.image, "png")
    assert pair.image_sha256 == hashlib.sha256(stored.image).hexdigest()
    assert (pair.author, pair.source, pair.license) == ("author of twemoji", "https://example.org", "CC-BY-4.0")
    assert (pair.facets, best.rank, best.embedding) == ({"style": "twemoji"}, 1, None)
    assert best.legs.keys() == {Method.BM25} and best.score == best.legs[Method.BM25].score > 0
    assert pair.version > 0


def test_pictures_and_embeddings_come_as_asked(knowledge_base: KnowledgeBase) -> None:
    bare = knowledge_base.retrieve(Query(prompt="guide dog", omit_images=True, include_embeddings=True))
    for neighbor in bare.neighbors:
        assert neighbor.image == b"" and neighbor.pair.image_sha256
        assert neighbor.embedding is not None
        assert float(np.linalg.norm(neighbor.embedding)) == pytest.approx(1.0, abs=1e-5)


def test_a_pair_with_a_caption_alone_is_understood(knowledge_base: KnowledgeBase) -> None:
    (pair,) = [n.pair for n in knowledge_base.retrieve(Query(prompt="red panda", k=1)).neighbors]
    assert (pair.entity, pair.facets) == ("red panda", {"style": "noto"})
    assert _ids(knowledge_base.retrieve(Query(prompt="red panda, noto style", exclude_exact=True))) == []


def test_the_order_does_not_depend_on_the_order_of_the_pairs(tmp_path: Path, knowledge_base: KnowledgeBase) -> None:
    with closing(make_small(tmp_path / "small", pairs=small_pairs()[::-1], embedding_size=0)) as other:
        for prompt in ("dog", "guide dog", "cat", "blue things", "noto cat style house"):
            # Of the two pairs with the very same picture either may stand for both.
            assert _found(other, prompt) == _found(knowledge_base, prompt)


def test_outcomes_are_told_one_by_one(changing: KnowledgeBase) -> None:
    before = changing.generation
    red_panda = small_pairs()[-1]
    results, generation = changing.upsert(
        [
            _pair("new"),
            red_panda,
            replace(red_panda, license="CC0-1.0"),
            _pair("bad", image=b"GIF89a"),
            _pair("new", caption="airship, noto style"),
        ]
    )
    assert [r.outcome for r in results] == [
        Outcome.CREATED,
        Outcome.UNCHANGED,
        Outcome.REPLACED,
        Outcome.REJECTED,
        Outcome.REPLACED,
    ]
    assert results[3].field == "image" and "GIF" in results[3].reason
    assert before < generation == changing.generation
    assert changing.get("new").pair.caption == "airship, noto style", "the later of two of one id"
    assert changing.get("captioned").pair.license == "CC0-1.0"
    assert changing.stats().num_pairs == len(small_pairs()) + 1


def test_the_very_same_pairs_change_nothing(changing: KnowledgeBase) -> None:
    generation, fingerprint = changing.generation, changing.fingerprint
    assert set(_outcomes(changing, *small_pairs())) == {Outcome.UNCHANGED}
    assert (changing.generation, changing.fingerprint) == (generation, fingerprint)
    vector = np.arange(1, 9, dtype=np.float32)
    assert _outcomes(changing, _pair("own", embedding=vector)) == [Outcome.CREATED]
    assert changing.fingerprint != fingerprint
    assert _outcomes(changing, _pair("own", embedding=3 * vector), _pair("own")) == [Outcome.UNCHANGED] * 2
    assert _outcomes(changing, _pair("own", embedding=vector[::-1])) == [Outcome.REPLACED]


def test_versions_grow_even_if_the_clock_goes_back(changing: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    last = changing.generation
    monkeypatch.setattr(time, "time_ns", lambda: 7)
    _, first = changing.upsert([_pair("a"), _pair("b")])
    assert [changing.get(i).pair.version for i in ("a", "b")] == [last + 1, last + 2] == [first - 1, first]
    assert changing.delete(["a", "missing", "b", "a"]) == (2, last + 4)
    assert changing.catch_up() == last + 4


@pytest.mark.parametrize(
    ("field", "changes", "reason"),
    [
        ("pair_id", {"pair_id": ""}, "'' is not 1 to 200 bytes"),
        ("pair_id", {"pair_id": "é" * 101}, "is not 1 to 200 bytes"),
        ("pair_id", {"pair_id": "a\nb"}, "without control characters"),
        ("caption", {"caption": " "}, "has 0 characters"),
        ("caption", {"caption": "x" * 2001}, "has 2001 characters"),
        ("caption", {"caption": "half \ud800"}, "control characters"),
        ("author", {"author": "a\x00"}, "control characters"),
        ("source", {"source": "x" * 2001}, "has 2001 characters"),
        ("image", {"image": b""}, "is missing, and so is image_uri"),
        ("image", {"image": b"no picture"}, "picture"),
        ("image", {"image": b"<svg><script/></"}, "SVG"),
        ("image_uri", {"image": b"", "image_uri": "https://x/\n"}, "control characters"),
        ("facets", {"facets": {"a=b": "c"}}, "'a=b' is no facet name"),
        ("facets", {"facets": {"style": "!!"}}, "holds no word"),
        ("facets", {"facets": {"style": " "}}, "is not 1 to 200 characters"),
        ("attributes", {"attributes": {"": "x"}}, "without a name"),
        ("attributes", {"attributes": {"x": "y" * 70_000}}, "has 70001 bytes"),
        ("embedding", {"embedding": np.ones(7, np.float32)}, "has 7 numbers"),
        ("embedding", {"embedding": np.zeros(8, np.float32)}, "has norm 0"),
        ("embedding", {"embedding": np.full(8, np.nan, np.float32)}, "has norm nan"),
    ],
)
def test_bad_pairs_are_rejected_by_field(
    knowledge_base: KnowledgeBase, field: str, changes: dict[str, object], reason: str
) -> None:
    given = {"pair_id": "bad", "caption": "zeppelin", "image": make_picture(1)} | changes
    generation = knowledge_base.generation
    ((result,), _) = knowledge_base.upsert([NewPair(**given)])  # type: ignore[arg-type]
    assert (result.outcome, result.field) == (Outcome.REJECTED, field)
    assert reason in result.reason
    assert knowledge_base.generation == generation


def test_new_facet_values_become_known(changing: KnowledgeBase) -> None:
    with pytest.raises(InvalidArgument, match="names style 'vapor wave'"):
        changing.retrieve(Query(prompt="zeppelin, vapor wave style"))
    changing.upsert([_pair("wave", entity="zeppelin", facets={"style": "Vapor-Wave", "mood": "calm"})])
    changing.upsert([_pair("again", entity="zeppelin", facets={"style": "vapor wave"})])
    changing.catch_up()
    found = changing.retrieve(Query(prompt="zeppelin, vapor wave style", k=2))
    assert found.query is not None and found.query.facets == {"style": "Vapor-Wave"}
    assert {n.pair.facets["style"] for n in found.neighbors} == {"Vapor-Wave"}, "one spelling for all"
    calm = PairFilter(facets={"mood": frozenset({"calm"})})
    assert _ids(changing.retrieve(Query(prompt="zeppelin", filter=calm))) == ["wave"]
    assert read_manifest(changing.folder) == changing.manifest
    assert changing.manifest.facets[0].values[-1] == "Vapor-Wave"


def test_a_new_pair_is_found_within_a_second(changing: KnowledgeBase) -> None:
    changing.upsert([_pair("airship")])
    stored_at = time.monotonic()
    while not (found := _found(changing, "zeppelin")) and time.monotonic() < stored_at + 5:
        time.sleep(0.01)
    assert found == ["airship"] and time.monotonic() < stored_at + VISIBLE_S
    assert "airship" in _found(changing, "zeppelin", 64, Method.CLIP)


def test_what_is_deleted_or_replaced_is_gone_at_once(
    changing: KnowledgeBase, held_back: Callable[[KnowledgeBase], threading.Event]
) -> None:
    go_on = held_back(changing)  # BM25 takes nothing in
    picture = changing.get("twemoji--dog", with_image=True)
    assert changing.delete(["twemoji--dog", "noto--dog", "nobody"])[0] == 2
    changing.upsert([replace(small_pairs()[0], caption="otter, noto style", entity="otter")])  # was noto--guide-dog
    for method in Method:
        answer = changing.retrieve(Query(prompt="dog", k=64, method=method))
        assert not {"twemoji--dog", "noto--dog"} & set(_ids(answer))
        assert all(n.pair.entity == "otter" for n in answer.neighbors if n.pair.pair_id == "noto--guide-dog")
    assert "noto--guide-dog" not in _found(changing, "guide dog")
    assert changing.stats().num_indexed_pairs == len(small_pairs()), "BM25 was held back"
    with pytest.raises(NotFound, match="has no pair 'twemoji--dog'"):
        changing.get("twemoji--dog")
    with pytest.raises(DataLoss, match="is missing"):
        changing.images.read(picture.pair.image_sha256)
    go_on.set()
    changing.catch_up()
    assert changing.stats().num_indexed_pairs == changing.stats().num_pairs == len(small_pairs()) - 2
    assert _found(changing, "otter") == ["noto--guide-dog"]


@pytest.fixture
def held_back() -> Iterator[Callable[[KnowledgeBase], threading.Event]]:
    """Stops the lexical index from taking changes in until the event is set."""
    events: list[threading.Event] = []

    def hold(knowledge_base: KnowledgeBase) -> threading.Event:
        go_on, index = threading.Event(), knowledge_base._lexical
        apply = index.apply  # type: ignore[attr-defined]
        index.apply = lambda changes: (go_on.wait(20), apply(changes))  # type: ignore[attr-defined]
        events.append(go_on)
        return go_on

    yield hold
    for event in events:
        event.set()


def test_a_picture_stays_while_another_pair_has_it(changing: KnowledgeBase) -> None:
    num_images = changing.stats().num_images
    changing.delete(["noto--cat"])
    assert changing.stats().num_images == num_images
    assert changing.get("noto-v1--cat", with_image=True).image == make_picture(1000)
    changing.delete(["noto-v1--cat"])
    assert changing.stats().num_images == num_images - 1
    changing.upsert([replace(small_pairs()[-1], image=make_picture(4242))])
    assert changing.stats().num_images == num_images - 1, "the picture that was replaced is gone"


def test_pictures_are_embedded_in_one_call_and_only_if_new(tmp_path: Path) -> None:
    embedder = FakeEmbedder()
    with closing(make_small(tmp_path / "small", embedder=embedder)) as made:
        assert embedder.calls == [("images", len(small_pairs()))]
        given = _pair("given", embedding=np.ones(8, np.float32))
        made.upsert([*small_pairs(), given, _pair("drawn")])
        assert embedder.calls[1:] == [("images", 1)]
        stored = made.get("given", with_embedding=True).embedding
        assert stored == pytest.approx(np.full(8, 8**-0.5), abs=1e-5)
        nearest = made.retrieve(Query(embedding=stored, k=1, method=Method.CLIP))
        assert _ids(nearest) == ["given"] and nearest.neighbors[0].score == pytest.approx(1.0, abs=1e-5)
        like = Query(image=make_picture(2000), k=1, method=Method.CLIP)
        assert _ids(made.retrieve(like)) == ["captioned"], "a picture finds itself"


def test_without_its_model_a_knowledge_base_answers_what_it_can(small_folder: Path, tmp_path: Path) -> None:
    copy_folder(small_folder, tmp_path / "small")
    vector = np.ones(8, np.float32)
    for embedder, other in ((None, "no model to embed with"), (FakeEmbedder("another"), "embeds with another, size 8")):
        with closing(KnowledgeBase.open(tmp_path / "small", embedder=embedder)) as opened:
            for query in (Query(prompt="dog", method=Method.HYBRID), Query(image=make_picture(1), method=Method.CLIP)):
                with pytest.raises(FailedPrecondition, match=f"embeddings of fake-embedder.*{other}"):
                    opened.retrieve(query)
            raw = Query(prompt="dog", embedding=vector, weights=QueryWeights(text=0), method=Method.HYBRID)
            assert len(_ids(opened.retrieve(raw))) == 2
            assert len(_found(opened, "dog")) == 6
    with closing(KnowledgeBase.open(tmp_path / "small", embedder=FakeEmbedder("another"))) as opened:
        with pytest.raises(FailedPrecondition, match="embeds with another"):
            opened.upsert([_pair("wrong")])
        assert _outcomes(opened, _pair("right", embedding=vector)) == [Outcome.CREATED]


def test_addresses_are_read_only_if_the_operator_allows(tmp_path: Path) -> None:
    pair = _pair("far", image=b"", image_uri="https://pictures.example/1.png")
    with closing(make_small(tmp_path / "a" / "small", embedder=FakeEmbedder(), pairs=[pair])) as opened:
        (neighbor,) = opened.retrieve(Query(prompt="zeppelin", k=1)).neighbors
        assert (neighbor.image, neighbor.pair.image_uri) == (b"", pair.image_uri)
        assert opened.stats().num_embeddings == 0
    allowed = {pair.image_uri: make_picture(5)}

    def read(uri: str) -> bytes:
        return allowed.get(uri, b"")

    with closing(KnowledgeBase.open(tmp_path / "a" / "small", embedder=FakeEmbedder(), uri_reader=read)) as opened:
        (neighbor,) = opened.retrieve(Query(prompt="zeppelin", k=1)).neighbors
        assert (neighbor.image, neighbor.pair.image_format) == (make_picture(5), "png")
        assert _outcomes(opened, pair, replace(pair, image_uri="https://other.example/")) == [Outcome.REPLACED] * 2
        assert _outcomes(opened, pair) == [Outcome.REPLACED]
        assert opened.stats().num_embeddings == 1


def test_a_full_disk_is_told_and_leaves_what_was_there(
    changing: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(images: Sequence[bytes]) -> list[str]:
        raise OSError(28, "No space left on device")

    generation, num_images = changing.generation, changing.stats().num_images
    with monkeypatch.context() as patched:
        patched.setattr(changing.images, "put_all", full)
        with pytest.raises(ResourceExhausted, match="'small': the disk is full"):
            changing.upsert([_pair("new")])
    assert (changing.generation, changing.stats().num_images) == (generation, num_images)
    assert _outcomes(changing, _pair("new")) == [Outcome.CREATED]


def test_a_damaged_picture_is_told(changing: KnowledgeBase) -> None:
    pair = changing.get("twemoji--dog").pair
    next((changing.folder / "images").rglob(pair.image_sha256[2:])).write_bytes(b"half")
    with pytest.raises(DataLoss, match=r"pair .twemoji--dog.: .* is damaged"):
        changing.retrieve(Query(prompt="dog, twemoji style", k=1))


def test_it_is_opened_by_one_at_a_time_and_closed_once(small_folder: Path, tmp_path: Path) -> None:
    copy_folder(small_folder, tmp_path / "small")
    made = KnowledgeBase.open(tmp_path / "small")
    with pytest.raises(KnowledgeBaseError, match="small is in use by process"):
        KnowledgeBase.open(tmp_path / "small")
    made.close()
    made.close()
    with pytest.raises(NotFound, match="'small' is closed"):
        made.retrieve(Query(prompt="dog"))
    with closing(KnowledgeBase.open(tmp_path / "small")) as again:
        assert len(_found(again, "dog")) == 6
    with pytest.raises(KnowledgeBaseError, match="small exists"):
        KnowledgeBase.create(tmp_path / "small")


@pytest.mark.parametrize("damage", ["lost", "behind", "ahead", "short"])
def test_the_lexical_index_can_be_thrown_away(small_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "small"
    copy_folder(small_folder, folder)
    with closing(KnowledgeBase.open(folder)) as made:
        expected = _found(made, "dog")
        generation = made.generation
        kept = (folder / BM25 / "cursor.json").read_text()
        if damage == "behind":
            made.delete(["noto--hot-dog"])
            made.catch_up()
        if damage == "short":  # has lost a pair, and does not know it
            made._lexical.apply([Change(point=point_of("noto--hot-dog"), version=generation, pair=None)])  # type: ignore[attr-defined]
            assert made.num_pairs == 27
    if damage == "lost":
        for path in (folder / BM25).iterdir():
            path.unlink()
    elif damage != "short":
        ahead = kept.replace(str(generation), str(generation + 10**12))
        (folder / BM25 / "cursor.json").write_text(kept if damage == "behind" else ahead)
    with closing(KnowledgeBase.open(folder)) as again:
        left = [i for i in expected if damage != "behind" or i != "noto--hot-dog"]
        assert _found(again, "dog") == left
        assert again.stats().index_generation == again.generation


def test_readers_meet_no_ghosts_while_a_writer_works(changing: KnowledgeBase) -> None:
    """Four threads ask while one replaces, deletes and adds: k different pairs each, and nothing deleted before."""
    deleted: set[str] = set()
    errors: list[BaseException] = []
    finished = threading.Event()
    num_answers = [0] * 4

    def read(number: int) -> None:
        method = list(Method)[number % 3]
        try:
            while not finished.is_set():
                gone = set(deleted)
                answer = changing.retrieve(Query(prompt="zeppelin cat", k=4, method=method))
                found = _ids(answer)
                assert len(found) == 4 == len({n.pair.content for n in answer.neighbors}), answer.shortfall_reason
                assert not gone & set(found)
                assert all(hashlib.sha256(n.image).hexdigest() == n.pair.image_sha256 for n in answer.neighbors)
                num_answers[number] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(8):
        changing.upsert([_pair(f"z{turn}-{i}") for i in range(4)])
        changing.upsert([_pair(f"z{turn}-0", image=make_picture(50_000 + turn))])
        for pair_id in (f"z{turn}-1", f"z{turn}-2"):
            changing.delete([pair_id])
            deleted.add(pair_id)
    finished.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert min(num_answers) > 0
    changing.catch_up()
    stats = changing.stats()
    assert stats.num_pairs == stats.num_indexed_pairs == stats.num_embeddings == len(small_pairs()) + 16
