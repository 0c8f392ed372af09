"""Network policies as a cluster would read them, held against the connections that the stack makes.

Of https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that no policy of a direction selects may do
everything in that direction; one that some select may do what any of these allows. A connection needs both ends' consent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, product

from tests.deploy.k8s.connections import API_SERVER, CLIENT, DNS, OBJECT_STORE, PROMETHEUS, connections
from tests.deploy.k8s.rendering import NAMESPACE, Manifest, Manifests, of_kind, pods, selects, train_job_pods
from trainer.service.kubernetes_manifests import METRICS_PORT

STRANGER, NEIGHBOR_STRANGER, INTERNET = "stranger", "stranger in the namespace", "internet"
RUNS = "reimagen-training"
# Prometheus may scrape where no operator is told to: overlays differ by monitors, not by policies.
SCRAPED = {"retrieval": 9101, "generator": 9102, "trainer": 9103, "triton": 8002, "qdrant": 6333, RUNS: METRICS_PORT}
OTHER_PORTS = (22, 80, 443, 5432, 6333, 6443, 8000, 8080, 29500)


@dataclass(frozen=True)
class Party:
    """Whoever may be an end of a connection. One without a namespace is no pod: policies know it by its address alone."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    namespace_labels: dict[str, str] = field(default_factory=dict)


def _namespace(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name, **labels}


OUTSIDE = [
    Party(CLIENT, {}, "shop", _namespace("shop", **{"reimagen/client": "true"})),
    Party(PROMETHEUS, {"app.kubernetes.io/name": "prometheus"}, "monitoring", _namespace("monitoring")),
    Party(DNS, {"k8s-app": "kube-dns"}, "kube-system", _namespace("kube-system")),
    Party(STRANGER, {"app.kubernetes.io/name": "prometheus"}, "shop-two", _namespace("shop-two")),
    Party(NEIGHBOR_STRANGER, {"app.kubernetes.io/name": "shell"}, NAMESPACE, _namespace(NAMESPACE)),
    Party(API_SERVER),
    Party(OBJECT_STORE),
    Party(INTERNET),
]


def reachable(manifests: Manifests) -> Iterator[str]:
    """Every connection that the stack makes is allowed, at both ends."""
    known, policies = parties(manifests), of_kind(manifests, "NetworkPolicy")
    for made in sorted(set(connections(manifests)), key=str):
        protocols = ("UDP", "TCP") if made.target == DNS else ("TCP",)
        for protocol in protocols:
            ends = known[made.source], known[made.target]
            if not (
                may_send(policies, *ends, made.port, protocol) and may_receive(policies, *ends, made.port, protocol)
            ):
                yield f"{made.source} cannot reach {made.target}:{made.port} ({made.code})"


def closed(manifests: Manifests) -> Iterator[str]:
    """Nothing else is, at either end: of all pairs of pods and outsiders, and all ports that anything listens on."""
    known, policies = parties(manifests), of_kind(manifests, "NetworkPolicy")
    made = {(each.source, each.target, each.port) for each in connections(manifests)}
    made |= {(PROMETHEUS, party.name, SCRAPED[job]) for party in known.values() if (job := _job(party)) in SCRAPED}
    listened = {int(p["containerPort"]) for pod in pods(manifests) for c in pod.containers for p in c.get("ports", ())}
    for source, target in product(known.values(), repeat=2):
        for port in sorted({*listened, *OTHER_PORTS, 53}):
            ends = [API_SERVER, OBJECT_STORE] if not target.namespace else [target.name]  # by their ports alone
            if any((source.name, end, port) in made for end in ends) or _is_known(source, target, port):
                continue
            if source.namespace == NAMESPACE and may_send(policies, source, target, port):
                yield f"{source.name} may send to {target.name}:{port}"
            if target.namespace == NAMESPACE and may_receive(policies, source, target, port):
                yield f"{target.name}:{port} may receive from {source.name}"


def parties(manifests: Manifests) -> dict[str, Party]:
    """Pods and outsiders by name."""
    found = chain(pods(manifests), train_job_pods(manifests))
    own = [Party(pod.owner, pod.labels, NAMESPACE, _namespace(NAMESPACE)) for pod in found]
    return {party.name: party for party in [*own, *OUTSIDE]}


def may_send(policies: Manifests, source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of whoever begins a connection let it go out."""
    return _consents(policies, source, target, port, protocol, ("Egress", "egress", "to"))


def may_receive(policies: Manifests, source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies of whoever takes a connection let it come in."""
    return _consents(policies, target, source, port, protocol, ("Ingress", "ingress", "from"))


def _consents(
    policies: Manifests, own: Party, other: Party, port: int, protocol: str, direction: tuple[str, str, str]
) -> bool:
    kind, rules, peers = direction
    if own.namespace != NAMESPACE:
        return True  # its policies are not ours
    selecting = [p["spec"] for p in policies if kind in p["spec"]["policyTypes"] and _selects(p["spec"], own)]
    if not selecting:
        return True
    return any(
        _names(rule.get(peers), other) and _opens(rule.get("ports"), port, protocol)
        for spec in selecting
        for rule in spec.get(rules) or ()
    )


def _selects(spec: Manifest, party: Party) -> bool:
    return selects(spec["podSelector"], party.labels)


def _names(peers: list[Manifest] | None, party: Party) -> bool:
    return not peers or any(_is_peer(peer, party) for peer in peers)


def _is_peer(peer: Manifest, party: Party) -> bool:
    if "ipBlock" in peer:
        return not party.namespace
    if not party.namespace:
        return False
    if "namespaceSelector" in peer:
        if not selects(peer["namespaceSelector"], party.namespace_labels):
            return False
    elif party.namespace != NAMESPACE:
        return False
    return selects(peer.get("podSelector", {}), party.labels)


def _opens(ports: list[Manifest] | None, port: int, protocol: str) -> bool:
    return not ports or any(each["port"] == port and each.get("protocol", "TCP") == protocol for each in ports)


def _is_known(source: Party, target: Party, port: int) -> bool:
    """What is open on purpose beside the list: ranks of trainings take any port among them, names are asked by all."""
    if _is_rank(source) and _is_rank(target):
        return True
    return target.name == DNS and port == 53


def _is_rank(party: Party) -> bool:
    return party.labels.get("app.kubernetes.io/name") == RUNS or party.name.startswith("TrainJob/")


def _job(party: Party) -> str:
    return RUNS if _is_rank(party) else party.labels.get("app.kubernetes.io/name", "")
