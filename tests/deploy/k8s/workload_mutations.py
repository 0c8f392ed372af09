"""More of `mutations.py`: what breaks the rules about references, probes, ends, GPUs, rollouts and numbers."""

from __future__ import annotations

from tests.deploy.k8s.mutations import breaks, configured, container, deployment, pod
from tests.deploy.k8s.rendering import Manifests, named


@breaks("references")
def lost_configuration(m: Manifests) -> None:
    container(m, "generator")["envFrom"][0]["configMapRef"]["name"] = "generator-settings"


@breaks("references")
def lost_claim(m: Manifests) -> None:
    named(m, "PersistentVolumeClaim", "pictures")["metadata"]["name"] = "images"


@breaks("references")
def lost_account(m: Manifests) -> None:
    pod(m, "knn", "Job")["serviceAccountName"] = "knn"


@breaks("references", overlay="local-cpu")
def lost_port_of_a_probe(m: Manifests) -> None:
    container(m, "triton")["readinessProbe"]["grpc"]["port"] = 8003


@breaks("references")
def lost_port_of_the_canary(m: Manifests) -> None:
    command = container(m, "triton")["livenessProbe"]["exec"]["command"]
    command[command.index("--address=localhost:8001")] = "--address=localhost:8000"


@breaks("references")
def service_of_nobody(m: Manifests) -> None:
    named(m, "Service", "triton-unet-256")["spec"]["selector"]["app.kubernetes.io/component"] = "unet-265"


@breaks("references")
def lost_target_port(m: Manifests) -> None:
    named(m, "Service", "generator")["spec"]["ports"][0]["targetPort"] = "http"


@breaks("references")
def volume_mounted_by_nobody(m: Manifests) -> None:
    container(m, "generator")["volumeMounts"] = []


@breaks("references")
def budget_of_nobody(m: Manifests) -> None:
    named(m, "PodDisruptionBudget", "qdrant")["spec"]["selector"]["matchLabels"] = {"app": "qdrant"}


@breaks("references")
def monitor_of_nobody(m: Manifests) -> None:
    named(m, "ServiceMonitor", "trainer")["spec"]["endpoints"][0]["port"] = "prometheus"


@breaks("references")
def monitor_of_another_exporter(m: Manifests) -> None:
    named(m, "ServiceMonitor", "gpus")["spec"]["endpoints"][0]["port"] = "metrics"


@breaks("references")
def exporter_looked_for_among_ours(m: Manifests) -> None:
    del named(m, "ServiceMonitor", "gpus")["spec"]["namespaceSelector"]


@breaks("references")
def autoscaler_of_nobody(m: Manifests) -> None:
    named(m, "ScaledObject", "retrieval")["spec"]["scaleTargetRef"]["kind"] = "StatefulSet"


@breaks("references")
def lost_peers(m: Manifests) -> None:
    named(m, "StatefulSet", "qdrant")["spec"]["serviceName"] = "qdrant-headless"


@breaks("listening")
def run_that_tells_elsewhere(m: Manifests) -> None:
    container(m, "train", "Job")["ports"][0]["containerPort"] = 9400


@breaks("scraping")
def run_that_nobody_asks(m: Manifests) -> None:
    m.remove(named(m, "PodMonitor", "training"))


@breaks("scraping")
def run_that_tells_nothing(m: Manifests) -> None:
    container(m, "reimagen-many-1", "Job")["args"].pop()


@breaks("scraping")
def ranks_that_do_not_listen(m: Manifests) -> None:
    del named(m, "PodMonitor", "training")["spec"]["selector"]["matchLabels"][
        "batch.kubernetes.io/job-completion-index"
    ]


@breaks("scraping")
def train_jobs_asked_at_another_port(m: Manifests) -> None:
    for rule in named(m, "PodMonitor", "train-jobs")["spec"]["podMetricsEndpoints"][0]["relabelings"]:
        if "replacement" in rule:
            rule["replacement"] = rule["replacement"].replace("9104", "29500")


@breaks("scraping")
def sidecars_asked_as_well(m: Manifests) -> None:
    rules = named(m, "PodMonitor", "train-jobs")["spec"]["podMetricsEndpoints"][0]["relabelings"]
    rules[:] = [rule for rule in rules if rule.get("action") != "keep"]


