"""What the autoscalers ask Prometheus, and what an autoscaler of Kubernetes makes of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from deploy.local.children import ROOT

SCALED_OBJECTS = sorted((ROOT / "deploy" / "k8s").glob("*/*/scaled-objects.yaml"))
TOLERANCE = 0.1  # an autoscaler leaves things as they are this near to the target


@dataclass(frozen=True)
class Demand:
    """One question to Prometheus: `workload` gets as many pods as leave each `threshold` of the answer."""

    workload: str
    name: str
    query: str
    threshold: float
    average: bool
    least: int
    most: int

    def replicas(self, answer: float, now: int) -> int:
        """As https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details counts.

        Of a mean the answer is for all pods together, otherwise the number of pods changes as answer and threshold differ.
        """
        ratio = answer / self.threshold / (now if self.average else 1)
        wanted = now if abs(ratio - 1) <= TOLERANCE else math.ceil(now * ratio - 1e-9)
        return min(max(wanted, self.least), self.most)


def demands() -> Iterator[Demand]:
    """Of all ScaledObjects, what they ask Prometheus."""
    assert len(SCALED_OBJECTS) == 2, "of components/keda, and of the stages by themselves in gpu-ha"
    for scaled in (each for path in SCALED_OBJECTS for each in yaml.safe_load_all(path.read_text())):
        spec: dict[str, Any] = scaled["spec"]
        for trigger in spec["triggers"]:
            if trigger["type"] == "prometheus":
                yield Demand(
                    workload=spec["scaleTargetRef"]["name"],
                    name=trigger["name"],
                    query=trigger["metadata"]["query"],
                    threshold=float(trigger["metadata"]["threshold"]),
                    average=trigger["metricType"] == "AverageValue",
                    least=spec["minReplicaCount"],
                    most=spec["maxReplicaCount"],
                )
