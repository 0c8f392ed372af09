"""What all commands of `reimagen` share: where the services are, what goes wrong, what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from client.channel import Tls
from client.client import Client

GENERATOR, RETRIEVAL, TRAINER = "REIMAGEN_GENERATOR", "REIMAGEN_RETRIEVAL", "REIMAGEN_TRAINER"
SERVICES = (("--generator", GENERATOR), ("--retrieval", RETRIEVAL), ("--trainer", TRAINER))
API_KEY = "REIMAGEN_API_KEY"


class BadInput(ValueError):
    """What was asked for cannot be; the message names the flag or the field, and the value."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(message.removeprefix("argument "))


def connection_flags(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """The flags that say where the services are, with defaults of the environment."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("services")
    for flag, variable in SERVICES:
        group.add_argument(
            flag,
            default=environment.get(variable, ""),
            metavar="ADDRESS",
            help=f"host:port, unix:/path, dns:///host:port or ipv4:address:port,... (default: ${variable})",
        )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help=f"holds the key (default: ${API_KEY})")
    group.add_argument("--tls", action="store_true", help="encrypt, trusting the system's authorities")
    group.add_argument("--tls-roots", type=Path, metavar="PEM", help="encrypt, trusting these authorities")
    group.add_argument("--tls-certificate", type=Path, metavar="PEM", help="the client's own certificate")
    group.add_argument("--tls-key", type=Path, metavar="PEM", help="and its key")
    parser.set_defaults(api_key=environment.get(API_KEY, ""))
    return parser


def connected(
    flags: argparse.Namespace, *, generator: bool = False, retrieval: bool = False, trainer: bool = False
) -> Client:
    """A client of the services that a command needs.

    Raises:
        BadInput: an address is missing, or a file cannot be read.
    """
    for is_needed, address, flag, variable in (
        (generator, flags.generator, "--generator", GENERATOR),
        (retrieval, flags.retrieval, "--retrieval", RETRIEVAL),
        (trainer, flags.trainer, "--trainer", TRAINER),
    ):
        if is_needed and not address:
            raise BadInput(f"{flag}: is missing; give it, or set {variable}")
    key = flags.api_key
    if flags.api_key_file:
        key = read_file("--api-key-file", flags.api_key_file).decode(errors="replace").strip()
    if not key.isascii() or not key.isprintable():
        raise BadInput("--api-key-file: the key has characters that are not printable ASCII")
    return Client(flags.generator, retrieval=flags.retrieval, trainer=flags.trainer, api_key=key, tls=_tls(flags))


def asked_at(flags: argparse.Namespace) -> str:
    """Where the services were looked for, and what says so."""
    addresses = ((flag, variable, getattr(flags, flag.removeprefix("--"), "")) for flag, variable in SERVICES)
    return "; ".join(f"{flag}, or {variable}, is {address}" for flag, variable, address in addresses if address)


def read_file(flag: str, path: Path) -> bytes:
    """The content of a file that a flag names.

    Raises:
        BadInput: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{flag}: {path}: {error.strerror}") from None


def split_pair(flag: str, text: str) -> tuple[str, str]:
    """The two sides of NAME=VALUE.

    Raises:
        BadInput: there is no =, or nothing before it.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise BadInput(f"{flag}: {text!r} is not of the form NAME=VALUE")
    return name, value


def print_json(document: Any) -> None:
    """A document on standard output; bytes are left out."""
    print(json.dumps(_plain(document), indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, uncut: str = "") -> None:
    """A table on a terminal; elsewhere a line for each row, its cells parted by tabs.

    On a narrow terminal words are broken, but none of the column `uncut`: a name that other commands take, say.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in cells:
            print("\t".join(row))
        return
    table = Table()
    for column in columns:
        table.add_column(column, no_wrap=column == uncut, overflow="fold")
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def _tls(flags: argparse.Namespace) -> Tls | None:
    if bool(flags.tls_certificate) != bool(flags.tls_key):
        missing = "--tls-key" if flags.tls_certificate else "--tls-certificate"
        raise BadInput(f"{missing}: is missing; a certificate and its key belong together")
    if not (flags.tls or flags.tls_roots or flags.tls_certificate):
        return None
    parts = {
        name: read_file(f"--tls-{name}", path)
        for name in ("roots", "certificate", "key")
        if (path := getattr(flags, f"tls_{name}"))
    }
    return Tls(**parts)


def _plain(document: Any) -> Any:
    if is_dataclass(document) and not isinstance(document, type):
        document = asdict(document)
    if isinstance(document, Mapping):
        return {key: _plain(value) for key, value in document.items() if not isinstance(value, bytes)}
    if isinstance(document, Sequence) and not isinstance(document, str | bytes):
        return [_plain(item) for item in document]
    return document
