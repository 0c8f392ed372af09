"""Who may do what, over which connection, and which addresses pictures may be read from."""

from __future__ import annotations

import http.server
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from reimagen.retrieval.v1 import knowledge_base_pb2 as kb_pb
from reimagen.retrieval.v1 import retrieval_pb2 as pb

from client.channel import Tls
from client.errors import reason
from client.knowledge_base import KnowledgeBases, Lookup, RetrievalFailed
from common.service.config import ConfigError
from retrieval_svc import allowed_images
from retrieval_svc.allowed_images import AllowedImages, ImageAddressError
from tests.retrieval_svc.serving import TIMEOUT_S, Client, fill, hosted, make_pairs, picture

READ, ADMIN, WRONG = "read-key-0123456789", "admin-key-0123456789", "wrong-key-0123456789"
READING = ("Retrieve", "BatchRetrieve", "ListKnowledgeBases", "GetKnowledgeBaseStats", "GetPair", "ListPairs")
CHANGING = ("CreateKnowledgeBase", "DeleteKnowledgeBase", "UpsertPairs", "DeletePairs", "CreateSnapshot")
DENIED = {
    None: (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_MISSING"),
    WRONG: (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_INVALID"),
    READ: (grpc.StatusCode.PERMISSION_DENIED, "API_KEY_NOT_ADMIN"),
}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A service that asks for keys."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "read").write_text(READ)
    (folder / "admin").write_text(ADMIN)
    keys = {"read_keys_file": folder / "read", "admin_keys_file": folder / "admin"}
    with hosted(folder / "data", **keys) as client:
        yield client


def test_every_method_is_in_the_matrix() -> None:
    services = (
        pb.DESCRIPTOR.services_by_name["RetrievalService"],
        kb_pb.DESCRIPTOR.services_by_name["KnowledgeBaseService"],
    )
    assert sorted(m.name for service in services for m in service.methods) == sorted(READING + CHANGING)


@pytest.mark.parametrize("key", [None, WRONG, READ, ADMIN])
@pytest.mark.parametrize("method", READING + CHANGING)
def test_who_may_call_what(guarded: Client, method: str, key: str | None) -> None:
    """Whoever is let in meets an empty request's error, or its answer."""
    stub = guarded.retrieval if hasattr(guarded.retrieval, method) else guarded.bases
    request: Any = getattr(kb_pb, f"{method}Request", None) or getattr(pb, f"{method}Request")
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    code, why = grpc.StatusCode.OK, ""
    try:
        if method == "BatchRetrieve":
            list(stub.BatchRetrieve(iter([request()]), timeout=TIMEOUT_S, metadata=metadata))
        else:
            getattr(stub, method)(request(), timeout=TIMEOUT_S, metadata=metadata)
    except grpc.RpcError as error:
        refused: Any = error
        code, why = refused.code(), reason(refused)
    is_allowed = key == ADMIN or (key == READ and method in READING)
    if is_allowed:
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    else:
        assert (code, why) == DENIED[key]


def test_probes_need_no_key(guarded: Client) -> None:
    health: Any = health_pb2_grpc.HealthStub(guarded.channel)
    for name in ("", "reimagen.retrieval.v1.RetrievalService", "reimagen.retrieval.v1.KnowledgeBaseService"):
        request = health_pb2.HealthCheckRequest(service=name)
        assert health.Check(request, timeout=TIMEOUT_S).status == 1
        assert next(iter(health.Watch(request, timeout=TIMEOUT_S))).status == 1


def test_mtls_and_keys_with_the_client(tmp_path: Path) -> None:
    authority, clients, stranger = trustme.CA(), trustme.CA(), trustme.CA()
    issued, caller = authority.issue_cert("127.0.0.1"), clients.issue_cert("caller")
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    clients.cert_pem.write_to_path(str(tmp_path / "clients.crt"))
    (tmp_path / "admin").write_text(ADMIN)
    own = {"certificate": caller.cert_chain_pems[0].bytes(), "key": caller.private_key_pem.bytes()}
    good, wrong_ca = Tls(roots=authority.cert_pem.bytes(), **own), Tls(roots=stranger.cert_pem.bytes(), **own)
    anonymous = Tls(roots=authority.cert_pem.bytes())
    settings = {
        "tls_certificate_file": tmp_path / "tls.crt",
        "tls_key_file": tmp_path / "tls.key",
        "tls_client_ca_file": tmp_path / "clients.crt",
        "admin_keys_file": tmp_path / "admin",
    }
    with hosted(tmp_path / "data", address="127.0.0.1:0", **settings) as client:
        for tls in (None, wrong_ca, anonymous):
            with (
                KnowledgeBases(client.address, api_key=ADMIN, tls=tls, timeout_s=2.0) as bases,
                pytest.raises(RetrievalFailed) as caught,
            ):
                bases.retrieve(Lookup(prompt="cat"))
            assert caught.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), "no connection at all"
        with KnowledgeBases(client.address, api_key=ADMIN, tls=good) as bases:
            assert list(bases.list()) == []
        with (
            KnowledgeBases(client.address, api_key=WRONG, tls=good) as bases,
            pytest.raises(RetrievalFailed, match="API key is unknown"),
        ):
            list(bases.list())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder that is allowed, beside one that is not."""
    for name in ("allowed", "allowed-not", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.png").write_bytes(name.encode())
    (tmp_path / "allowed" / "sub").mkdir()
    (tmp_path / "allowed" / "a b.png").write_bytes(b"spaced")
    (tmp_path / "allowed" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "allowed" / "passwd").symlink_to("/etc/passwd")
    (tmp_path / "allowed" / "inside").symlink_to(tmp_path / "allowed" / "p.png")
    return tmp_path


def test_files_of_the_allowed_folder(root: Path) -> None:
    images = AllowedImages([f"file://{root}/allowed"])
    assert images.read(f"file://{root}/allowed/p.png") == b"allowed"
    assert images.read(f"file://{root}/allowed/a%20b.png") == b"spaced"
    assert images.read(f"file://{root}/allowed/inside") == b"allowed", "a link that stays"
    for uri in (
        f"file://{root}/outside/p.png",
        f"file://{root}/allowed-not/p.png",
        f"file://localhost{root}/allowed/p.png",
        f"{root}/allowed/p.png",
        f"FILE2://{root}/allowed/p.png",
        f"http://{root}/allowed/p.png",
        "file:///etc/passwd",
        "https://example.org/p.png",
        "data:image/png;base64,AAAA",
        "",
    ):
        assert images.read(uri) == b"", uri
    for tail in ("../outside/p.png", "%2e%2e/outside/p.png", "sub/../../outside/p.png", "out/p.png", "passwd", "a%00b"):
        with pytest.raises(ImageAddressError, match="leaves the folder"):
            images.read(f"file://{root}/allowed/{tail}")
    for tail in ("sub", "."):
        with pytest.raises(OSError):
            images.read(f"file://{root}/allowed/{tail}")
    assert AllowedImages([]).read(f"file://{root}/allowed/p.png") == b""


@pytest.mark.parametrize(
    "prefix", ["http://example.org/", "file:///nowhere/at/all", "https:///p", "example.org", "ftp://x/"]
)
def test_prefixes_that_cannot_be(prefix: str) -> None:
    with pytest.raises(ConfigError, match="--image-prefixes"):
        AllowedImages([prefix])


class _Web(http.server.BaseHTTPRequestHandler):
    """Serves a picture, redirects, and too much."""

    def do_GET(self) -> None:
        target = {
            "/a/in": "/a/p.png",
            "/a/out": "/b/p.png",
            "/a/plain": "http://127.0.0.1/",
            "/a/file": "file:///etc/passwd",
        }
        if self.path in target:
            self.send_response(302)
            self.send_header("Location", target[self.path])
            self.end_headers()
            return
        if self.path == "/a/drip":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        found = self.path in ("/a/p.png", "/b/p.png", "/a/large")
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b"x" * 3000 if self.path == "/a/large" else b"web")

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


def test_https_below_the_allowed_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Web)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    base = f"https://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            AllowedImages([f"{base}/a/"]).read(f"{base}/a/p.png")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        monkeypatch.setattr(allowed_images, "MAX_IMAGE_BYTES", 2000)
        images = AllowedImages([f"{base}/a/"], timeout_s=0.5)
        assert images.read(f"{base}/a/p.png") == b"web"
        assert images.read(f"{base}/a/in") == b"web", "a redirect that stays"
        assert images.read(f"{base}/b/p.png") == b""
        assert images.read(f"https://user@127.0.0.1:{server.server_port}/a/p.png") == b""
        assert images.read(f"{base}.evil.example/a/p.png") == b""
        for path, why in (
            ("out", "redirects"),
            ("plain", "redirects"),
            ("file", "status 302"),
            ("none", "status 404"),
            ("large", "more than 2000"),
            ("drip", "longer than"),
            ("../b/p.png", "leaves"),
            ("%2e%2e/b/p.png", "leaves"),
        ):
            with pytest.raises(ImageAddressError, match=why):
                images.read(f"{base}/a/{path}")
    finally:
        server.shutdown()
        server.server_close()


def test_keys_may_change_while_it_serves(tmp_path: Path) -> None:
    keys = tmp_path / "admin"
    keys.write_text(ADMIN)
    with hosted(tmp_path / "data", admin_keys_file=keys) as client:
        fill(client, pairs=make_pairs(["cat"]), metadata=(("authorization", f"Bearer {ADMIN}"),))
        keys.write_text(WRONG)
        with KnowledgeBases(client.address, api_key=WRONG) as bases:
            assert [base.name for base in bases.list()] == ["small"]
            assert bases.get("small", "noto--cat").image == picture(0)
        with KnowledgeBases(client.address, api_key=ADMIN) as bases, pytest.raises(RetrievalFailed):
            list(bases.list())
