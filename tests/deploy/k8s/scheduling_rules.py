"""Rules about where pods run, how many, and in which order: GPUs, rollouts, spreading, priorities, images, Jobs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from tests.deploy.k8s.rendering import Manifest, Manifests, Pod, is_run, named, of_kind, pods
from trainer.service.kubernetes_manifests import QUEUE_LABEL

GPU = "nvidia.com/gpu"
INDEXED_S = 3 * 3600  # in which a pod may make its indexes anew
DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
HANDED_ON = {  # what one Job leaves and the next takes, by flag
    "knowledge-base": ("import", "corpus", "knn", "knn-merge"),
    "corpus": ("corpus", "prepare", "knn", "knn-merge"),
    "data": ("prepare", "knn", "knn-merge", "train"),
    "preset": ("prepare", "train"),
    "k": ("knn", "knn-merge"),
}
LOCAL = re.compile(r"(reimagen/\w+|qdrant/qdrant):[\w.-]+")


def gpus(manifests: Manifests) -> Iterator[str]:
    """Who has a GPU goes to nodes that have whole ones, past their taint; who has none does not."""
    for pod in pods(manifests):
        wants = any(GPU in container.get("resources", {}).get("limits", {}) for container in pod.containers)
        chosen = pod.spec.get("nodeSelector", {})
        tolerates = any(each.get("key") == GPU for each in pod.spec.get("tolerations", ()))
        if is_run(pod.name):
            continue  # the trainer's settings choose no nodes
        if wants and (chosen.get("nvidia.com/gpu.present"), chosen.get("nvidia.com/gpu.sharing-strategy")) != (
            "true",
            "none",
        ):
            yield f"{pod.owner}: has a GPU, and chooses no node with whole ones"
        if wants != tolerates or (chosen and not wants):
            yield f"{pod.owner}: GPU {wants}, toleration {tolerates}, nodes {chosen}"


def rollouts(manifests: Manifests) -> Iterator[str]:
    """A pool of GPUs has none to spare: an old pod goes first. Elsewhere the new one comes first. Nobody is told
    that a rollout has failed while its pods are let take their time."""
    yield from _impatient(manifests)
    for deployment in of_kind(manifests, "Deployment"):
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        (pod,) = (pod for pod in pods(manifests) if pod.owner == f"Deployment/{name}")
        has_gpu = any(GPU in container["resources"]["limits"] for container in pod.containers)
        found = spec["strategy"].get("rollingUpdate")
        if spec["strategy"].get("type") == "Recreate":
            if spec["replicas"] != 1:
                yield f"{pod.owner}: is made anew, and there are {spec['replicas']}"
        elif found != {"maxSurge": 0 if has_gpu else 1, "maxUnavailable": 1 if has_gpu else 0}:
            yield f"{pod.owner}: rolls out by {found}"


def _impatient(manifests: Manifests) -> Iterator[str]:
    """Deployments that are given up before their pods, or those that these wait for, may be ready."""
    patience = {
        m["metadata"]["name"]: m["spec"].get("progressDeadlineSeconds", 600) for m in of_kind(manifests, "Deployment")
    }
    for pod in (pod for pod in pods(manifests) if pod.owner.startswith("Deployment/")):
        probe = pod.spec["containers"][0]["startupProbe"]
        least = probe["periodSeconds"] * probe["failureThreshold"]
        if any("ephemeral" in volume for volume in pod.spec["volumes"]):
            least = INDEXED_S
        if pod.name == "generator":
            least = max(patience[name] for name in patience if name.startswith("triton"))
        if patience[pod.name] <= least:
            yield f"{pod.owner}: is given up after {patience[pod.name]} s, and may take {least}"


def disruptions(manifests: Manifests) -> Iterator[str]:
    """What has two and more loses one at a time, by will of the cluster; what has one is no obstacle to its node's end."""
    budgets = of_kind(manifests, "PodDisruptionBudget")
    for pod in _serving(manifests):
        own = [b["spec"] for b in budgets if b["spec"]["selector"]["matchLabels"].items() <= pod.labels.items()]
        if pod.replicas == 1 and own:
            yield f"{pod.owner}: a budget for one pod"
        if pod.replicas > 1 and [(b["maxUnavailable"], b["unhealthyPodEvictionPolicy"]) for b in own] != [
            (1, "AlwaysAllow")
        ]:
            yield f"{pod.owner}: has {pod.replicas} pods, and budgets {own}"


