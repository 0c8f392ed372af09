"""Corpora: what is written is what is read, others' tars are read too, and damage is named by its file."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.corpus import CorpusError, CorpusManifest, Facet, Pair, iter_pairs, read_manifest, write_corpus

STYLE = Facet(name="style", template="{value} style", values=("noto", "twemoji"))


def pairs(num: int = 5) -> list[Pair]:
    return [
        Pair(
            key=f"noto--thing-{i}",
            caption=f"thing {i}, noto style — “ü”",
            image=f"<svg>{i}</svg>".encode(),
            image_format="svg",
            entity=f"thing {i}",
            facets={"style": "noto"},
            author="A. Uthor",
            source="https://example.org/set",
            license="CC-BY-4.0",
            held_out=i % 2 == 0,
            extra={"set_version": "1.0", "tags": ["a", 1]},
        )
        for i in range(num)
    ]


def write(folder: Path, given_pairs: Any = None, **options: Any) -> CorpusManifest:
    settings = {"name": "test", "version": "3", "facets": (STYLE,), "scene_phrases": ("on a white background",)}
    settings |= {"sources": ({"name": "set", "license": "MIT"},), "pairs_per_shard": 2} | options
    return write_corpus(folder, pairs() if given_pairs is None else given_pairs, **settings)


def others(folder: Path, members: list[tuple[str, bytes]], **manifest: Any) -> None:
    """A corpus whose shard was made by another tool: plain tarfile, webdataset's naming, and a manifest by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "shard-000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uname = len(content), 1_700_000_000, "someone"
            tar.addfile(member, io.BytesIO(content))
    shard = {"file": "shard-000.tar", "num_pairs": 1}
    shard["sha256"] = hashlib.sha256((folder / "shard-000.tar").read_bytes()).hexdigest()
    document = {"format": "reimagen-corpus/1", "name": "laion", "version": "1", "fingerprint": "f" * 64}
    (folder / "corpus.json").write_text(json.dumps(document | {"num_pairs": 1, "shards": [shard]} | manifest))


def change_manifest(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(document | changes))


# ---- what is written is read -------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c")
    assert list(iter_pairs(tmp_path / "c")) == pairs()
    assert read_manifest(tmp_path / "c") == manifest
    assert (manifest.name, manifest.version, manifest.num_pairs) == ("test", "3", 5)
    assert manifest.facets == (STYLE,)
    assert manifest.scene_phrases == ("on a white background",)
    assert [dict(s) for s in manifest.sources] == [{"name": "set", "license": "MIT"}]
    assert [(s["file"], s["num_pairs"]) for s in manifest.shards] == [
        ("00000.tar", 2),
        ("00001.tar", 2),
        ("00002.tar", 1),
    ]
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["00000.tar", "00001.tar", "00002.tar", "corpus.json"]


def test_only_a_corpus_is_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == write(tmp_path / "empty"), "what is empty, and a corpus"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "dog.png").write_text("mine")
    for name in ("file", "pictures"):
        with pytest.raises(CorpusError, match=f"{name} holds something else than a corpus"):
            write(tmp_path / name)
    assert [(tmp_path / name).read_text() for name in ("file", "pictures/dog.png")] == ["mine"] * 2


def test_shards_are_webdataset_samples(tmp_path: Path) -> None:
    """Members of a sample stand together, named key.kind, the caption as text: what other tools read."""
    write(tmp_path / "c")
    with tarfile.open(tmp_path / "c" / "00000.tar") as tar:
        names = tar.getnames()
        caption = tar.extractfile("noto--thing-0.txt")
        assert caption is not None and caption.read().decode() == pairs()[0].caption
    assert names == [f"noto--thing-{i}.{kind}" for i in (0, 1) for kind in ("svg", "txt", "json")]


