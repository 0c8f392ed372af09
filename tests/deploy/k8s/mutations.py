"""For each rule manifests that break it: one change each to a stack that keeps all rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.deploy.k8s.rendering import Manifest, Manifests, named

Change = Callable[[Manifests], object]


@dataclass(frozen=True)
class Mutation:
    """`change` breaks the rule of this name, in what an overlay gives."""

    rule: str
    name: str
    change: Change
    overlay: str


MUTATIONS: list[Mutation] = []


def breaks(rule: str, *, overlay: str = "gpu-ha") -> Callable[[Change], Change]:
    """The function under this breaks the rule."""

    def note(change: Change) -> Change:
        MUTATIONS.append(Mutation(rule, f"{rule}-{getattr(change, '__name__', '')}", change, overlay))
        return change

    return note


def deployment(manifests: Manifests, name: str) -> Manifest:
    """Its spec."""
    return named(manifests, "Deployment", name)["spec"]


def pod(manifests: Manifests, name: str, kind: str = "Deployment") -> Manifest:
    """The spec of its pods."""
    return named(manifests, kind, name)["spec"]["template"]["spec"]


def container(manifests: Manifests, name: str, kind: str = "Deployment") -> Manifest:
    """The first container of its pods."""
    return pod(manifests, name, kind)["containers"][0]


def policy(manifests: Manifests, name: str) -> Manifest:
    """A network policy's spec."""
    return named(manifests, "NetworkPolicy", name)["spec"]


def configured(manifests: Manifests, service: str) -> dict[str, str]:
    """A service's variables."""
    (found,) = (
        m["data"]
        for m in manifests
        if m["kind"] == "ConfigMap" and m["metadata"]["name"].startswith(f"{service}-settings")
    )
    return found


def variable(manifests: Manifests, name: str, value: str) -> None:
    """Give the generator's container one more."""
    container(manifests, "generator")["env"].append({"name": name, "value": value})


@breaks("schema")
def unknown_field(m: Manifests) -> None:
    container(m, "retrieval")["comand"] = []


@breaks("schema")
def unknown_field_of_a_monitor(m: Manifests) -> None:
    named(m, "ServiceMonitor", "retrieval")["spec"]["endpoints"][0]["intervall"] = "15s"


@breaks("schema")
def unknown_field_of_a_pod_monitor(m: Manifests) -> None:
    named(m, "PodMonitor", "triton")["spec"]["podMetricsEndpoint"] = []


@breaks("schema")
def rule_that_is_alert_and_record(m: Manifests) -> None:
    rules = named(m, "PrometheusRule", "serving")["spec"]["groups"][0]["rules"]
    next(rule for rule in rules if "alert" in rule)["record"] = "down"


@breaks("schema")
def wrong_type_of_a_scaled_object(m: Manifests) -> None:
    named(m, "ScaledObject", "triton")["spec"]["pollingInterval"] = "15s"


@breaks("schema")
def unknown_field_of_scaling(m: Manifests) -> None:
    scaled = named(m, "ScaledObject", "triton")["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    scaled["behavior"]["scaledown"] = {}


@breaks("schema")
def queue_without_a_cluster_queue(m: Manifests) -> None:
    del named(m, "LocalQueue", "training")["spec"]["clusterQueue"]


@breaks("schema")
def unknown_field_of_a_train_job(m: Manifests) -> None:
    named(m, "TrainJob", "reimagen-many-1")["spec"]["trainer"]["numNode"] = 2


@breaks("unique")
def two_of_one_name(m: Manifests) -> None:
    m.append(named(m, "Service", "retrieval"))


@breaks("unique")
def in_another_namespace(m: Manifests) -> None:
    named(m, "Service", "retrieval")["metadata"]["namespace"] = "default"


@breaks("restricted")
def not_enforced(m: Manifests) -> None:
    named(m, "Namespace", "reimagen")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce")


@breaks("restricted")
def root(m: Manifests) -> None:
    pod(m, "retrieval")["securityContext"]["runAsNonRoot"] = False


@breaks("restricted")
def root_by_number(m: Manifests) -> None:
    container(m, "retrieval")["securityContext"]["runAsUser"] = 0


@breaks("restricted")
def no_seccomp(m: Manifests) -> None:
    del pod(m, "qdrant", "StatefulSet")["securityContext"]["seccompProfile"]


@breaks("restricted")
def escalation(m: Manifests) -> None:
    del container(m, "triton")["securityContext"]["allowPrivilegeEscalation"]


@breaks("restricted")
def capability_kept(m: Manifests) -> None:
    container(m, "triton")["securityContext"]["capabilities"]["add"] = ["SYS_PTRACE"]


@breaks("restricted")
def host_ipc(m: Manifests) -> None:
    pod(m, "triton")["hostIPC"] = True


@breaks("restricted")
def host_path(m: Manifests) -> None:
    pod(m, "triton")["volumes"].append({"name": "models", "hostPath": {"path": "/models"}})


@breaks("restricted")
def host_port(m: Manifests) -> None:
    container(m, "generator")["ports"][0]["hostPort"] = 50052


@breaks("restricted")
def probe_of_another_host(m: Manifests) -> None:
    container(m, "qdrant", "StatefulSet")["readinessProbe"]["httpGet"]["host"] = "169.254.169.254"


@breaks("restricted")
def privileged_job(m: Manifests) -> None:
    container(m, "knn", "Job")["securityContext"]["privileged"] = True


@breaks("restricted")
def root_in_a_train_job(m: Manifests) -> None:
    (patch,) = named(m, "TrainJob", "reimagen-one-1")["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    job["template"]["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] = False


@breaks("hardened")
def root_that_can_be_written(m: Manifests) -> None:
    container(m, "triton")["securityContext"]["readOnlyRootFilesystem"] = False


@breaks("hardened")
def token(m: Manifests) -> None:
    del pod(m, "generator")["automountServiceAccountToken"]


@breaks("hardened")
def service_links(m: Manifests) -> None:
    del pod(m, "generator")["enableServiceLinks"]


@breaks("hardened")
def unbounded_scratch(m: Manifests) -> None:
    (scratch,) = (volume for volume in pod(m, "generator")["volumes"] if volume["name"] == "tmp")
    del scratch["emptyDir"]["sizeLimit"]


@breaks("resources")
def no_memory_limit(m: Manifests) -> None:
    del container(m, "retrieval")["resources"]["limits"]["memory"]


@breaks("resources")
def no_cpu_request(m: Manifests) -> None:
    del named(m, "CronJob", "snapshots")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0][
        "resources"
    ]["requests"]["cpu"]


