"""What cannot run on one machine without a GPU, a cluster and Qdrant's server: made-up figures under the exporters' own names.

The names and labels are those of dcgm-exporter 4 before 4.8.3 (`etc/default-counters.csv`), Qdrant 1.19 (`src/common/metrics`),
kube-state-metrics 2 and the kubelet; the values are invented, and say nothing of any device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Labels = dict[str, str]
Value = Callable[[float, int], float]  # of the seconds since the start, and of the number of the series
BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)


def stand_ins() -> dict[str, CollectorRegistry]:
    """A registry for each job that is made up."""
    made: dict[str, Sequence[_Row]] = {"dcgm-exporter": DCGM, "qdrant": QDRANT, "kube-state-metrics": KUBERNETES}
    registries = {}
    for job, rows in made.items():
        registries[job] = CollectorRegistry()
        registries[job].register(_MadeUp(rows))
    return registries


class _Row:
    """A gauge or a counter, its series, and its value."""

    def __init__(self, name: str, series: Sequence[Labels], value: Value, *, kind: str = "gauge") -> None:
        self.name, self.series, self.value, self.kind = name, series, value, kind

    def family(self, elapsed_s: float) -> Metric:
        """What is exported now."""
        labels = list(self.series[0])
        if self.kind == "histogram":
            return self._histogram(labels, elapsed_s)
        family = (CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily)(
            self.name, "Made up.", labels=labels
        )
        for number, each in enumerate(self.series):
            family.add_metric(list(each.values()), self.value(elapsed_s, number))
        if self.kind == "counter" and not self.name.endswith("_total"):  # NVIDIA's counters lack the ending
            for number, sample in enumerate(family.samples):
                family.samples[number] = sample._replace(name=self.name)
        return family

    def _histogram(self, labels: list[str], elapsed_s: float) -> Metric:
        family = HistogramMetricFamily(self.name, "Made up.", labels=labels)
        for number, each in enumerate(self.series):
            count = self.value(elapsed_s, number)
            shares = [1 - math.exp(-bound / (0.004 * (1 + number))) for bound in BUCKETS_S]
            buckets = [
                (f"{bound:g}", math.floor(share * count)) for bound, share in zip(BUCKETS_S, shares, strict=True)
            ]
            family.add_metric(list(each.values()), [*buckets, ("+Inf", count)], sum_value=0.006 * count)
        return family


class _MadeUp(Collector):
    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows, self._start = rows, time.monotonic()

    def collect(self) -> Iterator[Metric]:
        elapsed_s = time.monotonic() - self._start
        for row in self._rows:
            yield row.family(elapsed_s)


def _wave(low: float, high: float, period_s: float = 90.0) -> Value:
    middle, swing = (low + high) / 2, (high - low) / 2
    return lambda t, n: middle + swing * math.sin(2 * math.pi * t / period_s + n)


def _growing(per_s: float) -> Value:
    return lambda t, n: math.floor(per_s * (1 + 0.5 * n) * t)


def _always(*values: float) -> Value:
    return lambda t, n: values[n % len(values)]


_GPUS = [
    {
        "gpu": str(number),
        "UUID": f"GPU-00000000-0000-0000-0000-00000000000{number}",
        "pci_bus_id": f"00000000:0{number}:00.0",
        "device": f"nvidia{number}",
        "modelName": "made up",
        "Hostname": "gpu-node-1",
    }
    for number in range(2)
]
DCGM = (
    _Row("DCGM_FI_DEV_SM_CLOCK", _GPUS, _wave(1400, 1980)),
    _Row("DCGM_FI_DEV_GPU_TEMP", _GPUS, _wave(48, 74)),
    _Row("DCGM_FI_DEV_MEMORY_TEMP", _GPUS, _wave(52, 80)),
    _Row("DCGM_FI_DEV_POWER_USAGE", _GPUS, _wave(180, 620)),
    _Row("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", _GPUS, _growing(400_000), kind="counter"),
    _Row("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", _GPUS, _always(0, 3), kind="counter"),
    _Row("DCGM_FI_DEV_XID_ERRORS", _GPUS, _always(0)),
    _Row("DCGM_FI_DEV_FB_FREE", _GPUS, _wave(20_000, 34_000)),
    _Row("DCGM_FI_DEV_FB_USED", _GPUS, lambda t, n: 81_559 - _wave(20_000, 34_000)(t, n)),
    _Row("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", _GPUS, _always(0), kind="counter"),
    _Row("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", _GPUS, _always(0, 2), kind="counter"),
    _Row("DCGM_FI_PROF_GR_ENGINE_ACTIVE", _GPUS, _wave(0.55, 0.98)),
    _Row("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", _GPUS, _wave(0.2, 0.5)),
    _Row("DCGM_FI_PROF_DRAM_ACTIVE", _GPUS, _wave(0.25, 0.6)),
    _Row("DCGM_FI_PROF_PCIE_TX_BYTES", _GPUS, _wave(2e7, 9e7)),
    _Row("DCGM_FI_PROF_PCIE_RX_BYTES", _GPUS, _wave(4e7, 2e8)),
)
_COLLECTIONS = [{"id": "demo"}, {"id": "brand"}]
_VECTORS = [{**each, "vector": "clip"} for each in _COLLECTIONS]
_ENDPOINTS = [{"endpoint": f"/qdrant.Points/{method}", "status": "0"} for method in ("QueryBatch", "Upsert", "Get")]
QDRANT = (
    _Row("collection_points", _COLLECTIONS, lambda t, n: 1_000_000 / (1 + 9 * n) + 40 * t),
    _Row("collection_dead_replicas", [{}], _always(0)),
    _Row("collection_active_replicas_min", [{}], _always(2)),
    _Row("collection_indexed_only_excluded_points", _VECTORS, _wave(0, 4000)),
    _Row("collection_running_optimizations", _COLLECTIONS, _always(1, 0)),
    _Row("grpc_responses_total", _ENDPOINTS, _growing(60), kind="counter"),
    _Row("grpc_responses_duration_seconds", _ENDPOINTS, _growing(60), kind="histogram"),
    _Row("memory_resident_bytes", [{}], _wave(5.5e9, 6e9)),
    _Row("process_major_page_faults_total", [{}], _growing(12), kind="counter"),
    _Row("cluster_peers_total", [{}], _always(3)),
    _Row("cluster_pending_operations_total", [{}], _always(0)),
)
_DEPLOYMENTS = [{"namespace": "reimagen", "deployment": name} for name in ("retrieval", "generator", "triton")]
_CONTAINERS = [
    {"namespace": "reimagen", "pod": f"{name}-0", "container": name} for name in ("retrieval", "generator", "triton")
]
_SCALED = [{"namespace": "reimagen", "horizontalpodautoscaler": name} for name in ("retrieval", "generator")]
_CLAIMS = [
    {"namespace": "reimagen", "persistentvolumeclaim": name}
    for name in ("retrieval-data", "qdrant-data-qdrant-0", "runs")
]
KUBERNETES = (
    _Row("kube_deployment_spec_replicas", _DEPLOYMENTS, _always(3, 2, 1)),
    _Row("kube_deployment_status_replicas_available", _DEPLOYMENTS, _always(3, 2, 1)),
    _Row("kube_pod_container_status_restarts_total", _CONTAINERS, _always(0, 0, 1), kind="counter"),
    _Row("kube_horizontalpodautoscaler_status_current_replicas", _SCALED, _always(3, 2)),
    _Row("kube_horizontalpodautoscaler_spec_max_replicas", _SCALED, _always(8, 4)),
    _Row("kubelet_volume_stats_used_bytes", _CLAIMS, _wave(2e10, 3e10)),
    _Row("kubelet_volume_stats_capacity_bytes", _CLAIMS, _always(5e10)),
)
