"""Rules, objectives, runbooks and Alertmanager's configuration: each by Prometheus' own tools, and each by the others."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from reimagen.retrieval.v1 import retrieval_pb2

from deploy.local.children import ROOT
from deploy.monitoring.manifests import COMPONENT, OBJECTIVES, component_text, objectives_text, rule_files
from deploy.monitoring.objectives import BUDGET, BURN_RATES, ERRORS, NUM_ERRORS, STALE, WINDOW, windows
from deploy.monitoring.objectives import OBJECTIVES as PROMISES
from tests.deploy.k8s.rendering import OVERLAYS, of_kind, pods, stack
from tests.deploy.k8s.workload_rules import SETTINGS
from tests.deploy.monitoring.metrics_page import documented

TOOLS = ROOT / "build" / "prometheus"
MONITORING = ROOT / "deploy" / "monitoring"
CASES = Path(__file__).parent / "alerts"
RUNBOOKS = (MONITORING / "runbooks.md").read_text()
ALERTMANAGER = MONITORING / "alertmanager.yaml"
SEVERITIES = {"page", "ticket", "none"}
NEVER_SILENT = {"Heartbeat"}


def tool(name: str, *arguments: object) -> str:
    """What a tool says, which has to succeed."""
    if not (TOOLS / name).is_file():
        pytest.skip(f"{name} is not there, and `make prometheus` could not fetch it")
    command = [str(TOOLS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    return [
        rule for path in rule_files() for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def test_promtool_takes_the_rules() -> None:
    tool("promtool", "check", "rules", "--lint=all", "--lint-fatal", *rule_files())


@pytest.mark.parametrize("cases", sorted(CASES.glob("*.yaml")), ids=lambda path: path.stem)
def test_alerts_fire_and_are_silent(cases: Path) -> None:
    tool("promtool", "test", "rules", cases)


def test_each_alert_has_a_case_that_fires_and_a_silent_one() -> None:
    fires, silent = set(), set()
    for path in CASES.glob("*.yaml"):
        for case in yaml.safe_load(path.read_text())["tests"]:
            for each in case["alert_rule_test"]:
                (fires if each["exp_alerts"] else silent).add(each["alertname"])
                assert case["name"].startswith(f"{each['alertname']} {'fires' if each['exp_alerts'] else 'is silent'}")
    assert fires == set(alerts())
    assert silent == set(alerts()) - NEVER_SILENT
    assert {path.name for path in CASES.glob("*.yaml")} == {path.name for path in rule_files()}


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for name, alert in alerts().items():
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, name
        assert alert["labels"]["severity"] in SEVERITIES, name
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert page == "deploy/monitoring/runbooks.md" and anchor == name.lower()
    names = [rule["alert"] for rule in rules() if "alert" in rule]
    assert len(names) == len(set(names))


def test_each_alert_has_its_runbook_and_each_runbook_its_alert() -> None:
    sections = re.findall(r"^## (\w+)\n\n(.+?)(?=^## |\Z)", RUNBOOKS, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in sections) == sorted(alerts())
    for name, text in sections:
        assert len(text) > 80, name


def test_runbooks_speak_of_what_there_is() -> None:
    known = {prefix + each.name.upper() for kind, prefix in SETTINGS.values() for each in fields(kind)}
    assert set(re.findall(r"\bREIMAGEN_\w+", RUNBOOKS)) <= known
    said = set(re.findall(r"\b(?:reimagen|grpc_server|DCGM|kube|nv)_\w+", RUNBOOKS)) - {"reimagen_svc"}
    assert {family(name) for name in said} <= {metric.name for metric in documented()}
    for link in re.findall(r"\]\(([^)#]+)\)", RUNBOOKS + (MONITORING / "slo.md").read_text()):
        assert (MONITORING / link).exists(), link
    referred = set(re.findall(r"\b(?:[Aa]s|[Ss]ee|step before) ([A-Z]\w+)", RUNBOOKS))
    assert len(referred) > 5 and referred <= set(alerts()) | {"Qdrant"}


def test_what_runbooks_select_is_there() -> None:
    manifests = stack("gpu")
    found = {"pods": [pod.labels for pod in pods(manifests)]}
    for kind in ("Job", "Deployment", "Service"):
        found[f"{kind.lower()}s"] = [each["metadata"].get("labels", {}) for each in of_kind(manifests, kind)]
    jobs = [each["spec"]["jobTemplate"].get("metadata", {}) for each in of_kind(manifests, "CronJob")]
    found["jobs"] += [each.get("labels", {}) for each in jobs]
    asked = re.findall(r"\bk (?:get|logs|delete) (\w+)\s+-l ([\w./-]+)=([a-z][\w-]*)", RUNBOOKS)
    assert {kind for kind, _, _ in asked} >= {"jobs", "pods"}
    for kind, key, value in asked:
        assert any(labels.get(key) == value for labels in found[kind]), f"no {kind} with {key}={value}"


def test_rules_ask_for_metrics_that_are_documented() -> None:
    recorded, found = {rule["record"] for rule in rules() if "record" in rule}, set()
    known = {metric.name for metric in documented()}
    for rule in rules():
        expression = re.sub(r"\{[^}]*\}", "", rule["expr"])
        asked = set(
            re.findall(
                r"\b(?:[a-z]+:)?(?:reimagen|grpc|nv|scrape|kube|kubelet|DCGM|certmanager|collection|cluster|app|quota)_[\w:]+",
                expression,
            )
        )
        assert {family(name) for name in asked - recorded} <= known, rule
        found |= asked
    assert len(found) > 40 and recorded & found


def test_lookups_are_those_of_the_contract() -> None:
    methods = {method.full_name for method in retrieval_pb2.DESCRIPTOR.services_by_name["RetrievalService"].methods}
    asked = set(re.findall(r'grpc_method="([^"]+)"', OBJECTIVES.read_text()))
    assert asked and {name.replace("/", ".") for name in asked} <= methods


def test_what_follows_from_other_files_is_up_to_date() -> None:
    """Else: `python -m deploy.monitoring write`."""
    assert OBJECTIVES.read_text() == objectives_text()
    assert COMPONENT.read_text() == component_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cluster_gets_the_same_rules(overlay: str) -> None:
    groups = [group for each in of_kind(stack(overlay), "PrometheusRule") for group in each["spec"]["groups"]]
    if overlay == "local-cpu":
        assert groups == []
        return
    ours = [group for path in rule_files() for group in yaml.safe_load(path.read_text())["groups"]]
    assert {each["name"]: each for each in groups} == {each["name"]: each for each in ours}
    assert len(groups) == len(ours)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_expected_is_what_is_deployed_by_the_job_that_it_is_to_prometheus(overlay: str) -> None:
    """Services that tell metrics: each is expected under the name of its pods, which `jobLabel` makes their job."""
    expected = {
        kind: dict.fromkeys(re.findall(rf'{kind}=~?"([^"]+)"', rule["expr"]))
        for rule in rules()
        if rule.get("record") == "job:reimagen_wanted_replicas:sum"
        for kind in ("deployment", "statefulset")
    }
    watched = {
        monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"]
        for kind in ("ServiceMonitor", "PodMonitor")
        for monitor in of_kind(stack(overlay), kind)
        if monitor["spec"].get("jobLabel") == "app.kubernetes.io/name"
    }
    found = set()
    for kind in ("Deployment", "StatefulSet"):
        for each in of_kind(stack(overlay), kind):
            name, (pattern,) = each["metadata"]["name"], expected[kind.lower()]
            job = each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"]
            assert re.fullmatch(pattern, name), f"{kind}/{name} is not expected"
            assert re.match("[a-z]+", name)[0] == job  # type: ignore[index]
            found.add(job)
    assert watched in (found, set())


def test_the_page_of_objectives_says_what_is_measured() -> None:
    page = (MONITORING / "slo.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([\d.]+) % \|", page, re.MULTILINE))
    assert {slo: float(target) for slo, target in rows.items()} == {
        each.slo: pytest.approx(100 * each.target) for each in PROMISES
    }
    rows = re.findall(
        r"^\| `(\w+)` \| (?:more than )?([\d.]*) ?(?:times )?too fast \| (\w+) \| (\w+) \| .* \| (?:at least (\d+)|any) "
        r"\| (\w+) \|",
        page,
        re.MULTILINE,
    )
    assert [
        (alert, float(rate or 1), long, short, int(least or 0), who) for alert, rate, long, short, least, who in rows
    ] == [(each.alert, each.rate, each.long, each.short, each.least, each.severity) for each in BURN_RATES]
    assert all(bool(each.least) == (each.severity == "page") for each in BURN_RATES)
    assert WINDOW == "30d" and "30 days" in page
    for name in (BUDGET, ERRORS + windows()[0], NUM_ERRORS + windows()[0], *(windows()[1:])):
        assert name in page
    assert STALE in OBJECTIVES.read_text()


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ("alertname=ServiceDown severity=page service=retrieval", "pager"),
        ("alertname=ErrorBudgetBurnsSlowly severity=ticket service=generator slo=generator-latency", "tickets"),
        ("alertname=TrainingStalled severity=ticket service=trainer", "training"),
        ("alertname=ServiceDown severity=page service=trainer", "pager"),
        ("alertname=Heartbeat severity=none service=monitoring", "heartbeat"),
        ("alertname=SomebodyElses", "tickets"),
    ],
)
def test_alerts_reach_whom_they_should(labels: str, receiver: str) -> None:
    said = tool("amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}", *labels.split())
    assert said.split() == [receiver]


def test_amtool_takes_the_configuration_and_every_alert_has_a_route_of_its_own() -> None:
    assert "SUCCESS" in tool("amtool", "check-config", ALERTMANAGER)
    config = yaml.safe_load(ALERTMANAGER.read_text())
    by_severity = {"page": {"pager"}, "ticket": {"tickets", "training"}, "none": {"heartbeat"}}
    used = set()
    for name, alert in alerts().items():
        labels = {key: value for key, value in alert["labels"].items() if "{{" not in value}
        routes = config["route"]["routes"]
        receiver = next(r["receiver"] for r in routes if _matches(r["matchers"], labels | {"alertname": name}))
        assert receiver in by_severity[labels["severity"]], name
        used.add(receiver)
    assert used == {each["name"] for each in config["receivers"]}
    inhibiting = re.findall(r"alertname =~? \"?(\w+(?:\|\w+)*)", str(config["inhibit_rules"]))
    assert {name for names in inhibiting for name in names.split("|")} <= set(alerts())


def _matches(matchers: list[str], labels: dict[str, str]) -> bool:
    wanted = dict(part.split(" = ") for part in matchers)
    return all(labels.get(name) == value for name, value in wanted.items())


def family(name: str) -> str:
    """The metric of a series' name."""
    return re.sub(r"_(bucket|sum|count)$", "", name) if name not in _OWN_COUNTS else name


_OWN_COUNTS = {"nv_inference_count", "nv_inference_exec_count", "nv_inference_pending_request_count"}
