"""Configuration of a service: a frozen dataclass, filled from flags, then the environment, then its defaults.

The environment is read once, at start. A name with the service's prefix that no field bears stops the process
by name, as does a required field that nobody gave.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_HELP = "help"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Kubernetes tells a pod about every Service of its namespace by variables such as
# REIMAGEN_RETRIEVAL_SERVICE_HOST and REIMAGEN_RETRIEVAL_PORT_50051_TCP_ADDR, which carry our prefix if the
# Service bears our name: those are nobody's typo.
_SERVICE_LINK = re.compile(r"(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")


class ConfigError(ValueError):
    """A setting is missing, unknown, or has a value that cannot be; the message names it."""


def setting(*, help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a settings dataclass, required where it has no default; `--help` shows `help`."""
    return dataclasses.field(default=default, metadata={_HELP: help})


def add_flags(parser: argparse._ActionsContainer, settings: type) -> None:
    """Give `parser` (or a group of it) a flag `--field-name` for each field of `settings`; `read_settings` reads them."""
    for field in dataclasses.fields(settings):
        shown = "" if field.default in (dataclasses.MISSING, None) else f" (default: {field.default})"
        text = f"{field.metadata.get(_HELP, '')}{shown}".replace("%", "%%")
        parser.add_argument(_flag(field.name), dest=field.name, default=None, metavar="VALUE", help=text)


def read_settings(
    settings: type[T], *, prefix: str, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None
) -> T:
    """Make `settings` of what was given.

    Args:
        settings: a dataclass whose fields are str, int, float, bool, Path, a Literal of strings, or one of
            these or None.
        prefix: what the service's variables begin with, e.g. "REIMAGEN_RETRIEVAL_".
        environ: the environment.
        flags: field name to text (None where the flag was not given); names that are no fields are left
            alone.

    Raises:
        ConfigError: a variable with the prefix is unknown, a required field is missing, or a value cannot be
            read.
    """
    assert dataclasses.is_dataclass(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    for name in sorted(environ):
        rest = name.removeprefix(prefix)
        known = rest == rest.upper() and rest.lower() in fields
        if rest != name and not known and not _SERVICE_LINK.fullmatch(rest):
            names = ", ".join(prefix + field.upper() for field in fields)
            raise ConfigError(f"{name}: no such setting; the settings are {names}")
    hints = get_type_hints(settings)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        variable = prefix + name.upper()
        given = (flags or {}).get(name)
        source, text = (_flag(name), str(given)) if given is not None else (variable, environ.get(variable))
        if text is not None:
            values[name] = _convert(source, text, hints[name])
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{_flag(name)}: missing; give it, or set {variable} ({field.metadata.get(_HELP, '')})")
    return settings(**values)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _convert(source: str, text: str, kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (member for member in get_args(kind) if member is not types.NoneType)
        if text == "":
            return None
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise ConfigError(f"{source}: {text!r} is not one of {', '.join(get_args(kind))}")
    if kind is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise ConfigError(f"{source}: {text!r} is neither true nor false")
    if kind in (str, Path):
        if not text:
            raise ConfigError(f"{source}: is empty")
        return kind(text)
    assert kind in (int, float), f"settings cannot hold {kind}"
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{source}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from None
