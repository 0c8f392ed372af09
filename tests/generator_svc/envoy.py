"""An Envoy before a Triton that refuses a part of the calls with UNAVAILABLE, at random."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

READY_S = 30.0
UNAVAILABLE = 14


class Envoy:
    """A running one."""

    def __init__(self, port: int, admin_port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self._admin = f"http://127.0.0.1:{admin_port}"

    def set_share(self, percent: int) -> None:
        """Refuse so many of a hundred calls from now on."""
        key = f"fault.http.abort.abort_percent={percent}"
        urllib.request.urlopen(f"{self._admin}/runtime_modify?{key}", data=b"", timeout=READY_S).close()

    def count(self, name: str) -> int:
        """One of its counters."""
        with urllib.request.urlopen(f"{self._admin}/stats?filter={name}", timeout=READY_S) as page:
            return sum(int(line.rsplit(": ", 1)[1]) for line in page.read().decode().splitlines())

    def is_ready(self) -> bool:
        """Whether it listens."""
        try:
            with urllib.request.urlopen(f"{self._admin}/ready", timeout=READY_S):
                return True
        except OSError:
            return False


@contextmanager
def running_envoy(target: str, folder: Path) -> Iterator[Envoy]:
    """An Envoy before `target` that refuses nothing yet."""
    port, admin_port = _free_port(), _free_port()
    (folder / "envoy.json").write_text(json.dumps(_config(target, port, admin_port)))
    program = Path(sys.executable).parent / "envoy"
    command = [
        str(program),
        "-c",
        str(folder / "envoy.json"),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "-l",
        "error",
    ]
    with (folder / "envoy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    envoy = Envoy(port, admin_port)
    try:
        until = time.monotonic() + READY_S
        while not envoy.is_ready():
            assert process.poll() is None and time.monotonic() < until, (folder / "envoy.log").read_text()
            time.sleep(0.05)
        yield envoy
    finally:
        process.terminate()
        process.wait(READY_S)


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _config(target: str, port: int, admin_port: int) -> dict[str, Any]:
    http = "type.googleapis.com/envoy.extensions.filters.http"
    abort = {"grpc_status": UNAVAILABLE, "percentage": {"numerator": 0}}
    fault = {"@type": f"{http}.fault.v3.HTTPFault", "abort": abort}
    filters = [
        {"name": "envoy.filters.http.fault", "typed_config": fault},
        {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{http}.router.v3.Router"}},
    ]
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "triton", "timeout": "0s"}}]
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "grpc",
        "codec_type": "HTTP2",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": filters,
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    host, _, target_port = target.rpartition(":")
    endpoint = {"address": {"socket_address": {"address": host, "port_value": int(target_port)}}}
    options = {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    cluster = {
        "name": "triton",
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": "triton", "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
    }
    return {
        "admin": {"address": _address(admin_port)},
        "layered_runtime": {"layers": [{"name": "admin", "admin_layer": {}}]},
        "static_resources": {
            "listeners": [{"name": "front", "address": _address(port), "filter_chains": [chain]}],
            "clusters": [cluster],
        },
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
