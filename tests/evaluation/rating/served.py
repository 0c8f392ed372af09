"""The rating page as a process of its own, and a rater who speaks HTTP."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
# `python -m evaluation rate` without the networks, which take seconds to load.
PROGRAM = """
import argparse, sys
from common.service.command import run_command
from evaluation.rating.command import add_rating
parser = argparse.ArgumentParser()
add_rating(parser.add_subparsers(required=True))
flags = parser.parse_args()
sys.exit(run_command("evaluation", lambda: flags.body(flags), expected=(ValueError,)))
"""
START_S = 120


def command(*flags: object) -> list[str]:
    """A command line of `rate` or `rate-report`."""
    return [sys.executable, "-c", PROGRAM, *map(str, flags)]


class Served:
    """A running page; `kill` and `start` it again at the same port."""

    def __init__(self, run: Path, votes: Path, *flags: object) -> None:
        self.votes = votes
        self._flags = ("rate", "--run", run, "--votes", votes, *flags)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        flags = (*self._flags, "--address", f"127.0.0.1:{self.port}")
        self.process = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(START_S, self.process.kill)
        watchdog.start()
        assert self.process.stdout is not None
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("new raters: "):
                break
        watchdog.cancel()
        assert self.said and self.said[-1].startswith("new raters: http://127.0.0.1:"), self.said
        self.port = int(self.said[-1].rstrip("/\n").rpartition(":")[2])

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        self.process.terminate()
        return self.process.wait(20)

    @property
    def url(self) -> str:
        """Of the front page."""
        return f"http://127.0.0.1:{self.port}/"

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request as it is written here; status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if raw is not None else {}
        connection.request(method, path, raw, {**given, **(headers or {})})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), content

    def events(self, rater_id: str) -> list[dict[str, Any]]:
        """A rater's file, but for its first line."""
        lines = (self.votes / "raters" / f"{rater_id}.jsonl").read_text(encoding="utf-8").split("\n")[1:-1]
        return [json.loads(line) for line in lines]


class HttpRater:
    """A rater without a browser."""

    def __init__(self, served: Served, name: str) -> None:
        self.served = served
        status, _, body = served.send("POST", "/join", {"name": name})
        assert status == 200, body
        self.link = json.loads(body)["link"]
        self.rater_id = self.link.partition("-")[0]
        self.screen: dict[str, Any] = {}
        self.look()

    def look(self) -> dict[str, Any]:
        """What is on the screen."""
        self.screen = self._screen("GET", "screen")
        return self.screen

    def vote(self, photorealism: int = 1, faithfulness: int = 1, picture: int = 0) -> dict[str, Any]:
        """Answer what is on the screen."""
        given = {"photorealism": photorealism, "faithfulness": faithfulness, "picture": picture, "seconds": 1.25}
        self.screen = self._screen("POST", "vote", {**self.mark, **given})
        return self.screen

    def undo(self) -> dict[str, Any]:
        """Take the last one back."""
        self.screen = self._screen("POST", "undo", {"serial": self.screen["serial"]})
        return self.screen

    @property
    def mark(self) -> dict[str, Any]:
        """What says which answer this is."""
        return {"serial": self.screen["serial"], "item": self.screen["item"]["item"]}

    def send(self, method: str, what: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
        """A request below the rater's address."""
        return self.served.send(method, f"/r/{self.link}/{what}", body)

    def _screen(self, method: str, what: str, body: Any = None) -> dict[str, Any]:
        status, _, content = self.send(method, what, body)
        assert status == 200, content
        return json.loads(content)


@contextmanager
def serving(run: Path, votes: Path, *flags: object) -> Iterator[Served]:
    """A page that is ended with the block."""
    served = Served(run, votes, *flags)
    try:
        yield served
    finally:
        served.kill()
