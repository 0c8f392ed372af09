"""`make up`: the whole stack as processes that stay, on a real tritonserver; a picture is drawn before it returns."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest

from client import Client
from deploy.local.__main__ import main
from deploy.local.children import ROOT
from deploy.local.supervision import Supervision
from deploy.monitoring.tools import installed
from tests.deploy.monitoring import live

TIMEOUT_S = 400.0
NUM_PORTS = 10
NEEDS_PROMETHEUS = pytest.mark.skipif(
    not installed("prometheus"), reason="it is not there, and `make prometheus` could not fetch it"
)


@dataclass(frozen=True, kw_only=True)
class Up:
    """A stack that is up: its folder, its table, and its first port."""

    state: Path
    table: str
    first_port: int

    def address(self, process: str) -> str:
        return re.search(rf"^{process} .* (127\.0\.0\.1:\d+)  ", self.table, re.M)[1]

    def metrics(self) -> dict[str, str]:
        return {process: url for process, url in re.findall(r"^(\w+) .* (http://\S+/metrics) ", self.table, re.M)}

    def pid(self, process: str) -> int:
        (found,) = (state for state in Supervision(self.state).states() if state.name == process)
        assert found.state in ("STARTING", "RUNNING"), found
        return found.pid


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deploy.local", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """`run` of what starts nothing, in this process: another would import for seconds what is here already."""
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def wait_serving(stack: Up) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    with Client(stack.address("generator")) as client:
        while not all(service.is_serving for service in client.health()):
            assert time.monotonic() < give_up
            time.sleep(0.2)


def free_ports() -> int:
    """The first of NUM_PORTS ports in a row that nobody listens on."""
    for first in random.sample(range(21000, 32000, NUM_PORTS), 200):  # two suites at once do not take the same
        probes = []
        try:
            for port in range(first, first + NUM_PORTS):
                probes.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def stack(weights: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    state, first = tmp_path_factory.mktemp("up"), free_ports()
    flags = ["--state", state, "--work", work, "--weights", weights, "--first-port", first, "--clip", ""]
    started = run("up", *flags)
    try:
        assert started.returncode == 0, started.stderr
        yield Up(state=state, table=started.stdout, first_port=first)
    finally:
        with redirect_stdout(io.StringIO()) as said:
            main(["down", "--state", str(state)])
    assert said.getvalue() == "the stack is down\n"


def test_the_table_says_where_everything_is(stack: Up) -> None:
    names = [line.split()[0] for line in stack.table.splitlines()]
    wanted = [
        "process",
        "retrieval",
        "triton",
        "generator",
        "trainer",
        *(["prometheus"] if installed("prometheus") else []),
    ]
    assert names == [*wanted, "state", "export"]
    assert all("running" in line for line in stack.table.splitlines()[1:-2])
    where = {name: f"REIMAGEN_{name.upper()}={stack.address(name)}" for name in ("generator", "retrieval", "trainer")}
    assert stack.table.splitlines()[-1] == f"export {' '.join(where.values())}"
    for path in re.findall(r"\S+\.log", stack.table):
        assert Path(path).is_file()
    for url in re.findall(r"http://\S+/metrics", stack.table):
        with urlopen(url, timeout=30) as page:
            assert b"# TYPE" in page.read()


def test_it_draws_in_triton_and_the_models_say_so(stack: Up) -> None:
    with Client(stack.address("generator"), retrieval=stack.address("retrieval")) as client:
        assert all(service.is_serving for service in client.health())
        assert {stage.endpoints for stage in client.models().stages} == {(stack.address("triton"),)}
        drawn = client.generate("a guide dog", seed=1, stop_at=64)
        again = client.generate("a guide dog", seed=1, stop_at=64)
    assert drawn.images[0].image == again.images[0].image


def test_ten_thousand_random_requests_make_few_series_and_all_is_documented(stack: Up) -> None:
    live.check_random_requests({name: stack.address(name) for name in ("retrieval", "generator")}, stack.metrics())
    assert set(stack.metrics()) == {"retrieval", "generator", "triton", "trainer"}
    live.check_documented(stack.metrics())


@NEEDS_PROMETHEUS
def test_its_prometheus_evaluates_the_rules_and_answers_autoscalers(stack: Up) -> None:
    prometheus = re.search(r"^prometheus .* (http://\S+) ", stack.table, re.M)[1]
    live.check_rules_are_evaluated(prometheus)
    live.check_autoscalers_are_answered(prometheus)


@NEEDS_PROMETHEUS
def test_a_fire_drill_reaches_the_pager(stack: Up, tmp_path: Path) -> None:
    told = live.check_fire_drill(stack.metrics(), tmp_path, pid=stack.pid("retrieval"))
    assert told.fired_s > 1 and told.resolved_s > 0, "an alert waits for its time"
    wait_serving(stack)


def test_its_status_is_the_table_again(stack: Up) -> None:
    said = run("status", "--state", stack.state).stdout.splitlines()
    assert [line.split()[0] for line in said] == [line.split()[0] for line in stack.table.splitlines()]
    assert re.search(rf"^generator +running +{stack.pid('generator')} ", "\n".join(said), re.M)


def test_a_second_up_leaves_it_as_it_is_and_other_settings_are_refused(
    stack: Up, weights: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--state", stack.state, "--work", work, "--weights", weights, "--clip", ""]
    before = stack.pid("generator")
    status, said, _ = run_here(capsys, "up", *flags, "--first-port", stack.first_port)
    assert status == 0 and stack.pid("generator") == before
    assert [line.split()[0] for line in said.splitlines()] == [line.split()[0] for line in stack.table.splitlines()]
    status, _, wrong = run_here(capsys, "up", *flags, "--first-port", stack.first_port, "--stages", "embedded")
    assert status == 2 and "other settings" in wrong


def test_a_killed_generator_comes_back(stack: Up) -> None:
    killed = stack.pid("generator")
    os.kill(killed, signal.SIGKILL)
    wait_serving(stack)
    assert stack.pid("generator") != killed


def test_a_triton_whose_interpreter_is_killed_is_started_again(stack: Up) -> None:
    before = stack.pid("triton")
    server = int(Path(f"/proc/{before}/task/{before}/children").read_text().split()[0])
    stub = next(
        pid
        for task in Path(f"/proc/{server}/task").iterdir()
        for pid in map(int, (task / "children").read_text().split())
        if b"triton_python_backend_stub" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(stub, signal.SIGKILL)
    give_up = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{before}").exists():
        assert time.monotonic() < give_up
        time.sleep(0.1)
    wait_serving(stack)
    with Client(stack.address("generator")) as client:
        assert client.generate("a guide dog", seed=1, stop_at=64).images


def test_a_taken_port_is_named_before_anything_is_started(
    stack: Up, weights: Path, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--state", tmp_path / "other", "--work", work, "--weights", weights]
    status, _, wrong = run_here(capsys, "up", *flags, "--first-port", stack.first_port)
    assert status == 2 and f"port {stack.first_port} is taken" in wrong
    assert not (tmp_path / "other" / "supervisord.conf").exists()


def test_status_and_down_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, wrong = run_here(capsys, "status", "--state", tmp_path)
    assert status == 2 and "no stack is up" in wrong
    assert run_here(capsys, "down", "--state", tmp_path)[:2] == (0, "no stack was up\n")
