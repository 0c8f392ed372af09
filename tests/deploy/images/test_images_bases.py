"""Digests asked of a registry of this test's own, over real sockets; and the command that builds with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.images.__main__ import main
from deploy.images.bases import DIGEST as FORM
from deploy.images.bases import RegistryError, digest, known_digests, read_digests
from deploy.images.building import build_arguments, build_command
from deploy.images.catalog import DEBIAN, FOLDER, IMAGES, TRITON

DIGEST = "sha256:" + "c" * 64
DAY = "20261101T000000Z"


class Registry(BaseHTTPRequestHandler):
    """Answers as registries do: a token first, then the digest of a tag."""

    def __init__(self, told: str, *arguments: object) -> None:
        self._told = told
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_HEAD(self) -> None:
        """The manifest's headers."""
        place = f"http://127.0.0.1:{self.server.server_port}"  # pyright: ignore[reportAttributeAccessIssue]
        if self.path != "/v2/library/debian/manifests/bookworm-slim":
            self.send_response(404)
        elif self.headers.get("Authorization") != "Bearer let-me":
            self.send_response(401)
            self.send_header("WWW-Authenticate", f'Bearer realm="{place}/token",service="here"')
        else:
            self.send_response(200)
            self.send_header("Docker-Content-Digest", self._told)
        self.end_headers()

    def do_GET(self) -> None:
        """The token, for the scope that was asked for."""
        self.send_response(200)
        self.end_headers()
        allowed = self.path == "/token?scope=repository%3Alibrary%2Fdebian%3Apull&service=here"
        self.wfile.write(json.dumps({"token": "let-me" if allowed else "no"}).encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@contextmanager
def registry(told: str) -> Iterator[str]:
    """A registry's host and port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Registry, told))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_digest_is_what_the_registry_says_once_it_has_given_a_token() -> None:
    with registry(DIGEST) as host:
        assert digest(replace(DEBIAN, registry=host), scheme="http") == DIGEST
        with pytest.raises(RegistryError, match=r"nvidia/tritonserver.* 404"):
            digest(replace(TRITON, registry=host), scheme="http")
    with pytest.raises(RegistryError, match="library/debian"):
        digest(replace(DEBIAN, registry=host), scheme="http")  # nobody is there any more


@pytest.mark.parametrize("told", ["", "sha256:12", "md5:" + "c" * 64])
def test_what_is_no_digest_is_not_taken(told: str) -> None:
    with registry(told) as host, pytest.raises(RegistryError, match="for a digest"):
        digest(replace(DEBIAN, registry=host), scheme="http")


def test_a_build_without_a_digest_or_a_day_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = tmp_path / "bases.json"
    dry = ["build", "retrieval", "--dry-run", f"--bases={bases}"]
    assert main([*dry, "--snapshot=20261101T000000Z"]) == 2
    assert "make image-digests" in capsys.readouterr().err
    bases.write_text(json.dumps({"DEBIAN_DIGEST": "sha256:0"}))
    assert main([*dry, "--snapshot=20261101T000000Z"]) == 2
    assert "DEBIAN_DIGEST is 'sha256:0'" in capsys.readouterr().err
    bases.write_text(json.dumps({"DEBIAN_DIGEST": DIGEST}))
    assert main(dry) == 2
    assert "DEBIAN_SNAPSHOT must be given" in capsys.readouterr().err
    assert main([*dry, "--snapshot=20261101T000000Z", "--lock=generator"]) == 2
    assert main([*dry, "--snapshot=yesterday"]) == 2
    assert "--snapshot: 'yesterday'" in capsys.readouterr().err
    assert main([*dry, "--snapshot=20261101T000000Z"]) == 0
    assert f"--build-arg DEBIAN_DIGEST={DIGEST}" in capsys.readouterr().out


@pytest.mark.parametrize("image", IMAGES)
def test_every_image_has_a_command_with_all_that_its_dockerfile_wants(image: str, tmp_path: Path) -> None:
    digests = {"DEBIAN_DIGEST": DIGEST, "TRITON_DIGEST": DIGEST}
    arguments = build_arguments(image, digests, snapshot=DAY, revision="r", created="c")
    (tmp_path / "unet_64").mkdir()
    (tmp_path / "unet_64" / "config.pbtxt").touch()
    command = build_command("docker", image, "t", arguments, context=tmp_path)
    assert command[-1] == str(tmp_path)
    assert "--build-arg REVISION=r" in " ".join(command)
    assert read_given(command).get("LOCK", "") == (IMAGES[image] or ("",))[0]


def test_models_are_made_of_a_model_repository_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The repository's root, which is the default, would be an image without a model."""
    for folder in ([], [f"--context={tmp_path}"], [f"--context={tmp_path / 'no'}"]):
        assert main(["build", "models", "--dry-run", *folder]) == 2
        assert "is no model repository" in capsys.readouterr().err


def read_given(command: list[str]) -> dict[str, str]:
    """The arguments of a build's command."""
    given = [command[i + 1].partition("=") for i, word in enumerate(command) if word == "--build-arg"]
    return {name: value for name, _, value in given}


def test_published_digests_count_until_registries_were_asked(tmp_path: Path) -> None:
    asked = tmp_path / "bases.json"
    published = known_digests(None, asked=asked)
    assert set(published) == {"DEBIAN_DIGEST"} and all(map(FORM.fullmatch, published.values()))
    build_arguments("retrieval", published, snapshot=DAY, revision="r", created="c")
    with pytest.raises(ValueError, match=r"triton: TRITON_DIGEST must be given: image-digests"):
        build_arguments("triton", published, revision="r", created="c")
    with pytest.raises(ValueError, match="is not there"):
        known_digests(tmp_path / "named.json", asked=asked)
    asked.write_text(json.dumps({"DEBIAN_DIGEST": DIGEST, "TRITON_DIGEST": DIGEST}))
    assert known_digests(None, asked=asked) == {"DEBIAN_DIGEST": DIGEST, "TRITON_DIGEST": DIGEST}


def test_what_is_published_is_said_with_its_records() -> None:
    page = (FOLDER / "README.md").read_text()
    assert DEBIAN.published not in page, "catalog.py is its home"
    assert "bookworm-20260918-slim.md" in page and "not pulled" in page and TRITON.published == ""


def test_digests_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "bases.json"
    path.write_text(json.dumps({"DEBIAN_DIGEST": DIGEST}))
    assert read_digests(path) == {"DEBIAN_DIGEST": DIGEST}
    path.write_text("[]")
    with pytest.raises(ValueError, match="bases"):
        read_digests(path)
