"""GPUs: the sample for node-problem-detector knows the XIDs that the alert knows, in lines as NVIDIA's driver writes them; a
node has one name, whichever exporter tells of it."""

from __future__ import annotations

import json
import re

import pytest

from deploy.local.children import ROOT
from deploy.monitoring.dashboards.gpu import BOARD
from tests.deploy.k8s.monitor_rules import relabeled
from tests.deploy.k8s.rendering import of_kind, stack
from tests.deploy.monitoring.test_rules import alerts

MONITOR = json.loads((ROOT / "deploy" / "k8s" / "samples" / "xid-monitor.json").read_text())
(RULE,) = MONITOR["rules"]


def found(line: str) -> bool:
    """As node-problem-detector looks: anywhere in the line, up to its end (pkg/systemlogmonitor/log_buffer.go)."""
    return re.search(RULE["pattern"] + r"\Z", line) is not None


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("NVRM: Xid (PCI:0000:10:1c): 63, pid=1896, Row Remapper: New row marked for remapping", True),
        (
            "[  966.50] NVRM: Xid (PCI:0000:1A:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            True,
        ),
        ("NVRM: Xid (PCI:0000:06:00): 119, pid=77, Timeout after 45s of waiting for RPC response from GPU0 GSP!", True),
        ("NVRM: Xid (PCI:0000:06:00): 31, pid=5678, name=python, Ch 0000000b, MMU Fault", False),
        ("NVRM: Xid (PCI:0000:06:00): 13, Graphics Exception", False),
        ("NVRM: Xid (PCI:0000:06:00): 463, of the future", False),
        ("nvidia-nvswitch1: SXid (PCI:0000:aa:00.0): 24007, Severity 1 Engine instance 12", False),
        ("NVRM: GPU at PCI:0000:48:00: GPU-5fc0bcec-c2e1-38dc-8994-2a9f9f3b709e", False),
    ],
)
def test_faults_of_the_gpu_are_told_from_those_of_programs(line: str, is_fault: bool) -> None:
    assert found(line) is is_fault


def test_the_sample_and_the_alert_know_the_same_xids() -> None:
    asked = re.findall(r"DCGM_FI_DEV_XID_ERRORS == (\d+)", alerts()["GpuFault"]["expr"])
    assert asked == [number for number in re.findall(r"\d+", RULE["pattern"].partition("): (")[2])]
    (condition,) = MONITOR["conditions"]
    assert RULE["condition"] == condition["type"] == "GpuFault" and RULE["type"] == "permanent"


@pytest.mark.parametrize("label", ["Hostname", "hostname"])
def test_a_node_is_called_the_same_by_exporters_before_and_since_4_8_3(label: str) -> None:
    """Our monitor makes of it what the dashboard asks for; `make test-dashboards` has a real Prometheus do so."""
    (variable,) = (each for each in BOARD.variables if each.label == "Node")
    (monitor,) = (each for each in of_kind(stack("gpu"), "ServiceMonitor") if each["metadata"]["name"] == "gpus")
    (endpoint,) = monitor["spec"]["endpoints"]
    labels = {"__name__": variable.metric, "gpu": "0", label: "node-1"}
    assert relabeled(labels, endpoint["metricRelabelings"])
    assert labels == {"__name__": variable.metric, "gpu": "0", variable.name: "node-1"}
