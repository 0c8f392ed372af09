"""`python -m deploy.local up | down | status | serve-triton`: what these commands are told."""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path
from typing import Any

from client.display import make_display
from deploy.local.children import ROOT, ChildFailed
from deploy.local.tritonserver import NICE, TritonSettings, TritonTls, running_triton
from deploy.local.up import StackSettings, down, status, up

FIRST_PORT = 50051
NUM_PORTS = 16  # at most, of the programs of a stack and their metrics


def add_up_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands to a parser's subcommands; `shared` holds the flags of the demonstration knowledge base."""
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--state",
        type=Path,
        default=ROOT / "build" / "stack",
        metavar="FOLDER",
        help="logs, knowledge bases and models of the stack (default: build/stack)",
    )
    upping = commands.add_parser("up", parents=[shared, place], help="start the whole stack, and leave it running")
    upping.add_argument("--weights", type=Path, default=ROOT / "weights", metavar="FOLDER", help="default: weights")
    upping.add_argument(
        "--stages", choices=("triton", "embedded"), default="triton", help="where the U-Nets run (default: triton)"
    )
    upping.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    upping.add_argument(
        "--first-port", type=_port, default=FIRST_PORT, metavar="N", help="the others follow (default: %(default)s)"
    )
    upping.add_argument(
        "--clip", default="", metavar="MODEL", help="of retrieval, e.g. packaged: the first start embeds every picture"
    )
    upping.set_defaults(body=_up)
    commands.add_parser("down", parents=[place], help="end the stack").set_defaults(body=_down)
    commands.add_parser("status", parents=[place], help="where the stack is").set_defaults(body=_status)
    serving = commands.add_parser("serve-triton", help="run tritonserver over a model repository, until SIGTERM")
    serving.add_argument("--repository", type=Path, required=True)
    serving.add_argument("--log", type=Path, required=True, help="what the server and its models say")
    serving.add_argument("--port", type=int, default=0, help="of gRPC; 0: any free one")
    serving.add_argument("--metrics-port", type=int, default=0, help="0: any free one")
    serving.add_argument(
        "--admin-key-file",
        type=Path,
        help="file with the key by which models are loaded and unloaded; written with a new one where it is not there",
    )
    serving.add_argument(
        "--tls",
        type=Path,
        metavar="FOLDER",
        help="TLS with the tls.crt, tls.key and ca.crt in it; callers show a certificate of ca.crt (default: in the clear)",
    )
    serving.add_argument(
        "--nice",
        type=int,
        default=NICE,
        metavar="N",
        help="how much it yields to other processes: under load the services beside it answer sooner (default: %(default)s)",
    )
    serving.set_defaults(body=_serve_triton)


def _port(text: str) -> int:
    port = int(text)
    if not 1024 <= port <= 65535 - NUM_PORTS:
        raise argparse.ArgumentTypeError(f"{port} is not between 1024 and {65535 - NUM_PORTS}")
    return port


def _up(flags: argparse.Namespace) -> None:
    settings = StackSettings(
        weights=flags.weights,
        stages=flags.stages,
        device=flags.device,
        first_port=flags.first_port,
        clip=flags.clip,
    )
    display = make_display()
    with display.live():
        where = up(settings, flags.state, flags.work, display)
    print(where)


def _down(flags: argparse.Namespace) -> None:
    print("the stack is down" if down(flags.state) else "no stack was up")


def _status(flags: argparse.Namespace) -> None:
    print(status(flags.state))


def _serve_triton(flags: argparse.Namespace) -> None:
    settings = TritonSettings(
        repository=flags.repository,
        log=flags.log,
        grpc_port=flags.port,
        metrics_port=flags.metrics_port,
        tls=TritonTls(folder=flags.tls) if flags.tls else None,
        nice=flags.nice,
        admin_key=_kept_key(flags.admin_key_file) if flags.admin_key_file else "",
    )
    with running_triton(settings) as server:
        print(f"ready {server.address}", flush=True)
        raise ChildFailed(f"tritonserver: {server.watch()}")


def _kept_key(path: Path) -> str:
    """The key in the file; a new one, which the file's owner alone may read, where there is no file."""
    if not path.is_file():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_urlsafe(16))
    key = path.read_text().strip()
    if not key:
        raise ChildFailed(f"tritonserver: {path} is empty")
    return key
