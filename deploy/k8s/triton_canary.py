"""`python -m deploy.k8s.triton_canary`: whether every model of a Triton answers; its pod's liveness.

Triton's own health says SERVING while the process of a Python model is gone. Status 0: all answer; 2, with one line on
standard error: one does not.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

from common.service.command import run_command
from common.service.config import ConfigError
from common.service.errors import ServiceError
from generator_svc.stage_tensors import TEXT_ENCODER, StageRequest, pack_request, pack_texts
from generator_svc.triton_client import RequestRefused, TritonClient

_CONFIG = "config.pbtxt"
_NO_PLANS = pack_request(StageRequest(plans=(), inputs=None))


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask once; gives the exit status."""
    flags = parser().parse_args(arguments)
    body = partial(_ask_all, flags.address, flags.models, flags.timeout_s)
    return run_command("deploy.k8s.triton_canary", body, expected=(ConfigError, ServiceError, RequestRefused))


def parser() -> argparse.ArgumentParser:
    """What it is told."""
    made = argparse.ArgumentParser(prog="python -m deploy.k8s.triton_canary", description=__doc__)
    made.add_argument("--address", required=True, metavar="HOST:PORT", help="of Triton's gRPC")
    made.add_argument("--models", type=Path, required=True, metavar="FOLDER", help="its model repository")
    made.add_argument(
        "--timeout-s", type=float, default=25.0, metavar="SECONDS", help="of each model (default: %(default)g)"
    )
    return made


def _ask_all(address: str, repository: Path, timeout_s: float) -> None:
    models = sorted(path.parent.name for path in repository.glob(f"*/{_CONFIG}"))
    if not models:
        raise ConfigError(f"--models: {repository} holds no model")
    asyncio.run(_ask_each(address, models, timeout_s))


async def _ask_each(address: str, models: Sequence[str], timeout_s: float) -> None:
    client = TritonClient(address)
    try:
        await asyncio.gather(*(_ask(client, model, timeout_s) for model in models))
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
