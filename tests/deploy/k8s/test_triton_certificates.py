"""The certificates that the guide has made by hand: they do what Tritons, their probes and generators need, and no more."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.deploy.k8s.rendering import MANIFESTS, environment, pods, stack

SHOWN_BY = ("triton-client-tls", "triton-tls")  # generators, and a Triton's probes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of the guide were run; a `kubectl` notes what it is told."""
    made = tmp_path_factory.mktemp("certificates")
    (block,) = (
        each
        for each in re.findall(r"^```sh\n(.*?)^```$", (MANIFESTS / "README.md").read_text(), re.M | re.S)
        if "issue()" in each
    )
    (made / "bin").mkdir()
    (made / "bin" / "kubectl").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> told\n')
    (made / "bin" / "kubectl").chmod(0o755)
    path = os.pathsep.join((str(made / "bin"), os.environ["PATH"]))
    subprocess.run(["bash", "-euc", block], cwd=made, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    return made


def shake_hands(folder: Path, caller: str, name: str) -> None:
    """A caller with the files of one Secret asks a Triton by a name. Raises ssl.SSLError."""
    told = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    told[0].verify_mode = ssl.CERT_REQUIRED
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    for context, secret in zip(told, ("triton-tls", caller), strict=True):
        context.load_cert_chain(folder / secret / "tls.crt", folder / secret / "tls.key")
        context.load_verify_locations(folder / secret / "ca.crt")
    server = told[0].wrap_bio(to_server, to_client, server_side=True)
    client = told[1].wrap_bio(to_client, to_server, server_hostname=name)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)


def test_every_name_is_borne_and_every_caller_let_in(folder: Path) -> None:
    manifests = stack("gpu-ha")
    (generator,) = (pod for pod in pods(manifests) if pod.name == "generator")
    addresses = environment(generator.containers[0], manifests)["REIMAGEN_GENERATOR_TRITON_ADDRESSES"]
    for name in ("localhost", *(address.rpartition(":")[0] for address in addresses.split(","))):
        for caller in SHOWN_BY:
            shake_hands(folder, caller, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(folder, "triton-client-tls", "retrieval")


def test_none_of_them_signs_others_or_stands_for_a_triton(folder: Path) -> None:
    """But for that of Tritons."""
    for secret in SHOWN_BY:
        certificate = x509.load_pem_x509_certificate((folder / secret / "tls.crt").read_bytes()).extensions
        assert not certificate.get_extension_for_class(x509.BasicConstraints).value.ca
        usages = set(certificate.get_extension_for_class(x509.ExtendedKeyUsage).value)
        assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) == (secret == "triton-tls")


def test_secrets_are_made_of_what_is_mounted(folder: Path) -> None:
    told = (folder / "told").read_text().splitlines()
    assert told == [
        f"-n reimagen create secret generic {name} --from-file={name}" for name in ("triton-tls", "triton-client-tls")
    ]
    for secret in SHOWN_BY:
        assert sorted(path.name for path in (folder / secret).iterdir()) == ["ca.crt", "tls.crt", "tls.key"]