@breaks("resources")
def half_a_gpu(m: Manifests) -> None:
    asked = container(m, "triton")["resources"]
    asked["requests"]["nvidia.com/gpu"] = asked["limits"]["nvidia.com/gpu"] = "0.5"


@breaks("resources")
def gpu_that_is_not_limited(m: Manifests) -> None:
    del container(m, "triton")["resources"]["limits"]["nvidia.com/gpu"]


@breaks("secrets")
def secret_written_out(m: Manifests) -> None:
    metadata = {"name": "api-keys", "namespace": "reimagen"}
    m.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"qdrant": "1234"}})


@breaks("secrets")
def key_as_a_variable(m: Manifests) -> None:
    variable(m, "REIMAGEN_API_KEY", "1234")


@breaks("secrets")
def key_in_the_configuration(m: Manifests) -> None:
    configured(m, "qdrant")["QDRANT__SERVICE__API_KEY"] = "1234"


@breaks("reachable")
def triton_takes_nobody(m: Manifests) -> None:
    policy(m, "triton")["ingress"] = []


@breaks("reachable")
def retrieval_may_not_ask_qdrant(m: Manifests) -> None:
    policy(m, "retrieval")["egress"] = []


@breaks("reachable")
def no_names(m: Manifests) -> None:
    policy(m, "dns")["egress"][0]["ports"].pop(0)


@breaks("reachable")
def peers_that_cannot_talk(m: Manifests) -> None:
    m.remove(named(m, "NetworkPolicy", "qdrant-peers"))


@breaks("reachable")
def moved_port(m: Manifests) -> None:
    policy(m, "generator")["egress"][1]["ports"][0]["port"] = 8000


@breaks("reachable")
def ranks_apart(m: Manifests) -> None:
    policy(m, "training")["ingress"] = []


@breaks("reachable")
def runs_that_prometheus_cannot_reach(m: Manifests) -> None:
    policy(m, "training")["ingress"].pop()


@breaks("closed")
def nothing_denied(m: Manifests) -> None:
    m.remove(named(m, "NetworkPolicy", "default-deny"))


@breaks("closed")
def anything_for_the_sake_of_names(m: Manifests) -> None:
    policy(m, "dns")["egress"] = [{}]


@breaks("closed")
def every_port_of_triton(m: Manifests) -> None:
    del policy(m, "triton")["ingress"][0]["ports"]


@breaks("closed")
def everybody_asks_qdrant(m: Manifests) -> None:
    policy(m, "qdrant")["ingress"][0]["from"] = [{"podSelector": {}}]


@breaks("closed")
def generator_to_the_internet(m: Manifests) -> None:
    policy(m, "generator")["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]})


@breaks("closed")
def every_port_of_a_run(m: Manifests) -> None:
    del policy(m, "training")["ingress"][1]["ports"]


@breaks("settings")
def unknown_setting(m: Manifests) -> None:
    variable(m, "REIMAGEN_GENERATOR_SLOT", "8")


@breaks("settings")
def value_that_cannot_be(m: Manifests) -> None:
    configured(m, "retrieval")["REIMAGEN_RETRIEVAL_QDRANT_WRITE_CONSISTENCY_FACTOR"] = "3"


@breaks("settings")
def setting_of_another_service(m: Manifests) -> None:
    variable(m, "REIMAGEN_RETRIEVAL_GRACE_S", "30")


@breaks("settings")
def missing_setting(m: Manifests) -> None:
    del configured(m, "trainer")["REIMAGEN_TRAINER_KUBERNETES_CLAIM"]


@breaks("settings")
def setting_of_nobody(m: Manifests) -> None:
    container(m, "triton")["env"].append({"name": "REIMAGEN_TRITON_ADDRESS", "value": "0.0.0.0"})


@breaks("configuration")
def that_changes(m: Manifests) -> None:
    del next(each for each in m if each.get("immutable"))["immutable"]


@breaks("configuration")
def of_nobody(m: Manifests) -> None:
    container(m, "generator")["envFrom"] = []


@breaks("listening")
def another_port(m: Manifests) -> None:
    configured(m, "retrieval")["REIMAGEN_RETRIEVAL_ADDRESS"] = "0.0.0.0:50052"


@breaks("listening")
def loopback_alone(m: Manifests) -> None:
    configured(m, "generator")["REIMAGEN_GENERATOR_ADDRESS"] = "127.0.0.1:50052"


@breaks("listening")
def metrics_elsewhere(m: Manifests) -> None:
    args: list[Any] = container(m, "triton")["args"]
    args[args.index("--metrics-port=8002")] = "--metrics-port=8003"
