"""`python -m retrieval_svc import` with real stores: into a library, and into a running service over a socket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from reimagen.retrieval.v1 import knowledge_base_pb2_grpc

from retrieval_svc.__main__ import main
from retrieval_svc.imports.formats import open_source
from retrieval_svc.imports.records import Options
from retrieval_svc.imports.service_sink import ServiceLost, ServiceSink
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair, Upserted
from retrieval_svc.retrieval import Query
from tests.retrieval_svc.imports.small_sources import (
    NO_OPTIONS,
    run,
    sample,
    write_lines,
    write_pictures,
    write_shard,
)
from tests.retrieval_svc.serving import hosted

KEY = "an-admin-key-of-the-tests"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures with captions, one of which is none, and one that is missing."""
    folder = write_pictures(tmp_path / "pets", [f"{n}.png" for n in range(5)])
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    names = ["red cat", "blue dog", "green parrot", "broken bird", "white mouse", "gone fish"]
    rows = [
        {"file_name": f"{n}.png", "text": name, "artist": f"artist {n}", "url": f"https://x/{n}"}
        for n, name in enumerate(names)
    ]
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def test_into_a_library_twice(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    flags = [
        "import",
        str(folder),
        "--knowledge-base",
        "pets",
        "--data",
        str(data),
        "--default-license",
        "CC0",
        "--safe",
    ]
    assert main(flags) == 0
    said = capsys.readouterr()
    assert "6 records: 4 created, 0 replaced, 0 unchanged, 2 rejected" in said.out
    assert "import: 6/6 records" in said.err or "import: 6 records" in said.err
    report = data / "pets" / "imports" / "pets.jsonl"
    lines = {line["key"]: line["reason"] for line in map(json.loads, report.read_text().splitlines())}
    assert lines == {"3.png": "refused: image", "5.png": "picture missing"}
    with closing(Library.open(data)) as library:
        (found,) = library.get("pets").retrieve(Query(prompt="red cat", k=1)).neighbors
        assert (found.pair.pair_id, found.pair.author, found.pair.license) == ("pets--0.png", "artist 0", "CC0")
        assert found.pair.source == "https://x/0" and found.pair.safe
        assert found.image == (folder / "0.png").read_bytes()
        generation = library.get("pets").generation
    assert main(flags) == 0
    assert "0 created, 0 replaced, 4 unchanged, 2 rejected" in capsys.readouterr().out
    write_lines(folder / "metadata.jsonl", [{"file_name": "0.png", "text": "red cat", "artist": "another"}])
    assert main(flags) == 0
    assert "0 created, 1 replaced" in capsys.readouterr().out
    with closing(Library.open(data)) as library:
        assert library.get("pets").get("pets--0.png").pair.author == "another"
        assert library.get("pets").generation > generation


def test_what_is_wrong_as_a_whole_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    usual = ["--knowledge-base", "pets", "--data", str(data)]
    with closing(Library.open(data)):
        assert main(["import", str(folder), *usual]) == 2
    assert main(["import", str(tmp_path / "gone"), *usual]) == 2
    assert main(["import", str(folder), "--knowledge-base", "No Name", "--data", str(data)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 3
    for line, named in zip(errors, ("in use by process", "gone does not exist", "'No Name'"), strict=True):
        assert named in line


def test_into_a_service_with_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: dict[str, bytes] = {}
    for number in range(70):
        members |= sample(f"k{number:03}", number, license="CC0", url=f"https://x/{number}")
    shard = write_shard(tmp_path / "shard.tar", members)
    keys, wrong, empty = tmp_path / "keys", tmp_path / "wrong", tmp_path / "empty"
    empty.write_text("# nothing\n")
    keys.write_text(f"# the tests'\n{KEY}\n")
    wrong.write_text("another-key-of-the-tests\n")
    flags = ["import", str(shard), "--knowledge-base", "pets", "--report", str(tmp_path / "r.jsonl")]
    with hosted(tmp_path / "data", admin_keys_file=keys) as client:
        place = ["--address", client.address]
        assert main([*flags, *place, "--api-key-file", str(wrong)]) == 2
        assert "UNAUTHENTICATED" in capsys.readouterr().err
        assert main([*flags, *place, "--api-key-file", str(empty)]) == 2
        assert f"--api-key-file: {empty} does not begin with a key" in capsys.readouterr().err
        assert main([*flags, *place, "--api-key-file", str(keys)]) == 0
        assert "70 records: 70 created" in capsys.readouterr().out
        assert main([*flags, *place, "--api-key-file", str(keys)]) == 0
        assert "70 unchanged, 0 rejected" in capsys.readouterr().out


def test_a_pair_that_fits_no_message_is_rejected_and_the_others_taken(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pets", ["0.png", "1.png", "2.png"])
    with (folder / "1.png").open("ab") as stream:
        stream.write(bytes(300_000))  # after the end of the picture, where nobody looks
    write_lines(folder / "metadata.jsonl", [{"file_name": f"{n}.png", "text": f"pet {n}"} for n in range(3)])
    source = open_source(folder, "auto", NO_OPTIONS)
    with hosted(tmp_path / "data", max_request_bytes=200_000) as client:
        summary = run(source, ServiceSink(client.channel, "pets", source), tmp_path / "r.jsonl")
    assert (summary.created, dict(summary.rejected)) == (2, {"refused: image": 1})


class LosingSink(ServiceSink):
    """From the second call on its service cannot be reached."""

    max_pairs = 2
    num_calls = 0

    def upsert(self, pairs: Sequence[NewPair]) -> list[Upserted]:
        self.num_calls += 1
        if self.num_calls == 1:
            return super().upsert(pairs)
        with grpc.insecure_channel("unix:/nowhere/r.sock") as channel:
            self._stub = knowledge_base_pb2_grpc.KnowledgeBaseServiceStub(channel)
            return super().upsert(pairs)


def test_a_service_that_is_lost_stops_the_import_and_it_goes_on_later(folder: Path, tmp_path: Path) -> None:
    source, report, data = open_source(folder, "auto", Options()), tmp_path / "r.jsonl", tmp_path / "data"
    with hosted(data) as client:
        sink = LosingSink(client.channel, "pets", source, patience_s=0.3)
        with pytest.raises(ServiceLost, match="storing pairs of knowledge base 'pets': UNAVAILABLE"):
            run(source, sink, report)
    assert not report.exists()
    with hosted(data) as client:
        summary = run(source, ServiceSink(client.channel, "pets", source), report)
    assert summary.created == 4 and summary.num_records == 6
    assert {json.loads(line)["key"] for line in report.read_text().splitlines()} == {"3.png", "5.png"}
