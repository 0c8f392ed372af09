"""What each format is read into, and what is rejected with which reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.corpus import CorpusError, Facet, Pair, write_corpus
from retrieval_svc.imports.formats import detect, open_source
from retrieval_svc.imports.records import Options, SourceError, Unreadable, pair_id_of
from tests.retrieval_svc.imports.small_sources import (
    NO_OPTIONS,
    picture,
    read,
    sample,
    write_lines,
    write_parquet,
    write_pictures,
    write_shard,
)


def reasons(rejected: dict) -> dict[str, str]:
    return {key: item.reason for key, item in rejected.items()}


def test_an_imagefolder(tmp_path: Path) -> None:
    folder = write_pictures(
        tmp_path / "cats", ["a.png", "sub/b.jpg", "c.png", "d.png", "e.png", "side.png", "bare.png"]
    )
    outside = tmp_path / "secret.png"
    outside.write_bytes(picture(9))
    (folder / "link.png").symlink_to(outside)
    write_lines(
        folder / "metadata.jsonl",
        [
            {
                "file_name": "a.png",
                "text": " a  cat\non a mat ",
                "artist": "Ann",
                "licence": "CC0",
                "url": "https://x/a",
            },
            {
                "file_name": "sub/b.jpg",
                "Caption": "a dog",
                "style": "ink",
                "score": 0.5,
                "tags": ["x", "y"],
                "none": None,
            },
            "{broken",
            {"file_name": "c.png"},
            {"text": "no name"},
            {"file_name": "../secret.png", "text": "outside"},
            {"file_name": "link.png", "text": "outside by a link"},
            {"file_name": "gone.png", "text": "gone"},
            [1],
            {"file_name": "e.png", "text": "unsafe", "NSFW": "UNSURE"},
        ],
    )
    (folder / "side.txt").write_text("told beside it")
    (folder / "side.json").write_text('{"license": "CC-BY-4.0", "punsafe": 0.01}')
    source = open_source(folder, "auto", Options(facet_columns=("style",)))
    assert (detect(folder), source.name) == ("imagefolder", "cats")
    records, rejected = read(source)
    a, b = records["a.png"], records["sub/b.jpg"]
    assert (a.caption, a.author, a.license, a.source) == ("a cat on a mat", "Ann", "CC0", "https://x/a")
    assert a.safe is None and a.load is not None and a.load() == (folder / "a.png").read_bytes()
    assert b.facets == {"style": "ink"} and b.attributes == {"score": "0.5", "tags": '["x", "y"]'}
    assert records["e.png"].safe is False
    side = records["side.png"]
    assert (side.caption, side.license, side.safe) == ("told beside it", "CC-BY-4.0", True)
    assert reasons(rejected) == {
        "metadata.jsonl:3": "metadata unreadable",
        "c.png": "no caption",
        "metadata.jsonl:5": "no file name",
        "../secret.png": "picture outside the folder",
        "link.png": "picture outside the folder",
        "gone.png": "picture missing",
        "metadata.jsonl:9": "metadata unreadable",
        "d.png": "no caption",
        "bare.png": "no caption",
    }


def test_an_imagefolder_with_csv_in_a_split(tmp_path: Path) -> None:
    write_pictures(tmp_path, ["train/1.png", "train/2.png"])
    (tmp_path / "train" / "metadata.csv").write_text('file_name,text,author\n1.png,"one, two",Ann\n2.png,,Bob\n')
    records, rejected = read(open_source(tmp_path, "imagefolder", NO_OPTIONS))
    assert records["train/1.png"].caption == "one, two" and records["train/1.png"].author == "Ann"
    assert reasons(rejected) == {"train/2.png": "no caption"}


def test_a_folder_without_pictures_or_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no pictures"):
        open_source(tmp_path, "auto", NO_OPTIONS)
    with pytest.raises(SourceError, match="gone does not exist"):
        open_source(tmp_path / "gone", "auto", NO_OPTIONS)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"x\.bin cannot be told"):
        open_source(tmp_path / "x.bin", "auto", NO_OPTIONS)


def test_webdataset_shards(tmp_path: Path) -> None:
    described = {"url": "https://x/1", "license": "CC0", "status": "success", "width": 8}
    write_shard(tmp_path / "00000.tar", sample("000000000", 0, **described) | sample("000000001", 1))
    members = {
        "deep/x.svg": b"<svg/>",
        "deep/x.json": b'{"caption": "of the json"}',
        "only.txt": b"no picture",
        "nocap.png": picture(3),
        "bad.png": picture(4),
        "bad.txt": b"bad",
        "bad.json": b"[",
    }
    write_shard(tmp_path / "00001.tar", members)
    write_parquet(tmp_path / "00000.parquet", [{"url": "x"}])
    source = open_source(tmp_path, "auto", NO_OPTIONS)
    records, rejected = read(source)
    first = records["000000000"]
    assert (first.caption, first.source, first.license) == ("caption of 000000000", "https://x/1", "CC0")
    assert first.attributes == {"status": "success", "width": "8"}
    assert first.load is not None and first.load() == picture(0, "JPEG")
    assert list(records) == ["000000000", "000000001", "deep/x"] and records["deep/x"].caption == "of the json"
    assert reasons(rejected) == {"only": "picture missing", "nocap": "no caption", "bad": "metadata unreadable"}


@pytest.mark.parametrize("where", ["data", "header", "member", "end mark"])
def test_a_cut_shard_gives_what_is_readable(tmp_path: Path, where: str) -> None:
    members: dict[str, bytes] = {}
    for number in range(4):
        members |= sample(f"k{number}", number)
    path = write_shard(tmp_path / "s.tar", members)
    whole = path.read_bytes()
    third = whole.index(b"k2.jpg")
    cut = {
        "data": third + 700,  # in the middle of k2's picture
        "header": third + 100,
        "member": third + 3 * 512,  # after it: k2 has no caption
        "end mark": whole.index(b"k3.json") + 1024,
    }[where]
    path.write_bytes(whole[:cut])
    records, rejected = read(open_source(path, "auto", NO_OPTIONS))
    kept = ["k0", "k1"] if where != "end mark" else ["k0", "k1", "k2", "k3"]
    assert list(records) == kept
    assert rejected["s.tar"].reason == "shard cut short or damaged"
    assert ("k2" in rejected) == (where == "member")
    for record in records.values():
        assert record.load is not None and record.load()


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", sample("k0", 0) | sample("k1", 1) | sample("k2", 2))
    content = bytearray(path.read_bytes())
    at = content.index(b"k1.jpg")
    content[at : at + 512] = os.urandom(512)
    path.write_bytes(content)
    records, rejected = read(open_source(path, "auto", NO_OPTIONS))
    assert list(records) == ["k0"] and list(rejected) == ["s.tar"]


def test_no_tar_at_all_is_rejected_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    write_shard(tmp_path / "c.tar", sample("k", 0))
    records, rejected = read(open_source(tmp_path, "auto", NO_OPTIONS))
    assert list(records) == ["k"] and sorted(rejected) == ["a.tar", "b.tar"]


def laion_rows() -> list[dict]:
    rows = [
        {
            "SAMPLE_ID": 11,
            "URL": "https://x/11.jpg",
            "TEXT": "eleven",
            "NSFW": "UNLIKELY",
            "LICENSE": "CC0",
            "HEIGHT": 8,
        },
        {"SAMPLE_ID": 12, "URL": "https://x/12.jpg", "TEXT": "twelve", "NSFW": "NSFW"},
        {"SAMPLE_ID": 13, "URL": "https://x/13.jpg", "TEXT": "thirteen", "punsafe": 0.4, "NSFW": "UNLIKELY"},
        {"SAMPLE_ID": 14, "URL": "https://x/14.jpg", "TEXT": ""},
        {"SAMPLE_ID": 15, "URL": None, "TEXT": "fifteen"},
        {"SAMPLE_ID": 16, "URL": "https://x/16.jpg", "TEXT": "sixteen"},
    ]
    names = {name for row in rows for name in row}
    return [{name: row.get(name) for name in sorted(names)} for row in rows]


def test_laion_parquet_with_a_folder_of_pictures(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "part.parquet", laion_rows())
    images = write_pictures(tmp_path / "images", ["11.jpg", "12.png", "13.jpg", "14.jpg"])
    records, rejected = read(open_source(path, "auto", Options(images=images)))
    assert list(records) == ["11", "12", "13"]
    first = records["11"]
    assert (first.caption, first.source, first.license, first.safe) == ("eleven", "https://x/11.jpg", "CC0", True)
    assert first.attributes["HEIGHT"] == "8" and not first.image_uri
    assert first.load is not None and first.load() == (images / "11.jpg").read_bytes()
    assert records["12"].safe is False and records["13"].safe is False
    assert reasons(rejected) == {"14": "no caption", "15": "picture missing", "16": "picture missing"}


def test_laion_parquet_keeps_addresses_when_asked(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "part.parquet", laion_rows())
    records, rejected = read(open_source(path, "auto", Options(keep_uris=True)))
    assert list(records) == ["11", "12", "13", "16"]
    assert records["16"].image_uri == "https://x/16.jpg" and records["16"].load is None
    assert reasons(rejected) == {"14": "no caption", "15": "picture missing"}


def test_parquet_with_a_path_column_and_no_keys(tmp_path: Path) -> None:
    write_pictures(tmp_path / "here", ["p/a.jpg"])
    rows = [
        {"url": "https://x/a", "caption": "a", "local_path": "p/a.jpg"},
        {"url": "https://x/b", "caption": "b", "local_path": "../../etc/passwd"},
    ]
    write_parquet(tmp_path / "here" / "one.parquet", rows)
    records, rejected = read(open_source(tmp_path / "here", "auto", NO_OPTIONS))
    (key,) = records
    write_parquet(tmp_path / "here" / "one.parquet", rows[::-1])
    assert list(read(open_source(tmp_path / "here", "auto", NO_OPTIONS))[0]) == [key], "order of rows does not matter"
    assert list(reasons(rejected).values()) == ["picture outside the folder"]


def test_a_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", laion_rows())
    content = bytearray(path.read_bytes())
    content[40:80] = bytes(40)
    path.write_bytes(content)
    records, rejected = read(open_source(path, "auto", Options(keep_uris=True)))
    assert len(records) < 4 and "file damaged" in reasons(rejected).values()
    path.write_bytes(b"PAR1")
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read"):
        open_source(path, "auto", NO_OPTIONS)


def coco() -> dict:
    return {
        "info": {},
        "licenses": [{"id": 4, "name": "Attribution License", "url": "http://cc/by"}],
        "images": [
            {"id": 1, "file_name": "0001.jpg", "license": 4, "flickr_url": "http://flickr/1", "width": 8},
            {"id": 2, "file_name": "0002.jpg", "license": 9},
            {"id": 3, "file_name": "gone.jpg"},
            {"id": 4, "file_name": "0004.jpg"},
            "broken",
        ],
        "annotations": [
            {"id": 30, "image_id": 1, "caption": "A second."},
            {"id": 7, "image_id": 1, "caption": "A first.\n"},
            {"id": 8, "image_id": 2, "caption": "Two."},
            {"id": 9, "image_id": 3, "caption": "Three."},
            {"id": 10, "image_id": 99, "caption": "Of nothing."},
        ],
    }


@pytest.mark.parametrize("captions", ["first", "all"])
def test_coco(tmp_path: Path, captions: str) -> None:
    path = write_lines(tmp_path / "annotations" / "captions_val2017.json", [json.dumps(coco())])
    write_pictures(tmp_path / "val2017", ["0001.jpg", "0002.jpg", "0004.jpg"])
    records, rejected = read(open_source(path, "auto", Options(captions=captions)))
    assert {k: r.caption for k, r in records.items()} == {"0001": "A first.", "0002": "Two."} | (
        {"0001-2": "A second."} if captions == "all" else {}
    )
    assert (records["0001"].license, records["0001"].source) == ("Attribution License", "http://flickr/1")
    assert records["0002"].license == "" and records["0001"].attributes == {"width": "8"}
    assert reasons(rejected) == {
        "gone.jpg": "picture missing",
        "0004.jpg": "no caption",
        "images[4]": "metadata unreadable",
        "annotations[4]": "caption of no picture",
    }


def test_coco_without_its_pictures(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "captions_val2017.json", [json.dumps(coco())])
    with pytest.raises(SourceError, match="name the pictures' with --images"):
        open_source(path, "auto", NO_OPTIONS)


def test_webqa_with_the_papers_filter(tmp_path: Path) -> None:
    facts = [
        {
            "image_id": 30000001,
            "title": "Tower",
            "caption": '"A tower at dusk"',
            "url": "https://wiki/1",
            "imgUrl": "u",
        },
        {"image_id": 30000002, "title": "Old", "caption": "A tower in 1998"},
        {"image_id": 30000003, "title": "Long", "caption": " ".join(["word"] * 16)},
        {"image_id": 30000004, "title": "File", "caption": "File:Tower.jpg"},
        {"image_id": 30000005, "title": "Gone tower"},
        {"caption": "no id"},
    ]
    webqa = {
        "q1": {"Q": "?", "A": ["!"], "img_posFacts": facts[:3], "img_negFacts": facts[3:], "txt_posFacts": []},
        "q2": {"Q": "?", "img_posFacts": facts[:1], "img_negFacts": []},
    }
    path = write_lines(tmp_path / "WebQA_train_val.json", [json.dumps(webqa)])
    images = write_pictures(tmp_path / "images", ["30000001.jpg", "30000002.jpg", "30000003.jpg", "30000004.jpg"])
    source = open_source(path, "auto", Options(images=images))
    assert detect(path) == "wikiimages"
    records, rejected = read(source)
    assert list(records) == ["30000001"] and source.num_records == 6
    assert (records["30000001"].caption, records["30000001"].source) == ("A tower at dusk", "https://wiki/1")
    assert reasons(rejected) == {
        "30000002": "caption has a date",
        "30000003": "caption over 15 tokens",
        "30000004": "caption has a wiki id",
        "30000005": "picture missing",
        "[5]": "metadata unreadable",
    }
    assert rejected["30000002"].detail == "A tower in 1998"
    write_lines(path, [json.dumps(facts)])
    assert read(open_source(path, "auto", NO_OPTIONS))[1].keys() == rejected.keys()


def corpus_pairs() -> list[Pair]:
    return [
        Pair(
            key=f"noto--dog-{number}",
            caption=f"dog {number}, noto style",
            image=picture(number),
            image_format="png",
            entity=f"dog {number}",
            facets={"style": "noto"},
            author="Ann",
            source="https://x",
            license="CC0",
            held_out=number == 1,
            extra={"icon": "dog"},
        )
        for number in range(4)
    ]


def test_a_corpus_folder(tmp_path: Path) -> None:
    style = Facet(name="style", template="{value} style", values=("noto",))
    folder = tmp_path / "corpus"
    write_corpus(
        folder, corpus_pairs(), name="c", version="1", facets=(style,), scene_phrases=("on a table",), pairs_per_shard=2
    )
    source = open_source(folder, "auto", NO_OPTIONS)
    assert (source.facets, source.scene_phrases, source.num_records) == ((style,), ("on a table",), 4)
    records, rejected = read(source)
    first, second = records["noto--dog-0"], records["noto--dog-1"]
    assert (first.pair_id, first.entity, first.facets) == ("noto--dog-0", "dog 0", {"style": "noto"})
    assert (first.author, first.source, first.license) == ("Ann", "https://x", "CC0")
    assert second.attributes == {"icon": "dog", "held_out": "true"} and not rejected
    (folder / "00001.tar").write_bytes((folder / "00001.tar").read_bytes()[:2000])
    records, rejected = read(source)
    assert list(records) == ["noto--dog-0", "noto--dog-1"] and rejected["00001.tar"]
    (folder / "00001.tar").unlink()
    assert reasons(read(source)[1]) == {"00001.tar": "shard missing"}
    (folder / "corpus.json").unlink()
    with pytest.raises(CorpusError, match=r"corpus\.json does not exist"):
        open_source(folder, "corpus", NO_OPTIONS)


def test_pair_ids_are_stable_short_and_never_shared() -> None:
    assert pair_id_of("cats", "000123") == "cats--000123"
    odd = {pair_id_of("cats", key) for key in ("a/b.png", "a b.png", "a-b.png", "ä", "\ud800", "x" * 300, "x" * 301)}
    assert len(odd) == 7 and all(len(i.encode()) <= 200 and i.isprintable() for i in odd)
    assert pair_id_of("cats", "a/b.png") == "cats--a-b.png-88f7ec7982"


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "f", ["a.png", "empty.png"])
    with (folder / "a.png").open("r+b") as stream:
        stream.truncate(21_000_000)
    (folder / "empty.png").write_bytes(b"")
    write_lines(folder / "metadata.jsonl", [{"file_name": n, "text": "x"} for n in ("a.png", "empty.png")])
    records, _ = read(open_source(folder, "auto", NO_OPTIONS))
    for key, reason in (("a.png", "picture too large"), ("empty.png", "picture empty")):
        load = records[key].load
        assert load is not None
        with pytest.raises(Unreadable, match=reason):
            load()