@given(
    caption=st.text(max_size=80),
    image=st.binary(max_size=600),
    kind=st.sampled_from(("svg", "png", "jpg", "webp")),
    key=st.text(st.characters(exclude_characters="./\0", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20),
)
def test_any_content_survives(tmp_path_factory, caption: str, image: bytes, kind: str, key: str) -> None:
    pair = Pair(key=key, caption=caption, image=image, image_format=kind, extra={"caption": caption})
    folder = tmp_path_factory.mktemp("any") / "c"
    write(folder, [pair, replace(pair, key=key + "2")])
    assert list(iter_pairs(folder)) == [pair, replace(pair, key=key + "2")]


def test_long_keys_are_refused_by_name(tmp_path: Path) -> None:
    """A tar of the portable kind names a member in 100 bytes."""
    fits = replace(pairs()[0], key="fluent-emoji-flat--" + "x" * 76)
    write(tmp_path / "a", [fits])
    assert list(iter_pairs(tmp_path / "a")) == [fits]
    long = replace(pairs()[0], key="fluent-emoji-flat--" + "very-" * 40 + "long")
    with pytest.raises(CorpusError, match=long.key):
        write(tmp_path / "b", [long])
    assert not (tmp_path / "b").exists()


def test_an_empty_corpus_is_a_corpus(tmp_path: Path) -> None:
    assert write(tmp_path / "c", []).num_pairs == 0
    assert list(iter_pairs(tmp_path / "c")) == []


def test_the_same_pairs_give_the_same_bytes_and_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on another day."""
    a = write(tmp_path / "a")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    b = write(tmp_path / "b")
    assert a.fingerprint == b.fingerprint
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"caption": "else"}, {"image": b"<svg/>"}, {"held_out": False}, {"license": "MIT"}, {"facets": {}}, {"extra": {}}],
)
def test_the_fingerprint_names_the_content(tmp_path: Path, change: dict[str, Any]) -> None:
    first, *rest = pairs()
    other = write(tmp_path / "b", [replace(first, **change), *rest])
    assert other.fingerprint != write(tmp_path / "a").fingerprint


def test_values_that_are_alike_are_read_back_and_are_not_of_the_fingerprint(tmp_path: Path) -> None:
    like = replace(STYLE, alike={"noto": ("twemoji",)})
    plain, told = write(tmp_path / "plain", facets=(STYLE,)), write(tmp_path / "told", facets=(like,))
    assert read_manifest(tmp_path / "told").facets == (like,)
    assert told.fingerprint == plain.fingerprint


def test_the_fingerprint_names_order_and_manifest_too(tmp_path: Path) -> None:
    prints = {
        write(tmp_path / "a").fingerprint,
        write(tmp_path / "b", pairs()[::-1]).fingerprint,
        write(tmp_path / "c", version="4").fingerprint,
        write(tmp_path / "d", scene_phrases=()).fingerprint,
    }
    assert len(prints) == 4


# ---- writing that fails leaves nothing ---------------------------------------------------------------------------


def interrupted(error: BaseException) -> Iterator[Pair]:
    yield from pairs()[:3]
    raise error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "c", interrupted(error))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_corpus_that_was_there(tmp_path: Path) -> None:
    write(tmp_path / "c")
    with pytest.raises(OSError):
        write(tmp_path / "c", interrupted(OSError("stop")), version="4")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert list(iter_pairs(tmp_path / "c")) == pairs()


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "noto--thing-1"])
def test_bad_keys_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CorpusError, match=r"key .*dot or a slash") as caught:
        write(tmp_path / "c", [*pairs(), replace(pairs()[0], key=key)])
    assert repr(key) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_image_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"noto--thing-0.*'bmp'"):
        write(tmp_path / "c", [replace(pairs()[0], image_format="bmp")])


# ---- damage is named ---------------------------------------------------------------------------------------------


def test_a_cut_shard_is_named_after_the_good_ones_are_read(tmp_path: Path) -> None:
    write(tmp_path / "c")
    shard = tmp_path / "c" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    read = []
    with pytest.raises(CorpusError, match=r"00001\.tar is cut short or altered"):
        read.extend(iter_pairs(tmp_path / "c"))
    assert read == pairs()[:2], "no pair of the damaged shard is given"


def test_an_altered_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path / "c")
    shard = tmp_path / "c" / "00000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorpusError, match=r"00000\.tar"):
        list(iter_pairs(tmp_path / "c"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c")
    (tmp_path / "c" / "00002.tar").unlink()
    with pytest.raises(CorpusError, match=r"00002\.tar does not exist"):
        list(iter_pairs(tmp_path / "c"))


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nowhere"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": "reimagen-corpus/2"}', '{"format": "reimagen-corpus/1"}', "\udcff"],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "corpus.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorpusError, match=r"corpus\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": ["00000.tar"]},
        {"shards": [{"file": "00000.tar", "num_pairs": 1}]},
        {"shards": [{"sha256": "0" * 64}]},
        {"num_pairs": "many"},
        {"facets": [{"name": "style"}]},
        {"facets": 3},
        {"facets": [{"name": "style", "template": "{value} style", "values": "noto"}]},
        {"facets": [{"name": "style", "template": "{value} style", "values": ["a", "b"], "alike": {"a": "b"}}]},
    ],
)
def test_a_mistyped_manifest_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    write(tmp_path / "c")
    change_manifest(tmp_path / "c", **changes)
    with pytest.raises(CorpusError, match=r"corpus\.json|00000\.tar"):
        list(iter_pairs(tmp_path / "c"))


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    """A corpus is a folder from somewhere else: it cannot name files beyond itself."""
    write(tmp_path / "c")
    (tmp_path / "c" / "00000.tar").replace(tmp_path / "outside.tar")
    shards = json.loads((tmp_path / "c" / "corpus.json").read_text())["shards"]
    shards[0]["file"] = "../outside.tar"
    change_manifest(tmp_path / "c", shards=shards)
    with pytest.raises(CorpusError, match="outside"):
        list(iter_pairs(tmp_path / "c"))


def test_a_shard_that_was_cut_before_it_was_counted_is_named(tmp_path: Path) -> None:
    write(tmp_path / "c")
    shard = tmp_path / "c" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:1800])
    shards = json.loads((tmp_path / "c" / "corpus.json").read_text())["shards"]
    shards[0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    change_manifest(tmp_path / "c", shards=shards)
    with pytest.raises(CorpusError, match=r"00000\.tar"):
        list(iter_pairs(tmp_path / "c"))


# ---- tars of other tools -----------------------------------------------------------------------------------------


def test_img2dataset_shards_are_read(tmp_path: Path) -> None:
    """Members as img2dataset writes them: image, caption, its own json with other names."""
    own = {"caption": "a dog", "url": "https://example.org/1", "status": "success", "width": 3, "error_message": None}
    members = [
        ("000000000.jpg", b"jpg0"),
        ("000000000.json", json.dumps(own).encode()),
        ("000000000.txt", "a dog — ü".encode()),
        ("000000001.JPEG", b"jpg1"),
        ("000000001.txt", b"a cat"),
        ("000000002.webp", b"webp2"),
        ("000000002.json", json.dumps(own | {"caption": "from the json"}).encode()),
        ("000000003.png", b"png3"),
        ("000000003.seg.png", b"a mask"),
        ("000000003.txt", b""),
    ]
    others(tmp_path, members)
    found = list(iter_pairs(tmp_path))
    assert [(p.key, p.caption, p.image, p.image_format) for p in found] == [
        ("000000000", "a dog — ü", b"jpg0", "jpg"),
        ("000000001", "a cat", b"jpg1", "jpg"),
        ("000000002", "from the json", b"webp2", "webp"),
        ("000000003", "", b"png3", "png"),
    ]
    assert all((p.entity, dict(p.facets), p.held_out, p.license) == ("", {}, False, "") for p in found)


def test_folders_and_links_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    others(tmp_path, [("a.png", b"a"), ("a.txt", b"a")])
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
            member = tarfile.TarInfo("b.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_manifest(tmp_path, shards=[{"file": path.name, "sha256": digest, "num_pairs": 1}])
    assert [p.key for p in iter_pairs(tmp_path)] == ["a"]


def test_the_same_name_in_two_folders_of_a_tar_is_two_pairs(tmp_path: Path) -> None:
    """webdataset: the key is the path up to the first dot of the file's name."""
    others(
        tmp_path,
        [
            ("dogs/0001.png", b"dog"),
            ("dogs/0001.txt", b"a dog"),
            ("cats/0001.png", b"cat"),
            ("cats/0001.txt", b"a cat"),
        ],
    )
    found = list(iter_pairs(tmp_path))
    assert [(p.caption, p.image) for p in found] == [("a dog", b"dog"), ("a cat", b"cat")]
    assert len({p.key for p in found}) == 2


@pytest.mark.parametrize(
    "members",
    [
        [("x1.txt", b"a caption alone")],
        [("x1.png", b"a picture alone")],
        [("x1.png", b"p"), ("x1.txt", b"\xff\xfe\xff")],
        [("x1.png", b"p"), ("x1.json", b"{")],
        [("x1.png", b"p"), ("x1.json", b'{"caption": null}')],
        [("x1.png", b"p"), ("x1.txt", b"c"), ("x1.json", b"[1]")],
        [("x1.png", b"p"), ("x1.txt", b"c"), ("x1.json", b"\xff")],
    ],
)
def test_malformed_pairs_are_named_with_their_shard(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    others(tmp_path, members)
    with pytest.raises(CorpusError, match=r"x1.*shard-000\.tar"):
        list(iter_pairs(tmp_path))


def test_a_shard_that_is_no_tar_is_named(tmp_path: Path) -> None:
    others(tmp_path, [("a.png", b"a"), ("a.txt", b"a")])
    (tmp_path / "shard-000.tar").write_bytes(b"PK\x03\x04" * 300)
    digest = hashlib.sha256(b"PK\x03\x04" * 300).hexdigest()
    change_manifest(tmp_path, shards=[{"file": "shard-000.tar", "sha256": digest, "num_pairs": 1}])
    with pytest.raises(CorpusError, match=r"shard-000\.tar"):
        list(iter_pairs(tmp_path))
