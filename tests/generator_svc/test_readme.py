"""Every command of generator_svc/README.md, with tiny weights and ports that are free."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.generator import GeneratorClient
from tests.generator_svc.asking import REQUEST, draw, images
from tests.generator_svc.test_triton_repository import other_weights

ROOT = Path(__file__).parents[2]
README = ROOT / "generator_svc" / "README.md"
TIMEOUT_S = 120.0
PORTS = {"50052": "generator", "50055": "triton"}


def commands() -> list[list[str]]:
    """Of each block, its lines."""
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return [block.replace("\\\n", " ").strip().splitlines() for block in blocks]


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    """Where the README's commands are run: the weights, better ones, and their figures."""
    shutil.copytree(weights, tmp_path / "weights")
    other_weights(weights, tmp_path / "better")
    (tmp_path / "evaluation" / "results").mkdir(parents=True)
    (tmp_path / "evaluation" / "results" / "demo.json").write_text(json.dumps({"entity_r1": 0.5}))
    return tmp_path


class Shell:
    """Runs lines of the README in a folder, at ports of its own."""

    def __init__(self, folder: Path, retrieval_address: str) -> None:
        self.folder = folder
        self.ports = {name: str(free_port()) for name in PORTS.values()}
        self._retrieval_address = retrieval_address
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def words(self, line: str) -> list[str]:
        """The command of a line."""
        line = line.replace("127.0.0.1:50051", self._retrieval_address)
        for port, name in PORTS.items():
            line = line.replace(port, self.ports[name])
        program, *rest = shlex.split(line)
        assert program == "python"
        return [sys.executable, *rest]

    def run(self, line: str) -> str:
        """What a command that ends says."""
        done = subprocess.run(
            self.words(line), cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def serving(self, line: str) -> Iterator[None]:
        """A server that has said that it is ready."""
        with (self.folder / "server.log").open("ab") as log:
            child = subprocess.Popen(
                self.words(line), cwd=self.folder, env=self._environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            assert child.stdout is not None
            assert child.stdout.readline().startswith("ready"), (self.folder / "server.log").read_text()[-800:]
            yield
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait(TIMEOUT_S)

    def versions(self) -> dict[str, str]:
        """Of the models that the generator draws with."""
        with GeneratorClient(f"127.0.0.1:{self.ports['generator']}") as client:
            assert images(draw(client, REQUEST))
            return {f"unet_{model.stage}": model.version for model in client.models().stages}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_commands(folder: Path, retrieval_address: str) -> None:
    (embedded,), (export, triton, generator), (release, list_them, back) = commands()
    shell = Shell(folder, retrieval_address)
    with shell.serving(embedded):
        assert set(shell.versions().values()) == {"0"}
    shell.run(export)
    with shell.serving(triton), shell.serving(generator):
        assert shell.versions()["unet_64"] == "1"
        assert "unet_64: version 2" in shell.run(release)
        assert "unet_64 2 served: examples 1, entity_r1 0.5" in shell.run(list_them)
        until(lambda: shell.versions()["unet_64"] == "2")
        assert "unet_64: version 1" in shell.run(back)
        until(lambda: shell.versions()["unet_64"] == "1")


def until(condition: Callable[[], bool]) -> None:
    """Wait until the canaries have seen it."""
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.2)