@breaks("scraping")
def nobody_is_kept(m: Manifests) -> None:
    rules = named(m, "PodMonitor", "train-jobs")["spec"]["podMetricsEndpoints"][0]["relabelings"]
    (kept,) = (rule for rule in rules if rule.get("action") == "keep")
    kept["regex"] = "trainer"


@breaks("scraping")
def asked_twice(m: Manifests) -> None:
    named(m, "PodMonitor", "train-jobs")["spec"]["selector"] = {
        "matchLabels": {"batch.kubernetes.io/job-completion-index": "0"}
    }


@breaks("scraping")
def lost_port_of_a_monitor(m: Manifests) -> None:
    named(m, "PodMonitor", "triton")["spec"]["podMetricsEndpoints"][0]["port"] = "http"


@breaks("written")
def report_in_the_working_folder(m: Manifests) -> None:
    arguments = container(m, "import", "Job")["args"]
    arguments[:] = [word for word in arguments if not word.startswith("--report=")]


@breaks("written")
def snapshots_that_can_only_be_read(m: Manifests) -> None:
    spec = named(m, "CronJob", "snapshots")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (mount,) = (mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == "snapshots")
    mount["readOnly"] = True


@breaks("probes")
def no_liveness(m: Manifests) -> None:
    del container(m, "retrieval")["livenessProbe"]


@breaks("probes")
def health_of_triton_alone(m: Manifests) -> None:
    container(m, "triton-unet-256")["livenessProbe"] = {"grpc": {"port": 8001}, "timeoutSeconds": 5}


@breaks("probes")
def a_second_at_most(m: Manifests) -> None:
    del container(m, "qdrant", "StatefulSet")["readinessProbe"]["timeoutSeconds"]


@breaks("probes")
def liveness_by_dependencies(m: Manifests) -> None:
    probe = {"grpc": {"port": 50052, "service": "readiness"}, "timeoutSeconds": 5}
    container(m, "generator")["livenessProbe"] = probe


@breaks("grace")
def killed_while_it_draws(m: Manifests) -> None:
    pod(m, "generator")["terminationGracePeriodSeconds"] = 60


@breaks("grace")
def default_grace(m: Manifests) -> None:
    pod(m, "triton")["terminationGracePeriodSeconds"] = 30


@breaks("grace")
def stages_cut_short(m: Manifests) -> None:
    arguments = container(m, "triton")["args"]
    arguments[arguments.index("--exit-timeout-secs=120")] = "--exit-timeout-secs=30"


@breaks("grace")
def pictures_without_a_bound(m: Manifests) -> None:
    configured(m, "generator")["REIMAGEN_GENERATOR_MAX_DEADLINE_S"] = "0"


@breaks("grace")
def longer_pictures(m: Manifests) -> None:
    configured(m, "generator")["REIMAGEN_GENERATOR_MAX_DEADLINE_S"] = "600"


@breaks("grace")
def longer_drain(m: Manifests) -> None:
    configured(m, "retrieval")["REIMAGEN_RETRIEVAL_DRAIN_DELAY_S"] = "20"


@breaks("grace")
def no_pre_stop(m: Manifests) -> None:
    del container(m, "trainer")["lifecycle"]


@breaks("gpus")
def any_node(m: Manifests) -> None:
    del pod(m, "triton")["nodeSelector"]


@breaks("gpus")
def shared_gpus(m: Manifests) -> None:
    pod(m, "triton")["nodeSelector"]["nvidia.com/gpu.sharing-strategy"] = "time-slicing"


@breaks("gpus")
def tainted_nodes(m: Manifests) -> None:
    del pod(m, "triton-unet-1024")["tolerations"]


