"""A fire drill: a part of a running stack is stopped, and somebody has to be told, and told again when it is over.

Prometheus, Alertmanager, rules and routes are the real ones. What differs: times are seconds, so that nobody waits, and
Alertmanager's receivers are one webhook here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from common.service.server import die_with_parent
from deploy.local.children import ChildFailed
from deploy.monitoring.manifests import rule_files
from deploy.monitoring.tools import installed

ALERTMANAGER = Path(__file__).with_name("alertmanager.yaml")
HOST = "127.0.0.1"
SCRAPE_S, PATIENCE_S, POLL_S = 0.5, 60.0, 0.05
_STOP_S = 10.0
_GROUP_WAIT = {"page": "100ms", "other": "2s"}  # tickets wait longer: what a page inhibits is not told before it


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What a receiver is told of one alert; `at_s` by time.monotonic."""

    receiver: str
    status: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    at_s: float

    @property
    def alert(self) -> str:
        """Its name."""
        return self.labels["alertname"]


class Webhook:
    """Takes what Alertmanager posts, until closed."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        handler = type("Handler", (_Handler,), {"notices": self.notices})
        self._server = ThreadingHTTPServer((HOST, 0), handler)
        self.url = f"http://{HOST}:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def wait(self, wanted: Callable[[Notice], bool], *, what: str, patience_s: float = PATIENCE_S) -> Notice:
        """The first notice that is wanted.

        Raises:
            ChildFailed: none comes; `what` names it.
        """
        give_up = time.monotonic() + patience_s
        while time.monotonic() < give_up:
            if found := next((each for each in list(self.notices) if wanted(each)), None):
                return found
            time.sleep(POLL_S)
        told = sorted({f"{each.alert} {each.status}" for each in self.notices})
        raise ChildFailed(f"drill: nobody was told of {what} in {patience_s:g} s; told: {', '.join(told) or 'nothing'}")

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    notices: list[Notice]

    def do_POST(self) -> None:
        """One message of Alertmanager: https://prometheus.io/docs/alerting/latest/configuration/#webhook_config."""
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.notices.extend(
            Notice(
                receiver=said["receiver"],
                status=alert["status"],
                labels=alert["labels"],
                annotations=alert["annotations"],
                at_s=time.monotonic(),
            )
            for alert in said["alerts"]
        )
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Not on our standard error."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """A Prometheus and an Alertmanager that look at a stack, and what they have told."""

    prometheus: str
    alertmanager: str
    webhook: Webhook

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What Prometheus answers now."""
        asked = f"{self.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        return _get(asked)["data"]["result"]

    def inhibited(self) -> set[str]:
        """The names of the alerts of which nobody is told, since another one says it."""
        alerts = _get(f"{self.alertmanager}/api/v2/alerts")
        return {each["labels"]["alertname"] for each in alerts if each["status"]["inhibitedBy"]}


@contextmanager
def watching(targets: Mapping[str, str], folder: Path) -> Iterator[Watch]:
    """Both, with the rules and routes of this folder and times of seconds, for the length of a `with` block.

    Args:
        targets: host:port of metrics, by job.
        folder: for what they keep.

    Raises:
        ChildFailed: they are not installed, or do not start.
    """
    with ExitStack() as stack:
        webhook = Webhook()
        stack.callback(webhook.close)
        routes, rules, config = folder / "alertmanager.yml", folder / "rules.yml", folder / "prometheus.yml"
        routes.write_text(yaml.safe_dump(quick_routes(webhook.url)))
        rules.write_text(yaml.safe_dump(quick_rules(rule_files())))
        alerting, scraping = f"{HOST}:{_free_port()}", f"{HOST}:{_free_port()}"
        config.write_text(yaml.safe_dump(_config(targets, rules, alerting)))
        alertmanager = stack.enter_context(
            _running(
                "alertmanager",
                f"--config.file={routes}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address={alerting}",
                "--cluster.listen-address=",
                log=folder / "alertmanager.log",
            )
        )
        prometheus = stack.enter_context(
            _running(
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address={scraping}",
                "--rules.alert.resend-delay=1s",
                log=folder / "prometheus.log",
            )
        )
        watch = Watch(prometheus=f"http://{scraping}", alertmanager=f"http://{alerting}", webhook=webhook)
        _wait_ready(watch.alertmanager, alertmanager, folder / "alertmanager.log")
        _wait_ready(watch.prometheus, prometheus, folder / "prometheus.log")
        yield watch


