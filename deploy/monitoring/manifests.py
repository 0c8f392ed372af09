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
RUNBOOKS = "deploy/monitoring/runbooks.md"  # as the rules files name it: a pager wants the address at which it is read
_MADE = "# Made by `python -m deploy.monitoring write` from deploy/monitoring/{source}.\n"


def objectives_text() -> str:
    """The rules file of the objectives."""
    return _MADE.format(source="objectives.py") + _yaml({"groups": groups()})


def rule_files() -> list[Path]:
    """Every rules file, by name."""
    return sorted(RULES.glob("*.yaml"))


def component_text(*, runbooks: str = RUNBOOKS) -> str:
    """A PrometheusRule for every rules file, whose alerts name their section of the page `runbooks`."""
    made = "---\n".join(_yaml(_prometheus_rule(path, runbooks)) for path in rule_files())
    return _MADE.format(source="rules") + made


def write(*, runbooks: str = RUNBOOKS, out: Path | None = None) -> None:
    """Write what follows from other files.

    Args:
        runbooks: URL of runbooks.md; alerts link to its sections.
        out: folder for the rules files with these links, for a Prometheus without its operator; None: the files that are
            committed, of which the PrometheusRules have the links.

    Raises:
        OSError: it cannot be written.
    """
    if out is None:
        write_atomic(OBJECTIVES, objectives_text().encode())
        write_atomic(COMPONENT, component_text(runbooks=runbooks).encode())
        return
    out.mkdir(parents=True, exist_ok=True)
    for path in rule_files():
        write_atomic(out / path.name, _yaml({"groups": _groups(path, runbooks)}).encode())


def _prometheus_rule(path: Path, runbooks: str) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": path.stem, "namespace": NAMESPACE},
        "spec": {"groups": _groups(path, runbooks)},
    }


def _groups(path: Path, runbooks: str) -> list[dict[str, Any]]:
    found = yaml.safe_load(path.read_text())["groups"]
    for told in (rule["annotations"] for group in found for rule in group["rules"] if "alert" in rule):
        told["runbook_url"] = told["runbook_url"].replace(RUNBOOKS, runbooks)
    return found


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False, width=1000, allow_unicode=True)
