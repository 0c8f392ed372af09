"""Files of a channel's TLS: which cannot be, and what becomes of those that change."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from common.files import write_atomic
from common.service.config import ConfigError
from generator_svc.channel_tls import ChannelTls, fault_of


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def written(folder: Path, authority: trustme.CA) -> dict[str, Path]:
    """A certificate that was just issued, with its key and the authority."""
    issued = authority.issue_cert("generator")
    files = {name: folder / name for name in ("ca", "certificate", "key")}
    write_atomic(files["ca"], authority.cert_pem.bytes())
    write_atomic(files["certificate"], issued.cert_chain_pems[0].bytes())
    write_atomic(files["key"], issued.private_key_pem.bytes())
    return files


def test_what_does_not_belong_together_is_named(tmp_path: Path) -> None:
    path = tmp_path / "any"
    assert ChannelTls.of("triton", None, None, None) is None
    for given, named in (
        ((path, path, None), "--triton-key-file: missing"),
        ((path, None, path), "--triton-certificate-file: missing"),
        ((None, path, path), "--triton-ca-file: missing"),
        ((None, None, path), "--triton-certificate-file: missing"),
    ):
        with pytest.raises(ConfigError, match=named):
            ChannelTls.of("triton", *given)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, authority: trustme.CA) -> None:
    files = written(tmp_path, authority)
    ChannelTls("triton", **files).credentials()
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "empty").touch()
    other, locked = authority.issue_cert("other").private_key_pem.bytes(), tmp_path / "locked"
    (tmp_path / "other").write_bytes(other)
    key = serialization.load_pem_private_key(other, None)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"a password")))
    for name, path, named in (
        ("ca", tmp_path / "nowhere", f"--triton-ca-file: {tmp_path}/nowhere: No such file"),
        ("ca", tmp_path, f"--triton-ca-file: {tmp_path}: Is a directory"),
        ("ca", tmp_path / "text", f"--triton-ca-file: {tmp_path}/text holds no PEM certificate"),
        ("ca", tmp_path / "empty", f"--triton-ca-file: {tmp_path}/empty holds no PEM certificate"),
        ("ca", files["key"], f"--triton-ca-file: {tmp_path}/key holds no PEM certificate"),
        ("certificate", tmp_path / "nowhere", f"--triton-certificate-file: {tmp_path}/nowhere: No such file"),
        ("certificate", tmp_path / "text", f"--triton-certificate-file: {tmp_path}/text holds no PEM certificate"),
        ("key", tmp_path / "nowhere", f"--triton-key-file: {tmp_path}/nowhere: No such file"),
        ("key", tmp_path / "text", f"--triton-key-file: {tmp_path}/text is no PEM key of the certificate in"),
        ("key", tmp_path / "other", f"--triton-key-file: {tmp_path}/other is no PEM key of the certificate in"),
        ("key", locked, f"--triton-key-file: {locked} is no PEM key of the certificate in"),
    ):
        with pytest.raises(ConfigError) as caught:
            ChannelTls("triton", **files | {name: path}).credentials()
        assert str(caught.value).startswith(named)


def test_renewed_files_are_taken_up_and_half_renewed_ones_are_not(
    tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    files = written(tmp_path, authority)
    tls = ChannelTls("triton", **files)
    first = tls.credentials()
    assert tls.credentials() is first
    write_atomic(files["certificate"], authority.issue_cert("generator").cert_chain_pems[0].bytes())
    assert tls.credentials() is first and tls.credentials() is first, "its key is another's"
    files["key"].unlink()
    assert tls.credentials() is first
    told = [record.message for record in caplog.records]
    assert told == ["TLS files not reloaded"] * 2, "once for each change"
    written(tmp_path, authority)
    second = tls.credentials()
    assert second is not first and tls.credentials() is second


def test_other_failures_have_nothing_to_do_with_tls() -> None:
    said = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: connect: Connection refused"
    assert fault_of(said) == fault_of("Stream removed (Socket closed)") == ""
