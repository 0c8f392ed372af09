"""TLS and mTLS over real sockets, with certificates made here, and their renewal."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme

from common.service.config import ConfigError
from common.service.tls import TlsFiles
from tests.common.service.echo import NAME, WAIT_S, Host


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """An authority that the server's certificates come from."""
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger() -> trustme.CA:
    """One that nobody knows."""
    return trustme.CA()


def _write(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    certificate, key = folder / "tls.crt", folder / "tls.key"
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(key))
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return {"tls_certificate_file": certificate, "tls_key_file": key}


async def _ask(host: Host, roots: trustme.CA | None, client: trustme.LeafCert | None = None) -> bytes:
    """One call over a new connection; the address is an IPv4 one, which the certificate names."""
    pair = (client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()) if client else (None, None)
    if roots is None:
        channel = grpc.aio.insecure_channel(host.address)
    else:
        credentials = grpc.ssl_channel_credentials(roots.cert_pem.bytes(), *pair)
        channel = grpc.aio.secure_channel(host.address, credentials)
    async with channel:
        return await channel.unary_unary(f"/{NAME}/Echo")(b"hello", timeout=5)


async def _is_refused(host: Host, *who: Any) -> bool:
    try:
        await _ask(host, *who)
    except grpc.aio.AioRpcError as error:
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return False


def _run(test: Any, tmp_path: Path, **settings: Any) -> None:
    async def whole() -> None:
        host = Host(tmp_path, address="127.0.0.1:0", **settings)
        async with host.running():
            await host.open()
            await test(host)

    asyncio.run(asyncio.wait_for(whole(), WAIT_S))


def test_tls(tmp_path: Path, authority: trustme.CA, stranger: trustme.CA) -> None:
    async def test(host: Host) -> None:
        assert await _ask(host, authority) == b"hello"
        assert await _is_refused(host, stranger)
        assert await _is_refused(host, None), "not in the clear"

    _run(test, tmp_path, **_write(tmp_path, authority))


def test_mtls(tmp_path: Path, authority: trustme.CA, stranger: trustme.CA) -> None:
    clients = trustme.CA()
    clients.cert_pem.write_to_path(str(tmp_path / "clients.crt"))

    async def test(host: Host) -> None:
        assert await _ask(host, authority, clients.issue_cert("caller")) == b"hello"
        assert await _is_refused(host, authority)
        assert await _is_refused(host, authority, stranger.issue_cert("caller"))

    files = _write(tmp_path, authority) | {"tls_client_ca_file": tmp_path / "clients.crt"}
    _run(test, tmp_path, **files)


def test_renewed_files_are_taken_up(tmp_path: Path, authority: trustme.CA, stranger: trustme.CA) -> None:
    files = _write(tmp_path, authority)

    async def test(host: Host) -> None:
        assert await _ask(host, authority) == b"hello"
        key = files["tls_key_file"].read_bytes()
        files["tls_key_file"].write_bytes(stranger.issue_cert("localhost").private_key_pem.bytes())
        assert await _ask(host, authority) == b"hello", "half-renewed files change nothing"
        files["tls_key_file"].write_bytes(key)
        _write(tmp_path, stranger)
        assert await _ask(host, stranger) == b"hello"
        assert await _is_refused(host, authority)

    _run(test, tmp_path, **files)


def test_files_that_cannot_be(tmp_path: Path, authority: trustme.CA) -> None:
    files = _write(tmp_path, authority)
    certificate, key = files["tls_certificate_file"], files["tls_key_file"]
    assert TlsFiles.of(None, None, None) is None
    for given, named in (
        ((certificate, None, None), "--tls-key-file: missing"),
        ((None, key, None), "--tls-certificate-file: missing"),
        ((None, None, certificate), "--tls-certificate-file: missing"),
    ):
        with pytest.raises(ConfigError, match=named):
            TlsFiles.of(*given)
    other = authority.issue_cert("localhost").private_key_pem
    other.write_to_path(str(tmp_path / "other.key"))
    for path in (tmp_path / "nowhere", tmp_path / "other.key", certificate):
        files_given = TlsFiles.of(certificate, path, None)
        assert files_given is not None
        with pytest.raises(ConfigError, match="--tls-key-file"):
            files_given.credentials()
