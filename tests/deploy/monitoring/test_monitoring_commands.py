"""`python -m deploy.monitoring`: what it says where there is nothing to do it to; and the drill's own parts."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml

from deploy.local.children import ChildFailed
from deploy.monitoring.__main__ import main
from deploy.monitoring.drill import ALERTMANAGER, Webhook, quick_routes, quick_rules
from deploy.monitoring.manifests import component_text, rule_files
from deploy.monitoring.tools import installed


def test_a_drill_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--state", str(tmp_path)]) == 2
    assert "no stack is up" in capsys.readouterr().err


def test_a_drill_takes_the_rules_and_routes_as_they_are_but_for_their_times() -> None:
    quick = quick_rules(rule_files())
    for path in rule_files():
        for group in yaml.safe_load(path.read_text())["groups"]:
            (other,) = (each for each in quick["groups"] if each["name"] == group["name"])
            assert len(other["rules"]) == len(group["rules"])
            for rule, ours in zip(group["rules"], other["rules"], strict=True):
                assert {**rule, "for": 0} == {**ours, "for": 0}
                assert rule.get("for") == ours.get("for") or ours["for"] == "1s"
    routes, ours = yaml.safe_load(ALERTMANAGER.read_text()), quick_routes("http://here/")
    assert ours["inhibit_rules"] == routes["inhibit_rules"]
    assert [each["matchers"] for each in ours["route"]["routes"]] == [r["matchers"] for r in routes["route"]["routes"]]
    assert {hook["url"] for each in ours["receivers"] for hook in each["webhook_configs"]} == {"http://here/"}


def test_who_is_told_of_nothing_says_so() -> None:
    webhook = Webhook()
    try:
        alert = {"status": "firing", "labels": {"alertname": "A"}, "annotations": {}}
        message = json.dumps({"receiver": "pager", "alerts": [alert]}).encode()
        with urlopen(Request(webhook.url, data=message, method="POST"), timeout=10) as answer:
            assert answer.status == 200
        assert webhook.wait(lambda each: each.alert == "A", what="A").receiver == "pager"
        with pytest.raises(ChildFailed, match=r"nobody was told of B in 0\.1 s; told: A firing"):
            webhook.wait(lambda each: each.alert == "B", what="B", patience_s=0.1)
    finally:
        webhook.close()


def test_alerts_link_to_runbooks_of_ones_own(tmp_path: Path) -> None:
    page = "https://git.example.org/reimagen/runbooks.md"
    assert main(["write", "--out", str(tmp_path), "--runbooks", page]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in rule_files()]
    operated = list(yaml.safe_load_all(component_text(runbooks=page)))
    for path, of_cluster in zip(rule_files(), operated, strict=True):
        written = yaml.safe_load((tmp_path / path.name).read_text())["groups"]
        assert written == of_cluster["spec"]["groups"]
        for rule in (rule for group in written for rule in group["rules"] if "alert" in rule):
            assert rule["annotations"]["runbook_url"] == f"{page}#{rule['alert'].lower()}"


@pytest.mark.parametrize(
    "page", ["runbooks.md", "//git.example.org/runbooks.md", "ftp://here/r.md", "https://here/r.md#a"]
)
def test_a_page_that_no_pager_opens(page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["write", "--out", str(tmp_path), "--runbooks", page]) == 2
    assert f"--runbooks: '{page}' is no http or https URL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tools_are_found_where_make_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert installed("promtool", folder=tmp_path) is None
    (tmp_path / "promtool").touch(mode=0o755)
    assert installed("promtool", folder=tmp_path) == str(tmp_path / "promtool")
