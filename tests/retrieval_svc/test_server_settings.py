"""The settings of a Qdrant server: each is used, wrong ones are told, keys and certificates are checked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from qdrant_client import grpc as wire
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb

from common.service.config import ConfigError
from common.service.errors import NotFound
from retrieval_svc.__main__ import main
from retrieval_svc.qdrant_connection import QdrantSettings, connect
from retrieval_svc.settings import RetrievalSettings, StoreSettings
from retrieval_svc.vectors_server import ServerPairStore
from tests.retrieval_svc.qdrant_stand_in import StandIn, serving
from tests.retrieval_svc.serving import ROOT, TIMEOUT_S, caught_up, fill, hosted

IMAGEFOLDER = '{"file_name": "a.png", "text": "a red kite"}\n'


def run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """One command of the service to its end."""
    return subprocess.run(
        [sys.executable, "-m", "retrieval_svc", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_collection_is_made_as_the_settings_say_stand_in(tmp_path: Path) -> None:
    stand_in = StandIn()
    with serving(stand_in) as url:
        settings: dict[str, Any] = {
            "qdrant_url": url,
            "qdrant_prefix": "ours-",
            "qdrant_replication_factor": 3,
            "qdrant_write_consistency_factor": 2,
            "qdrant_shards": 6,
            "qdrant_quantization": "int8",
            "qdrant_on_disk_originals": False,
            "qdrant_m": 6,
            "qdrant_ef_construct": 64,
        }
        with hosted(tmp_path, **settings) as client:
            fill(client)
    made = stand_in.created["ours-small"]
    assert (made.replication_factor, made.write_consistency_factor, made.shard_number) == (3, 2, 6)
    assert (made.hnsw_config.m, made.hnsw_config.ef_construct) == (6, 64)
    assert made.quantization_config.WhichOneof("quantization") == "scalar"
    assert made.vectors_config.params_map.map["clip"].datatype == wire.Datatype.Float32


def test_every_setting_of_a_server_is_handed_on(tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "qdrant_url": "https://qdrant",
        "qdrant_api_key_file": tmp_path,
        "qdrant_ca_file": tmp_path,
        "qdrant_timeout_s": 3,
        "qdrant_build_timeout_s": 4.0,
        "qdrant_replication_factor": 5,
        "qdrant_write_consistency_factor": 4,
        "qdrant_shards": 7,
        "qdrant_quantization": "none",
        "qdrant_on_disk_originals": False,
        "qdrant_oversampling": 8.0,
        "qdrant_m": 9,
        "qdrant_ef_construct": 10,
        "qdrant_hnsw_ef": 11,
    }
    told, plain = StoreSettings(**other).qdrant(), QdrantSettings(url="http://x")
    assert told is not None
    same = [field.name for field in fields(QdrantSettings) if getattr(told, field.name) == getattr(plain, field.name)]
    assert not same, "settings that do nothing"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"qdrant_shards": 2}, "--qdrant-shards: is of a Qdrant server; give --qdrant-url"),
        ({"shared_pictures": Path("x")}, "--shared-pictures: is of a Qdrant server"),
        ({"qdrant_url": "http://x", "qdrant_timeout_s": 30}, "--qdrant-timeout-s: 30 is not below the 30 s"),
        ({"qdrant_url": "http://x", "qdrant_timeout_s": 0}, "--qdrant-timeout-s: 0 is not at least 1"),
        ({"qdrant_url": "http://x", "qdrant_poll_s": float("nan")}, "--qdrant-poll-s: nan is not at least"),
        ({"qdrant_url": "http://x", "qdrant_write_consistency_factor": 3}, "--qdrant-write-consistency-factor: 3"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RetrievalSettings(data=Path("x"), **settings).check()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--qdrant-url", "qdrant:6334"), "'qdrant:6334' is not http://host[:port]"),
        (("--qdrant-url", "http://127.0.0.1:1"), "Qdrant cannot be reached"),
        (("--qdrant-url", "https://qdrant", "--qdrant-api-key-file", "/nowhere"), "/nowhere: No such file"),
        (("--qdrant-url", "http://127.0.0.1:1", "--qdrant-ca-file", "/dev/null"), "has no TLS"),
        (("--bm25", "lucene"), "--bm25: 'lucene' is not one of tantivy, qdrant"),
    ],
)
def test_a_server_that_cannot_be_used_ends_it_with_one_line(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    done = run("serve", "--data", tmp_path / "data", "--address", f"unix:{tmp_path}/s", *flags)
    assert done.returncode == 2 and named in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_library_with_pairs_of_its_own_is_not_overwritten_stand_in(tmp_path: Path) -> None:
    with hosted(tmp_path / "data") as client:
        fill(client)
    with serving(StandIn()) as url:
        done = run("serve", "--data", tmp_path / "data", "--address", f"unix:{tmp_path}/s", "--qdrant-url", url)
    assert done.returncode == 2 and "holds 'small' with its pairs" in done.stderr
    with hosted(tmp_path / "data") as client:
        assert client.retrieve("cat").neighbors


def test_tls_and_a_key_that_is_renewed_stand_in(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "key").write_text("first-key\n")
    stand_in = StandIn(keys=("first-key",))
    with serving(stand_in, credentials) as url:
        settings = {"qdrant_url": url, "qdrant_ca_file": tmp_path / "ca.pem", "qdrant_replication_factor": 1}
        with hosted(tmp_path / "data", qdrant_api_key_file=tmp_path / "key", **settings) as client:
            fill(client)
            stand_in.keys = ("second-key",)
            (tmp_path / "key").write_text("second-key\n")
            caught_up(client)
            assert client.retrieve("cat").neighbors and not client.retrieve("cat").failed_legs
        flags = ("--qdrant-url", url, "--qdrant-api-key-file", tmp_path / "key")
        (tmp_path / "key").write_text("wrong\n")
        serve = ("serve", "--data", tmp_path / "data", "--address", f"unix:{tmp_path}/s", *flags)
        assert "refuses the API key" in run(*serve, "--qdrant-ca-file", tmp_path / "ca.pem").stderr
        assert "cannot be reached" in run(*serve).stderr, "an authority that nobody trusts"


def test_an_import_into_a_server_stand_in(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "metadata.jsonl").write_text(IMAGEFOLDER)
    (tmp_path / "pictures" / "a.png").write_bytes((ROOT / "evaluation" / "results" / "demo.png").read_bytes())
    with serving(StandIn()) as url:
        flags = ("--data", tmp_path / "data", "--qdrant-url", url, "--qdrant-replication-factor", "1")
        done = run("import", tmp_path / "pictures", "--knowledge-base", "birds", *flags)
        assert done.returncode == 0, done.stderr
        with hosted(tmp_path / "data", qdrant_url=url) as client:
            assert client.retrieve("red kite").neighbors[0].image
    lost = run("import", tmp_path / "pictures", "--knowledge-base", "birds", "--address", "x", "--qdrant-url", url)
    assert lost.returncode == 2 and "are of a library" in lost.stderr


def test_a_deleted_collection_is_not_found_stand_in() -> None:
    with serving(StandIn()) as url:
        settings = QdrantSettings(url=url)
        client = connect(settings)
        store = ServerPairStore.create(client, "pictures", embedding_size=4, settings=settings)
        client.delete_collection("pictures")
        with pytest.raises(NotFound, match="no such collection"):
            store.count()
        client.close()


def test_bm25_by_sparse_vectors_in_process(tmp_path: Path) -> None:
    """Without a server as well; and Tantivy's index catches up when it is asked again."""
    with hosted(tmp_path, bm25="qdrant") as client:
        fill(client)
        by_sparse = [n.pair_id for n in client.retrieve("red apple, noto style", k=4).neighbors]
        assert by_sparse[0] == "noto--red-apple"
        gone = kb_pb.DeletePairsRequest(knowledge_base="small", pair_ids=["twemoji--cat"])
        client.bases.DeletePairs(gone, timeout=TIMEOUT_S)
        assert not (tmp_path / "small" / "bm25").exists()
    with hosted(tmp_path) as client:
        assert [n.pair_id for n in client.retrieve("red apple, noto style", k=4).neighbors] == by_sparse
        assert [n.pair_id for n in client.retrieve("cat", k=4).neighbors] == ["noto--cat"]


def test_restore_makes_a_knowledge_base_of_a_snapshot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hosted(tmp_path / "data", snapshots=tmp_path / "snapshots") as client:
        fill(client)
        made = client.bases.CreateSnapshot(kb_pb.CreateSnapshotRequest(knowledge_base="small"), timeout=TIMEOUT_S)
        restore = ["restore", made.path, "--data", str(tmp_path / "data"), "--knowledge-base", "copy"]
        assert main(restore) == 2 and "in use" in capsys.readouterr().err
    assert made.num_bytes < 20 << 20, "what it takes up, not how long its files say they are"
    assert main(restore) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "data" / "copy")
    assert main(restore) == 2 and "exists" in capsys.readouterr().err
    assert main(["restore", str(tmp_path), *restore[2:]]) == 2 and "snapshot.json" in capsys.readouterr().err
    with hosted(tmp_path / "data") as client:
        assert client.retrieve("cat", knowledge_base="copy").neighbors[0].image