def spreading(manifests: Manifests) -> Iterator[str]:
    """Pods of one workload keep to different nodes, and to different zones where there are some."""
    for pod in _serving(manifests):
        own = [c for c in pod.spec.get("topologySpreadConstraints", ()) if _is_own(c["labelSelector"], pod)]
        apart = pod.spec.get("affinity", {}).get("podAntiAffinity", {})
        apart = apart.get("requiredDuringSchedulingIgnoredDuringExecution", ())
        hosts = [each["topologyKey"] for each in [*own, *(a for a in apart if _is_own(a["labelSelector"], pod))]]
        if pod.replicas > 1 and "kubernetes.io/hostname" not in hosts:
            yield f"{pod.owner}: its {pod.replicas} pods may all be on one node"
        if any(c["whenUnsatisfiable"] == "DoNotSchedule" and c.get("nodeTaintsPolicy") != "Honor" for c in own):
            yield f"{pod.owner}: nodes that let none of its pods in keep every other node to one"
        zones = [each for each in own if each["topologyKey"] == "topology.kubernetes.io/zone"]
        if pod.replicas > 1 and [each["whenUnsatisfiable"] for each in zones] != ["ScheduleAnyway"]:
            yield f"{pod.owner}: its {pod.replicas} pods may all be in one zone, or wait for another"


def autoscaling(manifests: Manifests) -> Iterator[str]:
    """What an autoscaler counts no manifest sets: each apply would undo it. One a workload; down slowly, never to nothing."""
    scalers = of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
    counted = Counter(scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers)
    yield from (f"{target}: is scaled by {number}" for target, number in counted.items() if number > 1)
    for scaler in scalers:
        target, spec = scaler["spec"]["scaleTargetRef"]["name"], scaler["spec"]
        if "replicas" in named(manifests, "Deployment", target)["spec"]:
            yield f"{target}: its replicas are set, and scaled"
        least = spec.get("minReplicas", spec.get("minReplicaCount", 0))
        most = spec.get("maxReplicas", spec.get("maxReplicaCount", 0))
        if not 1 <= least < most:
            yield f"{target}: {least} to {most} replicas"
        config = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", spec)
        if config["behavior"]["scaleDown"]["stabilizationWindowSeconds"] < 300:
            yield f"{target}: is scaled down in haste"
        if scaler["kind"] == "ScaledObject":
            yield from _demand(target, spec, least, most)


def _demand(target: str, spec: Manifest, least: int, most: int) -> Iterator[str]:
    """What is asked of Prometheus has an answer, or else there are as many as before, and enough."""
    fallback = spec.get("fallback", {})
    if not least <= fallback.get("replicas", 0) <= most or fallback.get("behavior") != "currentReplicasIfHigher":
        yield f"{target}: falls back to {fallback}"
    asked = [trigger["metadata"] for trigger in spec["triggers"] if trigger["type"] == "prometheus"]
    if not asked:
        yield f"{target}: is not scaled by demand"
    for metadata in asked:
        if metadata.get("ignoreNullValues") != "false" or " or 0 * sum(up{" not in metadata["query"]:
            yield f"{target}: takes no answer for no demand"
        if float(metadata.get("activationThreshold", 0)) <= 0 or float(metadata["threshold"]) <= 0:
            yield f"{target}: thresholds of {metadata['query']}"