def quick_rules(paths: Sequence[Path]) -> dict[str, Any]:
    """The rules of files, evaluated every half second, and alerts that wait for one second where they wait for minutes."""
    groups = [group for path in paths for group in yaml.safe_load(path.read_text())["groups"]]
    for group in groups:
        group["interval"] = "500ms"
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    return {"groups": groups}


def quick_routes(url: str) -> dict[str, Any]:
    """Alertmanager's configuration with one webhook, and messages that wait for seconds where they wait for minutes."""
    config = yaml.safe_load(ALERTMANAGER.read_text())
    for route in (config["route"], *config["route"]["routes"]):
        is_page = route["receiver"] == "pager"
        route |= {"group_wait": _GROUP_WAIT["page" if is_page else "other"], "group_interval": "1s"}
    for receiver in config["receivers"]:
        for webhook in receiver["webhook_configs"]:
            webhook["url"] = url
    return config


@dataclass(frozen=True, kw_only=True)
class Told:
    """How long it took to be told, and to be told that it is over, in seconds from the deed."""

    fired: Notice
    fired_s: float
    resolved_s: float


def drill(
    watch: Watch,
    *,
    job: str,
    pids: Sequence[int],
    meanwhile: Callable[[], object] = lambda: None,
    patience_s: float = PATIENCE_S,
) -> Told:
    """Stop the processes of a job, wait for the page, let them go on, wait for the end of it.

    Args:
        meanwhile: called once somebody was told, while they are stopped.
        patience_s: for each notice.

    Raises:
        ChildFailed: nobody is told in time; the processes go on in any case.
    """
    heartbeat = watch.webhook.wait(lambda each: each.alert == "Heartbeat", what="the heartbeat", patience_s=patience_s)
    assert heartbeat.receiver == "heartbeat", "its route is its own"
    _wait_scraped(watch, job)

    def is_ours(status: str) -> Callable[[Notice], bool]:
        return lambda each: (each.alert, each.labels.get("service"), each.status) == ("ServiceDown", job, status)

    stopped_s = time.monotonic()
    with _stopped(pids):
        fired = watch.webhook.wait(is_ours("firing"), what=f"ServiceDown of {job}", patience_s=patience_s)
        meanwhile()
    went_on_s = time.monotonic()
    resolved = watch.webhook.wait(is_ours("resolved"), what=f"the end of ServiceDown of {job}", patience_s=patience_s)
    return Told(fired=fired, fired_s=fired.at_s - stopped_s, resolved_s=resolved.at_s - went_on_s)


@contextmanager
def _stopped(pids: Sequence[int]) -> Iterator[None]:
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _config(targets: Mapping[str, str], rules: Path, alertmanager: str) -> dict[str, Any]:
    every = f"{SCRAPE_S * 1000:g}ms"
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(rules)],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }


def _wait_scraped(watch: Watch, job: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not any(each["value"][1] == "1" for each in watch.query(f'up{{job="{job}"}}')):
        if time.monotonic() > give_up:
            raise ChildFailed(f"drill: Prometheus does not reach {job}")
        time.sleep(POLL_S)


@contextmanager
def _running(name: str, *flags: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = installed(name)
    if path is None:
        raise ChildFailed(f"{name}: not installed; run `make prometheus`")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [path, *flags],
            cwd=Path(path).parent,  # where the Alertmanager of `make prometheus` has its templates
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/-/ready", timeout=5):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > give_up:
                said = log.read_text(errors="replace").splitlines()[-1:]
                raise ChildFailed(f"drill: {url} is not ready ({error}); its log ends with {said}") from None
            time.sleep(POLL_S)


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as page:
        return json.load(page)


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])
