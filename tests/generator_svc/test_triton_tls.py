"""A real Triton over TLS and over mutual TLS: whoever asks it is let in with the right files, and told why otherwise."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from deploy.k8s import triton_canary
from deploy.local import tritonserver
from deploy.local.__main__ import main as local
from deploy.local.children import ChildFailed
from deploy.local.tritonserver import TritonServer, TritonSettings, TritonTls
from generator_svc.channel_tls import ChannelTls
from generator_svc.roll_out import RollOutFailed, roll_out
from generator_svc.triton_client import TritonClient
from generator_svc.triton_endpoint import EndpointPolicy
from generator_svc.triton_errors import EndpointFailed
from generator_svc.triton_stage import ask_card
from tests.deploy.k8s.rendering import pods, stack
from tests.generator_svc.served import asked
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.tiny_stack import Host, generator_service
from tests.generator_svc.triton_server import wait_until

ORDER = plans(64, 7, 2), text_inputs(3, 2)
NAME = "localhost"  # all that the servers' certificates bear
TRUST, NAMES = "not of the authority that is trusted here", "does not bear the name"
NO_TLS, HANGS_UP = "speaks no TLS", "wants TLS, or another certificate than it is shown"


def issue(authority: trustme.CA, folder: Path, name: str = NAME, trusted: trustme.CA | None = None) -> Path:
    """A folder as a Secret is mounted: a certificate of `authority`, and whom it trusts."""
    folder.mkdir(exist_ok=True)
    issued = authority.issue_cert(name)
    issued.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    issued.private_key_pem.write_to_path(str(folder / "tls.key"))
    (trusted or authority).cert_pem.write_to_path(str(folder / "ca.crt"))
    return folder


@dataclass(frozen=True, kw_only=True)
class Place:
    """Certificates, and the servers that have them: one asks its callers for theirs."""

    folder: Path
    authority: trustme.CA
    stranger: trustme.CA
    mutual: TritonServer
    one_sided: TritonServer

    def tls(self, name: str, *, shown: bool = True) -> ChannelTls:
        """Of whoever has the files in a folder, and shows the certificate among them or does not."""
        own = {"certificate": self.folder / name / "tls.crt", "key": self.folder / name / "tls.key"} if shown else {}
        return ChannelTls("triton", ca=self.folder / name / "ca.crt", **own)


def ready(server: TritonServer, settings: TritonSettings) -> TritonServer:
    """It, or its successor where the Python backend has aborted at its start, as it does now and then."""
    try:
        server.wait_ready()
    except ChildFailed:
        if not server.has_aborted:
            raise
        server.stop()
        server = TritonServer(settings)
        server.wait_ready()
    return server


def at(server: TritonServer) -> str:
    """Its address by name."""
    return server.address.replace("127.0.0.1", NAME)


@pytest.fixture(scope="module")
def place(triton_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("tls")
    authority, stranger = trustme.CA(), trustme.CA()
    issue(authority, folder / "server")
    issue(authority, folder / "caller", "generator")
    issue(stranger, folder / "trusts-another", "generator")
    issue(stranger, folder / "is-another", "generator", trusted=authority)
    given = {"repository": triton_repository, "models": ("unet_64",), "drain_s": 1}
    both = [
        TritonSettings(
            **given, log=folder / f"{is_mutual}.log", tls=TritonTls(folder=folder / "server", is_mutual=is_mutual)
        )
        for is_mutual in (True, False)
    ]
    servers: list[TritonServer] = []
    try:
        servers += map(TritonServer, both)  # they start at the same time
        servers[:] = mutual, one_sided = list(map(ready, servers, both))
        yield Place(folder=folder, authority=authority, stranger=stranger, mutual=mutual, one_sided=one_sided)
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.stop()


def test_a_stage_over_tls_and_over_mutual_tls(place: Place, host: Host) -> None:
    """By a name that is looked up: the certificate has to bear the name, not the number behind it."""

    async def drawn(server: TritonServer, tls: ChannelTls) -> np.ndarray:
        async with asked(64, at(server), credentials=tls.credentials) as asking:
            return (await asking.draw(*ORDER))[0]

    one_sided = host.call(drawn(place.one_sided, place.tls("caller", shown=False)))
    mutual = host.call(drawn(place.mutual, place.tls("caller")))
    assert np.array_equal(one_sided, mutual) and np.ptp(mutual) > 0


def test_a_generator_with_its_settings(place: Place, host: Host, tmp_path: Path) -> None:
    files = {"ca": "ca.crt", "certificate": "tls.crt", "key": "tls.key"}
    settings = {f"triton_{name}_file": place.folder / "caller" / file for name, file in files.items()}
    settings |= {"stages": "triton", "triton_addresses": at(place.mutual), "triton_canary_timeout_s": 0.5}
    generator = generator_service(tmp_path / "g.sock", retrieval_address="unix:/nowhere", **settings)
    target = f"unet_64@{place.mutual.address}"
    with host.running(generator):
        wait_until(lambda: generator.figure("reimagen_canary_success", target=target) == 1.0)


def test_who_is_refused_and_what_is_said(place: Place, host: Host) -> None:
    """At once, and not by a deadline."""
    plain = grpc.server(futures.ThreadPoolExecutor(1))
    clear = f"{NAME}:{plain.add_insecure_port('127.0.0.1:0')}"
    plain.start()
    caller, anonymous = place.tls("caller"), place.tls("caller", shown=False)
    for address, tls, why in (
        (at(place.one_sided), None, HANGS_UP),
        (at(place.one_sided), place.tls("trusts-another"), TRUST),
        (place.one_sided.address, caller, NAMES),
        (at(place.mutual), None, HANGS_UP),
        (at(place.mutual), anonymous, HANGS_UP),
        (at(place.mutual), place.tls("is-another"), HANGS_UP),
        (clear, caller, NO_TLS),
    ):
        error = host.call(refusal(address, tls))
        assert (error.kind, error.is_down) == ("unreachable", True), (address, why)
        assert error.description.startswith(f"unet_64 at {address}: it") and why in error.description
    plain.stop(None)


async def refusal(address: str, tls: ChannelTls | None) -> EndpointFailed:
    client = TritonClient(address, credentials=tls.credentials() if tls else None)
    try:
        await ask_card("unet_64", client, 20.0)
    except EndpointFailed as error:
        return error
    finally:
        await client.close()
    raise AssertionError("it was let in")


def test_a_generator_says_why_it_has_no_triton_and_takes_up_other_files(
    place: Place, host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a restart, and without the loss of a request that is under way."""
    files = tmp_path / "own"
    shutil.copytree(place.folder / "is-another", files)
    tls = ChannelTls("triton", ca=files / "ca.crt", certificate=files / "tls.crt", key=files / "tls.key")
    policy = EndpointPolicy(resolve_interval_s=0.1, max_backoff_s=0.2, answer_s=0.5)

    async def ask() -> None:
        async with asked(64, at(place.mutual), policy=policy, credentials=tls.credentials, wait_for=0) as asking:
            while not caplog.records:
                await asyncio.sleep(0.05)
            assert not asking.in_use
            issue(place.authority, files, "generator")
            await asking.until(lambda: bool(asking.in_use), 10.0)
            (endpoint,) = asking.stage.endpoints.in_use
            before = endpoint.client
            drawing = asyncio.create_task(asking.draw(plans(64, 7, 100), text_inputs(3, 2)))
            while not endpoint.in_flight:
                await asyncio.sleep(0.01)
            issue(place.authority, files, "generator")
            while endpoint.client is before:
                await asyncio.sleep(0.01)
            assert endpoint.in_flight, "it goes on over the connection that it began on"
            await drawing
            assert asking.figure("reimagen_generator_triton_retries_total") == 0
            before = endpoint.client
            issue(place.stranger, files, "generator", trusted=place.authority)
            while endpoint.refused is None:
                await asyncio.sleep(0.01)
            assert endpoint.client is before, "what Triton does not take is not asked with"
            await asking.draw(*ORDER)

    with caplog.at_level(logging.INFO, "generator_svc.triton_endpoints"):
        host.call(ask())
    ours = [record for record in caplog.records if getattr(record, "endpoint", "").endswith(place.mutual.address)]
    told = [(record.message, getattr(record, "reason", "")) for record in ours]
    assert [message for message, _ in told] == ["not taken in", "taken in", "connection kept"], "each once"
    assert HANGS_UP in told[0][1] and HANGS_UP in told[2][1]