def priorities(manifests: Manifests) -> Iterator[str]:
    """Serving before indexing before training."""
    value = {each["metadata"]["name"]: each["value"] for each in of_kind(manifests, "PriorityClass")}
    if not value["reimagen-serving"] > value["reimagen-indexing"] > value["reimagen-training"] > 0:
        yield f"PriorityClass: {value}"
    for pod in pods(manifests):
        kind = pod.owner.split("/")[0]
        wanted = "reimagen-serving" if kind in ("Deployment", "StatefulSet") else "reimagen-indexing"
        if is_run(pod.name) or pod.name == "train":
            wanted = "reimagen-training"
        if pod.spec.get("priorityClassName") != wanted:
            yield f"{pod.owner}: is {pod.spec.get('priorityClassName')}, not {wanted}"


def queues(manifests: Manifests) -> Iterator[str]:
    """Where trainings queue all of them do, in a queue that is there."""
    there = {each["metadata"]["name"] for each in of_kind(manifests, "LocalQueue")}
    for job in of_kind(manifests, "Job", "TrainJob"):
        name, queue = job["metadata"]["name"], job["metadata"]["labels"].get(QUEUE_LABEL)
        trains = is_run(name) or name == "train"
        if (queue is not None) != (trains and bool(there)) or (queue and queue not in there):
            yield f"{job['kind']}/{name}: queue {queue}, of {sorted(there)}"


def images(manifests: Manifests) -> Iterator[str]:
    """Released images by digest, all of them or none; trainings run the image of the trainer's service."""
    found: dict[str, str] = {}
    for pod in pods(manifests):
        found |= {f"{pod.owner} {container['name']}": container["image"] for container in pod.containers}
        found |= {
            f"{pod.owner} {v['name']}": v["image"]["reference"] for v in pod.spec.get("volumes", ()) if "image" in v
        }
    pattern = DIGEST if any(DIGEST.fullmatch(image) for image in found.values()) else LOCAL
    yield from (f"{place}: {image}" for place, image in found.items() if not pattern.fullmatch(image))
    own = found["Deployment/trainer trainer"]
    for pod in pods(manifests):
        if is_run(pod.name) and pod.containers[0]["image"] != own:
            yield f"{pod.owner}: runs {pod.containers[0]['image']}"


def shards(manifests: Manifests) -> Iterator[str]:
    """Each shard of the neighbors has a pod of its own, and those who merge them know how many there are."""
    job = named(manifests, "Job", "knn")["spec"]
    asked, merged = (_shards(named(manifests, "Job", name)) for name in ("knn", "knn-merge"))
    if job["completionMode"] != "Indexed" or not job["completions"] == asked == merged:
        yield f"Job/knn: {job['completions']} pods for {asked} shards, of which {merged} are merged"


def handed_on(manifests: Manifests) -> Iterator[str]:
    """From pictures to a run each Job reads what the one before it wrote."""
    for flag, jobs in HANDED_ON.items():
        values = {name: _given(named(manifests, "Job", name), flag) for name in jobs}
        if len(set(values.values())) != 1 or None in values.values():
            yield f"--{flag}: {values}"


def headless(manifests: Manifests) -> Iterator[str]:
    """Calls over gRPC are balanced by callers, who have to see the pods: one virtual address would pin each to one pod."""
    for name in ("retrieval", "generator", "trainer", "triton", "qdrant-peers"):
        if named(manifests, "Service", name)["spec"].get("clusterIP") != "None":
            yield f"Service/{name}: hides its pods"


def _shards(job: Manifest) -> int:
    return int(_given(job, "shards") or 1)


def _given(job: Manifest, flag: str) -> str | None:
    """What a Job's command is told by a flag."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return dict(word.removeprefix("--").partition("=")[::2] for word in container["args"]).get(flag)


def _serving(manifests: Manifests) -> Iterator[Pod]:
    return (pod for pod in pods(manifests) if pod.owner.split("/")[0] in ("Deployment", "StatefulSet"))


def _is_own(selector: Manifest, pod: Pod) -> bool:
    return selector["matchLabels"].items() <= pod.labels.items()
