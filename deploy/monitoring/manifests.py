"""The rules as files for Prometheus, and the same as objects of its operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from common.files import write_atomic
from deploy.local.children import ROOT
from deploy.monitoring.objectives import groups

RULES = ROOT / "deploy" / "monitoring" / "rules"
OBJECTIVES = RULES / "objectives.yaml"
COMPONENT = ROOT / "deploy" / "k8s" / "components" / "monitoring" / "rules.yaml"
NAMESPACE = "reimagen"
_MADE = "# Made by `python -m deploy.monitoring write` from deploy/monitoring/{source}.\n"


def objectives_text() -> str:
    """The rules file of the objectives."""
    return _MADE.format(source="objectives.py") + _yaml({"groups": groups()})


def rule_files() -> list[Path]:
    """Every rules file, by name."""
    return sorted(RULES.glob("*.yaml"))


def component_text() -> str:
    """A PrometheusRule for every rules file."""
    return _MADE.format(source="rules") + "---\n".join(_yaml(_prometheus_rule(path)) for path in rule_files())


def write() -> None:
    """Write what follows from other files.

    Raises:
        OSError: it cannot be written.
    """
    write_atomic(OBJECTIVES, objectives_text().encode())
    write_atomic(COMPONENT, component_text().encode())


def _prometheus_rule(path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": path.stem, "namespace": NAMESPACE},
        "spec": {"groups": yaml.safe_load(path.read_text())["groups"]},
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)
