"""Mutations of what speaks TLS: one end that does not, a probe that does not, a file that is not there."""

from __future__ import annotations

from tests.deploy.k8s.mutations import breaks, configured, container, pod
from tests.deploy.k8s.rendering import Manifest, Manifests, named

TRITON = "REIMAGEN_GENERATOR_TRITON_"


def without(words: list[str], *beginnings: str) -> None:
    """Take the words that begin so from a command."""
    left = [word for word in words if not word.startswith(beginnings)]
    assert len(left) < len(words)
    words[:] = left


def probed(m: Manifests, kind: str) -> list[str]:
    """The command of a Triton's probe."""
    return container(m, "triton")[kind]["exec"]["command"]


def mount(found: Manifest, name: str) -> Manifest:
    """A container's mount of a volume."""
    (of_that_name,) = (each for each in found["volumeMounts"] if each["name"] == name)
    return of_that_name


@breaks("encrypted")
def generator_in_the_clear(m: Manifests) -> None:
    for name in ("CA", "CERTIFICATE", "KEY"):
        del configured(m, "generator")[f"{TRITON}{name}_FILE"]


@breaks("encrypted")
def generator_that_shows_nothing(m: Manifests) -> None:
    for name in ("CERTIFICATE", "KEY"):
        del configured(m, "generator")[f"{TRITON}{name}_FILE"]


@breaks("encrypted")
def generator_that_fills_its_log(m: Manifests) -> None:
    (variable,) = (each for each in container(m, "generator")["env"] if each["name"] == "GRPC_VERBOSITY")
    variable["value"] = "INFO"


@breaks("encrypted", overlay="local-cpu")
def generator_alone_with_tls(m: Manifests) -> None:
    configured(m, "generator")[f"{TRITON}CA_FILE"] = "/etc/reimagen/triton/ca.crt"


@breaks("encrypted")
def triton_in_the_clear(m: Manifests) -> None:
    without(container(m, "triton-unet-256")["args"], "--grpc-use-ssl")


@breaks("encrypted")
def mutual_alone(m: Manifests) -> None:
    without(container(m, "triton-unet-1024")["args"], "--grpc-use-ssl=")


@breaks("encrypted")
def triton_without_a_key(m: Manifests) -> None:
    without(container(m, "triton")["args"], "--grpc-server-key=")


@breaks("encrypted")
def triton_that_knows_no_authority(m: Manifests) -> None:
    without(container(m, "triton")["args"], "--grpc-root-cert=")


@breaks("encrypted")
def readiness_by_kubernetes(m: Manifests) -> None:
    container(m, "triton")["readinessProbe"] = {"grpc": {"port": 8001}, "timeoutSeconds": 5}


@breaks("encrypted")
def readiness_of_the_generator_by_kubernetes(m: Manifests) -> None:
    container(m, "generator")["readinessProbe"] = {"grpc": {"port": 50052, "service": "readiness"}, "timeoutSeconds": 5}


@breaks("encrypted")
def canary_in_the_clear(m: Manifests) -> None:
    without(probed(m, "livenessProbe"), "--tls")


@breaks("encrypted")
def canary_that_shows_nothing(m: Manifests) -> None:
    without(probed(m, "livenessProbe"), "--tls-certificate-file", "--tls-key-file")


@breaks("encrypted")
def readiness_by_number(m: Manifests) -> None:
    words = probed(m, "readinessProbe")
    words[words.index("--address=localhost:8001")] = "--address=127.0.0.1:8001"


@breaks("encrypted")
def balanced_in_the_clear(m: Manifests) -> None:
    named(m, "Service", "triton-unet-256")["spec"]["ports"][0]["appProtocol"] = "kubernetes.io/h2c"


@breaks("encrypted")
def retrieval_asked_in_the_clear(m: Manifests) -> None:
    del configured(m, "generator")["REIMAGEN_GENERATOR_RETRIEVAL_CA_FILE"]


@breaks("mounted")
def certificate_of_nobody(m: Manifests) -> None:
    container(m, "generator")["volumeMounts"].remove(mount(container(m, "generator"), "triton-client"))


@breaks("mounted")
def certificate_elsewhere(m: Manifests) -> None:
    mount(container(m, "triton"), "tls")["mountPath"] = "/etc/reimagen/certificates"


@breaks("mounted")
def authority_alone(m: Manifests) -> None:
    (volume,) = (each for each in pod(m, "generator")["volumes"] if each["name"] == "triton-client")
    volume["secret"]["items"] = [{"key": "ca.crt", "path": "ca.crt"}]
