"""`python -m deploy.k8s.triton_canary`: whether every model of a Triton answers, its pod's liveness; or whether it is ready.

Triton's own health says SERVING while the process of a Python model is gone. `--ready` asks that health alone: over TLS, which
Kubernetes' gRPC probes do not know. Status 0: all answer; 2, with one line on standard error: one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import grpc

from common.service.command import run_command
from common.service.config import ConfigError
from common.service.errors import ServiceError
from generator_svc.channel_tls import ChannelTls
from generator_svc.stage_tensors import TEXT_ENCODER, StageRequest, pack_request, pack_texts
from generator_svc.triton_client import TritonClient
from generator_svc.triton_errors import RequestRefused

_CONFIG = "config.pbtxt"
_NO_PLANS = pack_request(StageRequest(plans=(), inputs=None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; gives the exit status."""
    flags = parser().parse_args(arguments)
    body = partial(_run, flags)
    return run_command("deploy.k8s.triton_canary", body, expected=(ConfigError, ServiceError, RequestRefused))


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.k8s.triton_canary", description=__doc__)
    made.add_argument("--address", required=True, metavar="HOST:PORT", help="of Triton's gRPC")
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--models", type=Path, metavar="FOLDER", help="its model repository, each of whose models is asked"
    )
    asked.add_argument("--ready", action="store_true", help="whether it says that every model is loaded")
    made.add_argument(
        "--timeout-s", type=float, default=25.0, metavar="SECONDS", help="of each model (default: %(default)g)"
    )
    made.add_argument(
        "--tls-ca-file",
        type=Path,
        metavar="FILE",
        help="PEM of the authority that its certificate is of (default: no TLS)",
    )
    made.add_argument(
        "--tls-certificate-file", type=Path, metavar="FILE", help="PEM certificate that is shown to it (mTLS)"
    )
    made.add_argument("--tls-key-file", type=Path, metavar="FILE", help="PEM key of that certificate")
    return made


def _run(flags: argparse.Namespace) -> None:
    models = [] if flags.ready else sorted(path.parent.name for path in flags.models.glob(f"*/{_CONFIG}"))
    if not (flags.ready or models):
        raise ConfigError(f"--models: {flags.models} holds no model")
    tls = ChannelTls.of("tls", flags.tls_ca_file, flags.tls_certificate_file, flags.tls_key_file)
    asyncio.run(_ask_all(flags.address, tls and tls.credentials(), models, flags.timeout_s))


async def _ask_all(
    address: str, credentials: grpc.ChannelCredentials | None, models: Sequence[str], timeout_s: float
) -> None:
    """Each model; of none Triton's health."""
    client = TritonClient(address, credentials=credentials)
    try:
        asked = [_ask(client, model, timeout_s) for model in models]
        await asyncio.gather(*(asked or [client.check_ready(timeout_s)]))
    finally:
        await client.close()


async def _ask(client: TritonClient, model: str, timeout_s: float) -> None:
    """The question that generators ask, too: a stage tells what it is between two steps."""
    if model == TEXT_ENCODER:
        await client.infer(model, pack_texts(["canary"]), timeout_s=timeout_s)
        return
    async with aclosing(client.stream(model, _NO_PLANS, timeout_s=timeout_s)) as answers:
        async for _ in answers:
            pass


if __name__ == "__main__":
    sys.exit(main())
