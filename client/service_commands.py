"""`reimagen models` and `reimagen health`: what draws, and whether it answers."""

from __future__ import annotations

import argparse
from typing import Any

from client.command_line import BadInput, connected, print_json, print_table

FAILED = 1


def add_service_commands(commands: Any, shared: argparse.ArgumentParser) -> None:
    """The commands and their flags."""
    models = commands.add_parser("models", parents=[shared], help="the stages that the generator draws with")
    models.set_defaults(body=_models)
    health = commands.add_parser(
        "health", parents=[shared], help="whether the services answer; status 1 if one does not"
    )
    health.set_defaults(body=_health)
    for parser in (models, health):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _models(flags: argparse.Namespace) -> int:
    with connected(flags, generator=True) as client:
        models = client.models()
    if flags.json:
        print_json(models)
        return 0
    rows = [
        (m.stage, m.name, m.version, m.parameters, m.weights_sha256[:12], " ".join(m.endpoints)) for m in models.stages
    ]
    print_table(("stage", "name", "version", "parameters", "weights", "where"), rows)
    return 0


def _health(flags: argparse.Namespace) -> int:
    if not (flags.generator or flags.retrieval or flags.trainer):
        raise BadInput("--generator, --retrieval, --trainer: all are missing; give one of them")
    with connected(flags) as client:
        found = client.health()
    if flags.json:
        print_json(found)
    else:
        print_table(
            ("service", "address", "status", "reason"), [(h.service, h.address, h.status, h.reason) for h in found]
        )
    return 0 if all(health.is_serving for health in found) else FAILED