@breaks("gpus")
def gpu_nodes_without_a_gpu(m: Manifests) -> None:
    pod(m, "generator")["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]


@breaks("rollouts")
def a_spare_gpu(m: Manifests) -> None:
    deployment(m, "triton")["strategy"]["rollingUpdate"] = {"maxSurge": 1, "maxUnavailable": 0}


@breaks("rollouts")
def one_less(m: Manifests) -> None:
    deployment(m, "retrieval")["strategy"]["rollingUpdate"] = {"maxSurge": 0, "maxUnavailable": 1}


@breaks("rollouts")
def two_trainers(m: Manifests) -> None:
    deployment(m, "trainer")["replicas"] = 2


@breaks("rollouts")
def given_up_while_it_indexes(m: Manifests) -> None:
    del named(m, "Deployment", "retrieval")["spec"]["progressDeadlineSeconds"]


@breaks("rollouts")
def given_up_while_it_waits_for_tritons(m: Manifests) -> None:
    named(m, "Deployment", "generator")["spec"]["progressDeadlineSeconds"] = 1800


@breaks("rollouts")
def given_up_while_it_starts(m: Manifests) -> None:
    named(m, "Deployment", "triton")["spec"]["progressDeadlineSeconds"] = 600


@breaks("disruptions")
def no_budget(m: Manifests) -> None:
    m.remove(named(m, "PodDisruptionBudget", "generator"))


@breaks("disruptions")
def sick_pods_that_stay(m: Manifests) -> None:
    del named(m, "PodDisruptionBudget", "qdrant")["spec"]["unhealthyPodEvictionPolicy"]
    named(m, "PodDisruptionBudget", "qdrant")["spec"]["unhealthyPodEvictionPolicy"] = "IfHealthyBudget"


@breaks("disruptions")
def node_that_never_ends(m: Manifests) -> None:
    named(m, "PodDisruptionBudget", "triton")["spec"]["selector"]["matchLabels"] = {
        "app.kubernetes.io/name": "triton",
        "app.kubernetes.io/component": "unet-256",
    }


@breaks("spreading")
def all_on_one_node(m: Manifests) -> None:
    pod(m, "generator")["topologySpreadConstraints"].pop()


@breaks("spreading")
def nodes_of_gpus_count(m: Manifests) -> None:
    del pod(m, "retrieval")["topologySpreadConstraints"][1]["nodeTaintsPolicy"]


@breaks("spreading")
def all_in_one_zone(m: Manifests) -> None:
    pod(m, "triton")["topologySpreadConstraints"].pop(0)


@breaks("spreading")
def zones_that_pods_wait_for(m: Manifests) -> None:
    pod(m, "retrieval")["topologySpreadConstraints"][0]["whenUnsatisfiable"] = "DoNotSchedule"


@breaks("spreading")
def peers_on_one_node(m: Manifests) -> None:
    del pod(m, "qdrant", "StatefulSet")["affinity"]


@breaks("priorities")
def training_first(m: Manifests) -> None:
    named(m, "PriorityClass", "reimagen-training")["value"] = 1_000_000


@breaks("priorities")
def no_priority(m: Manifests) -> None:
    del pod(m, "generator")["priorityClassName"]


@breaks("queues")
def past_the_queue(m: Manifests) -> None:
    del named(m, "Job", "train")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


@breaks("queues")
def lost_queue(m: Manifests) -> None:
    named(m, "LocalQueue", "training")["metadata"]["name"] = "trainings"


@breaks("images")
def image_by_tag(m: Manifests) -> None:
    container(m, "generator")["image"] = "registry.example.com/reimagen/generator:latest"


@breaks("images")
def models_by_tag(m: Manifests) -> None:
    pod(m, "triton")["volumes"][0]["image"]["reference"] = "registry.example.com/reimagen/models:1"


@breaks("images")
def trainings_of_another_image(m: Manifests) -> None:
    container(m, "reimagen-one-1", "Job")["image"] = f"registry.example.com/old@sha256:{'1' * 64}"


@breaks("shards")
def a_shard_too_few(m: Manifests) -> None:
    named(m, "Job", "knn")["spec"]["completions"] = 15


@breaks("shards")
def merged_otherwise(m: Manifests) -> None:
    arguments = container(m, "knn-merge", "Job")["args"]
    arguments[arguments.index("--shards=16")] = "--shards=8"


@breaks("handed_on")
def neighbors_of_whatever_there_is(m: Manifests) -> None:
    container(m, "knn", "Job")["args"].remove("--knowledge-base=demo")


@breaks("handed_on")
def prepared_elsewhere(m: Manifests) -> None:
    arguments = container(m, "prepare", "Job")["args"]
    arguments[arguments.index("--data=/srv/reimagen/data/demo")] = "--data=/srv/reimagen/data/another"


@breaks("headless")
def one_address(m: Manifests) -> None:
    del named(m, "Service", "retrieval")["spec"]["clusterIP"]
