"""API keys: who may do what, and that their files may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from client.errors import reason
from common.service.config import ConfigError
from common.service.errors import PermissionDenied, Unauthenticated
from common.service.keys import ApiKeys
from tests.common.service.echo import NAME, Host, failure, run

READ, ADMIN, OTHER = "read-key-0123456789", "admin-key-0123456789", "other-key-0123456789"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A file of read keys and one of admin keys."""
    read, admin = tmp_path / "read.keys", tmp_path / "admin.keys"
    read.write_text(f"# readers\n\n{READ}\n")
    admin.write_text(f"{ADMIN}\n")
    return {"read": read, "admin": admin}


def _bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


def test_who_may_do_what(tmp_path: Path, files: dict[str, Path]) -> None:
    async def test(host: Host) -> None:
        async with host.running() as channel:
            await host.open()
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1, "probes have no key"
            read, change = channel.unary_unary(f"/{NAME}/Echo"), channel.unary_unary(f"/{NAME}/Change")
            for call in (read, change, channel.unary_unary("/no.Such/Method")):
                for metadata, why in (
                    ((), "API_KEY_MISSING"),
                    (_bearer(OTHER), "API_KEY_INVALID"),
                    ((("authorization", READ),), "API_KEY_MALFORMED"),
                    ((("authorization", "Bearer "),), "API_KEY_MALFORMED"),
                ):
                    refused = await failure(call(b"x", metadata=metadata))
                    assert (refused.code(), reason(refused)) == (grpc.StatusCode.UNAUTHENTICATED, why)
            assert await read(b"x", metadata=_bearer(READ)) == b"x"
            assert await read(b"x", metadata=(("authorization", f"bearer {ADMIN}"),)) == b"x"
            assert await change(b"x", metadata=_bearer(ADMIN)) == b"x"
            refused = await failure(change(b"x", metadata=_bearer(READ)))
            assert (refused.code(), reason(refused)) == (grpc.StatusCode.PERMISSION_DENIED, "API_KEY_NOT_ADMIN")
            reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            refused = await failure(reflection.ServerReflectionInfo(iter([ask])).read())
            assert refused.code() == grpc.StatusCode.UNAUTHENTICATED
            assert await reflection.ServerReflectionInfo(iter([ask]), metadata=_bearer(READ)).read()

    run(tmp_path, test, read_keys_file=files["read"], admin_keys_file=files["admin"])


def test_files_are_read_again(files: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    keys = ApiKeys(**files)
    keys.check(_bearer(READ), needs_admin=False)
    files["read"].write_text(OTHER)
    keys.check(_bearer(OTHER), needs_admin=False)
    with pytest.raises(Unauthenticated):
        keys.check(_bearer(READ), needs_admin=False)
    files["read"].write_text("short")
    keys.check(_bearer(OTHER), needs_admin=False)
    files["read"].unlink()
    keys.check(_bearer(OTHER), needs_admin=False)
    assert "API keys not reloaded" in caplog.text
    files["read"].write_text("# all revoked\n")
    with pytest.raises(Unauthenticated):
        keys.check(_bearer(OTHER), needs_admin=False)


def test_one_file_is_enough(files: dict[str, Path]) -> None:
    only_read = ApiKeys(read=files["read"], admin=None)
    with pytest.raises(PermissionDenied):
        only_read.check(_bearer(READ), needs_admin=True)
    only_admin = ApiKeys(read=None, admin=files["admin"])
    only_admin.check(_bearer(ADMIN), needs_admin=True)
    with pytest.raises(Unauthenticated):
        only_admin.check((), needs_admin=False)
    ApiKeys(read=None, admin=None).check((), needs_admin=True)


@pytest.mark.parametrize(
    ("content", "named"),
    [(None, "No such file"), ("# none\n", "holds no key"), ("short\n", "key 1 has not 16"), ("é" * 20, "ASCII")],
)
def test_files_that_cannot_be(tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "some.keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=named) as caught:
        ApiKeys(read=path, admin=None)
    assert str(caught.value).startswith(f"--read-keys-file: {path}")
