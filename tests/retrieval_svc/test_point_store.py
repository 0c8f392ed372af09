"""What every pair store does, over each engine: see `stores.py` for what `server_local_imitation` is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.service.errors import InvalidArgument
from retrieval_svc.pairs import PairFilter, point_of
from retrieval_svc.point_store import PointStore
from tests.retrieval_svc.stores import KINDS, NOW, make_blank, open_store, pair, vectors


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blank(tmp_path_factory.mktemp("blank") / "pairs")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, blank: Path, tmp_path: Path) -> Iterator[PointStore]:
    with open_store(request.param, blank, tmp_path / "pairs") as opened:
        yield opened


def ids(found: object) -> list[str]:
    return [getattr(hit, "pair", hit).pair_id for hit in found]  # type: ignore[attr-defined]


def test_an_empty_store(store: PointStore) -> None:
    assert (store.count(), store.latest_version(), store.changes(0, 10)) == (0, 0, [])
    assert store.page(after="", limit=5, filter=PairFilter()) == ([], "")
    assert store.nearest(vectors(1)[0], limit=5, filter=PairFilter()) == []
    assert store.delete(["nobody"], NOW) == 0
    assert store.get(["nobody"]) == {}
    store.upsert([], [])


def test_a_pair_comes_back_as_it_was_given(store: PointStore) -> None:
    given = [pair(0, facets={"style": "noto", "hue": "größe=ü"}, caption="日本 \U0001f436"), pair(1, image_sha256="")]
    given[1] = replace(given[1], image_uri="https://example.org/1.png")
    embedding = vectors(1)[0]
    store.upsert(given, [embedding, None])
    found = store.get(["pair/0", "pair/1", "nobody", "pair/0"], with_embeddings=True)
    assert {name: hit.pair for name, hit in found.items()} == {"pair/0": given[0], "pair/1": given[1]}
    stored = found["pair/0"].embedding
    assert stored is not None and stored.dtype == np.float32
    assert stored == pytest.approx(embedding / np.linalg.norm(embedding), abs=1e-6)
    assert found["pair/1"].embedding is None
    assert store.get(["pair/0"])["pair/0"].embedding is None
    assert (store.count(), store.count(with_embedding=True)) == (2, 1)


def test_replacing_leaves_nothing_of_the_old_pair(store: PointStore) -> None:
    store.upsert([pair(0, "cat")], [vectors(1)[0]])
    newer = pair(0, "dog", facets={}, version=NOW + 9)
    store.upsert([newer], [None])
    assert store.get(["pair/0"])["pair/0"].pair == newer
    assert (store.count(), store.count(with_embedding=True)) == (1, 0)
    assert store.count(PairFilter(facets={"style": frozenset(("noto",))})) == 0
    assert store.nearest(vectors(1)[0], limit=5, filter=PairFilter()) == []
    assert store.named("cat", {}) == [] and ids(store.named("dog", {})) == ["pair/0"]
    assert [(change.version, change.pair) for change in store.changes(0, 10)] == [(NOW + 9, newer)]


def test_a_wrong_embedding_is_refused_and_stores_nothing(store: PointStore) -> None:
    for bad in (np.ones(3), np.zeros(8), np.full(8, np.inf)):
        with pytest.raises(ValueError, match="an embedding has"):
            store.upsert([pair(0), pair(1)], [vectors(1)[0], bad])
    assert store.count() == 0
    with pytest.raises(ValueError, match="size 8"):
        store.nearest(np.ones(3), limit=1, filter=PairFilter())


def test_what_is_deleted_is_seen_in_changes_alone(store: PointStore) -> None:
    given = [pair(number, image_sha256="ab" * 32) for number in range(4)]
    store.upsert(given, vectors(4))
    assert store.delete(["pair/1", "nobody", "pair/3", "pair/1"], NOW + 100) == 2
    assert store.delete(["pair/1"], NOW + 200) == 0
    assert sorted(store.get([p.pair_id for p in given])) == ["pair/0", "pair/2"]
    assert sorted(ids(store.nearest(vectors(4)[1], limit=9, filter=PairFilter()))) == ["pair/0", "pair/2"]
    assert sorted(ids(store.nearest(vectors(4)[1], limit=9, filter=PairFilter(), exact=True))) == ["pair/0", "pair/2"]
    assert sorted(ids(store.page(after="", limit=9, filter=PairFilter())[0])) == ["pair/0", "pair/2"]
    assert ids(store.named("guide dog", {})) == ["pair/0", "pair/2"]
    assert (store.count(), store.count(with_embedding=True)) == (2, 2)
    newest = [(c.point, c.version, c.pair) for c in store.changes(NOW + 50, 10)]
    assert newest == [(point_of("pair/1"), NOW + 100, None), (point_of("pair/3"), NOW + 101, None)]
    assert store.latest_version() == NOW + 101
    assert store.contents_in_use(["ab" * 32]) == {"ab" * 32}
    store.delete(["pair/0", "pair/2"], NOW + 300)
    assert store.contents_in_use(["ab" * 32]) == set()


def test_a_deleted_pair_can_come_back(store: PointStore) -> None:
    store.upsert([pair(0)], [None])
    store.delete(["pair/0"], NOW + 5)
    again = pair(0, version=NOW + 6)
    store.upsert([again], [vectors(1)[0]])
    assert store.get(["pair/0"])["pair/0"].pair == again
    assert [change.pair for change in store.changes(0, 10)] == [again]


def test_old_tombstones_are_dropped_and_the_newest_change_is_not(store: PointStore) -> None:
    store.upsert([pair(number) for number in range(4)], [None] * 4)
    store.delete([f"pair/{number}" for number in range(4)], NOW + 100)
    store.drop_tombstones(NOW + 101)
    assert [change.version - NOW for change in store.changes(0, 10)] == [101, 102, 103]
    store.drop_tombstones(NOW + 1000)
    assert [change.version - NOW for change in store.changes(0, 10)] == [103]
    assert store.latest_version() == NOW + 103


def test_changes_are_exact_though_the_engine_compares_versions_as_floats(store: PointStore) -> None:
    count = 1200  # more than are asked for, slack and all
    for start in range(0, count, 400):
        store.upsert([pair(number) for number in range(start, start + 400)], [None] * 400)
    for since in (0, NOW - 1, NOW, NOW + 255, NOW + 256, NOW + count - 2, NOW + count - 1):
        assert [c.version for c in store.changes(since, 7)] == [v for v in range(NOW, NOW + count) if v > since][:7]
    seen, since = [], 0
    while changes := store.changes(since, 400):
        seen += [change.version for change in changes]
        since = changes[-1].version
    assert seen == list(range(NOW, NOW + count))


def test_changes_of_one_version_come_together(store: PointStore) -> None:
    store.upsert([pair(number, version=NOW + number // 5) for number in range(20)], [None] * 20)
    assert [c.version - NOW for c in store.changes(NOW, 2)] == [1] * 5
    assert len(store.changes(0, 7)) == 10
    with pytest.raises(ValueError, match="limit 0"):
        store.changes(0, 0)


def test_pages_cover_everything_once_in_a_fixed_order(store: PointStore) -> None:
    store.upsert([pair(number) for number in range(23)], [None] * 23)
    seen: list[str] = []
    after, is_last = "", False
    while not is_last:
        pairs, after = store.page(after=after, limit=5, filter=PairFilter())
        assert len(pairs) <= 5
        seen += ids(pairs)
        is_last = not after
    assert sorted(seen) == sorted(f"pair/{number}" for number in range(23))
    assert seen == ids(store.page(after="", limit=100, filter=PairFilter())[0])
    with pytest.raises(InvalidArgument, match="page_token: 'nonsense'"):
        store.page(after="nonsense", limit=5, filter=PairFilter())


def test_filters_select_in_every_question(store: PointStore) -> None:
    given = [pair(number, "dog" if number < 12 else "cat") for number in range(24)]
    store.upsert(given, vectors(24))
    noto, mit, photos = frozenset(("noto",)), frozenset(("MIT", "CC0-1.0")), frozenset(("photos",))
    cases = [
        (PairFilter(facets={"style": noto}), lambda p: p.facets["style"] == "noto"),
        (PairFilter(facets={"style": frozenset(("noto", "twemoji"))}), lambda p: True),
        (PairFilter(facets={"hue": noto}), lambda p: False),
        (PairFilter(licenses=mit), lambda p: p.license in mit),
        (PairFilter(sources=photos, licenses=mit), lambda p: p.source == "photos" and p.license in mit),
        (PairFilter(safe=True), lambda p: p.safe),
        (PairFilter(safe=False), lambda p: not p.safe),
        (PairFilter(excluded_pair_ids=frozenset(("pair/3", "pair/5"))), lambda p: p.pair_id not in ("pair/3", "pair/5")),
        (PairFilter(excluded_contents=frozenset((given[7].content,))), lambda p: p.pair_id != "pair/7"),
        (PairFilter(excluded_names=frozenset(("cat",))), lambda p: p.entity != "cat"),
        (PairFilter(safe=True, excluded_names=frozenset(("cat",))), lambda p: p.safe and p.entity == "dog"),
    ]  # fmt: skip
    for wanted, agrees in cases:
        expected = sorted(p.pair_id for p in given if agrees(p))
        assert store.count(wanted) == len(expected), wanted
        assert sorted(ids(store.page(after="", limit=99, filter=wanted)[0])) == expected, wanted
        assert sorted(ids(store.nearest(vectors(1)[0], limit=99, filter=wanted))) == expected, wanted


def test_the_nearest_come_first_with_their_cosine(store: PointStore) -> None:
    embeddings = vectors(40)
    store.upsert([pair(number) for number in range(40)], [*embeddings[:39], None])
    query = vectors(1, seed=7)[0]
    rows = np.stack(embeddings[:39])
    cosine = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    best = np.argsort(-cosine)[:5]
    for exact in (True, False):
        found = store.nearest(query, limit=5, filter=PairFilter(), exact=exact, with_embeddings=True)
        assert ids(found) == [f"pair/{number}" for number in best]
        assert [hit.score for hit in found] == pytest.approx(cosine[best], abs=1e-5)
        assert found[0].embedding == pytest.approx(embeddings[best[0]] / np.linalg.norm(embeddings[best[0]]), abs=1e-6)
    assert store.nearest(query, limit=5, filter=PairFilter())[0].embedding is None


def test_contents_in_use(store: PointStore) -> None:
    store.upsert([pair(number, image_sha256=f"{number // 2:064x}") for number in range(6)], [None] * 6)
    asked = [f"{number:064x}" for number in range(5)]
    assert store.contents_in_use([*asked, ""]) == set(asked[:3])
    assert store.contents_in_use([]) == set()


def test_exact_names_and_facets(store: PointStore) -> None:
    given = [pair(0, "The Guide-Dog"), pair(1, "guide dog"), pair(2, "guide dog"), pair(3, "guide dog puppy")]
    store.upsert(given, [None] * 4)
    assert ids(store.named("guide dog", {})) == ["pair/0", "pair/1", "pair/2"]
    assert ids(store.named("guide dog", {"style": "noto"})) == ["pair/0", "pair/2"]
    assert store.named("guide dog", {"style": "noto", "hue": "red"}) == []