def test_the_probes_of_the_pod(
    place: Place, triton_repository: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """The commands of the encrypted overlay, with the files of this test in place of the Secret's."""
    (tmp_path / "unet_64").mkdir()
    shutil.copy(triton_repository / "unet_64" / "config.pbtxt", tmp_path / "unet_64")
    (container,) = (pod.spec["containers"][0] for pod in pods(stack("gpu")) if pod.owner == "Deployment/triton")
    for probe in ("livenessProbe", "readinessProbe"):
        words = container[probe]["exec"]["command"][3:]
        here = {"/etc/reimagen/tls": "{files}", "localhost:8001": at(place.mutual), "/models": str(tmp_path)}
        for old, new in here.items():
            assert probe == "readinessProbe" or any(old in word for word in words)
            words = [word.replace(old, new) for word in words]
        for name, status, said in (("server", 0, ""), ("trusts-another", 2, TRUST), ("is-another", 2, HANGS_UP)):
            asked_so = [word.replace("{files}", str(place.folder / name)) for word in words]
            assert triton_canary.main(asked_so) == status
            assert said in capfd.readouterr().err


def test_a_triton_that_has_not_loaded_everything_is_not_ready(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Over TLS as the probe asks, too."""
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "config.pbtxt").write_text('backend: "none"')
    tls = TritonTls(folder=place.folder / "server")
    given = {"repository": tmp_path / "models", "exit_on_error": False, "control": "none", "tls": tls, "drain_s": 1}
    server = TritonServer(TritonSettings(**given, log=tmp_path / "log"))
    files = {"ca": "ca.crt", "certificate": "tls.crt", "key": "tls.key"}
    shown = [f"--tls-{name}-file={place.folder / 'server' / file}" for name, file in files.items()]

    def is_told() -> bool:
        assert triton_canary.main([f"--address={at(server)}", "--ready", *shown]) == 2
        return "is not ready" in capfd.readouterr().err  # and not that nobody listens yet

    try:
        wait_until(is_told)
    finally:
        server.stop()


def test_a_file_that_is_not_there_is_named_by_the_local_triton(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = ["serve-triton", f"--repository={tmp_path}", f"--log={tmp_path / 'log'}", f"--tls={tmp_path}"]
    assert local(told) == 2
    assert f"--tls: {tmp_path / 'ca.crt'}: No such file or directory" in capfd.readouterr().err


def test_a_certificate_that_it_cannot_be_asked_with_ends_the_local_triton(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than be waited for until its time to start is over."""
    monkeypatch.setattr(tritonserver, "REFUSED_S", 0.2)
    (tmp_path / "models").mkdir()
    tls = TritonTls(folder=issue(place.authority, tmp_path / "files", "triton"))
    server = TritonServer(
        TritonSettings(repository=tmp_path / "models", log=tmp_path / "log", control="none", tls=tls, drain_s=0)
    )
    try:
        with pytest.raises(ChildFailed, match=f"as localhost with the files in {tls.folder}: .*{NAMES}"):
            server.wait_ready(15.0)
    finally:
        server.stop()


def test_a_roll_out_over_mutual_tls(place: Place, host: Host, triton_repository: Path) -> None:
    """Triton is reached, and asks for its key; or is not."""
    for name, said in (("caller", "the admin key is missing"), ("trusts-another", TRUST), ("is-another", HANGS_UP)):
        credentials = place.tls(name).credentials()
        with pytest.raises(RollOutFailed, match=said):
            host.call(
                roll_out(triton_repository, ["unet_64"], {}, [at(place.mutual)], admin_key="", credentials=credentials)
            )
