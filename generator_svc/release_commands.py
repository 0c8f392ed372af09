"""`python -m generator_svc export | versions | roll-back`: from weights to the version that Tritons serve, and back."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from common.service.config import ConfigError, add_flags, read_settings, setting
from generator_svc.channel_tls import ChannelTls
from generator_svc.export import ExportSettings, export
from generator_svc.model_versions import alone, configurations, list_versions, prune, roll_back
from generator_svc.roll_out import LOAD_TIMEOUT_S, roll_out

PREFIX = "REIMAGEN_EXPORT_"


@dataclass(frozen=True, kw_only=True)
class RollOutSettings:
    """The running Tritons that are to serve what was published."""

    triton_addresses: str | None = setting(
        default=None, help="running Tritons over this repository, comma-separated host:port; they load it one by one"
    )
    triton_admin_key_file: Path | None = setting(  # noqa: RUF009 (a field)
        default=None, help="file with the key that their model repository is restricted by; empty: none is asked for"
    )
    triton_ca_file: Path | None = setting(  # noqa: RUF009 (a field, as are the next)
        default=None, help="PEM certificates of the authority that Tritons' certificates are of; empty: no TLS"
    )
    triton_certificate_file: Path | None = setting(  # noqa: RUF009
        default=None, help="PEM certificate chain that is shown to Tritons (mTLS)"
    )
    triton_key_file: Path | None = setting(default=None, help="PEM private key of that certificate")  # noqa: RUF009
    load_timeout_s: float = setting(default=LOAD_TIMEOUT_S, help="seconds that a model may take to load and warm up")

    def addresses(self) -> list[str]:
        """Of the Tritons. Raises ConfigError for one that is none."""
        addresses = [part.strip() for part in (self.triton_addresses or "").split(",") if part.strip()]
        for address in addresses:
            host, _, port = address.rpartition(":")
            if not (host and port.isdecimal()):
                raise ConfigError(f"--triton-addresses: {address!r} is not host:port")
        if not self.load_timeout_s > 0:
            raise ConfigError(f"--load-timeout-s: {self.load_timeout_s} is not positive")
        return addresses

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Of TLS; None: there is none. Raises ConfigError for files that cannot be used."""
        tls = ChannelTls.of("triton", self.triton_ca_file, self.triton_certificate_file, self.triton_key_file)
        return tls and tls.credentials()

    def admin_key(self) -> str:
        """The key; empty where there is none."""
        return self.triton_admin_key_file.read_text().strip() if self.triton_admin_key_file else ""


@dataclass(frozen=True, kw_only=True)
class ExportCommand(ExportSettings, RollOutSettings):
    """Publishes weights to a model repository, and has running Tritons load them."""


@dataclass(frozen=True, kw_only=True)
class RollBackCommand(RollOutSettings):
    """Has an older version of a model served again."""

    repository: Path = setting(help="folder that Triton serves")  # noqa: RUF009
    model: str = setting(help="unet_64, unet_256, unet_1024 or text_encoder")
    version: int = setting(default=0, help="which one; 0: the newest before the one that is served")


@dataclass(frozen=True, kw_only=True)
class VersionsCommand:
    """Lists the versions of a repository's models."""

    repository: Path = setting(help="folder that Triton serves")  # noqa: RUF009


def add_release_commands(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    for name, settings in (("export", ExportCommand), ("versions", VersionsCommand), ("roll-back", RollBackCommand)):
        said = str(settings.__doc__)
        parser: argparse.ArgumentParser = commands.add_parser(name, help=said, description=said)
        add_flags(parser, settings)


def _export(flags: Mapping[str, object]) -> None:
    settings = read_settings(ExportCommand, prefix=PREFIX, environ=os.environ, flags=flags)
    settings.check()
    _release(settings, settings.repository, lambda: export(settings), keep=settings.keep)


def _roll_back(flags: Mapping[str, object]) -> None:
    settings = read_settings(RollBackCommand, prefix=PREFIX, environ=os.environ, flags=flags)
    if settings.model not in (known := configurations(settings.repository)):
        raise ConfigError(f"--model: {settings.model!r} is not one of {', '.join(known) or 'no models'}")
    model = settings.repository / settings.model
    _release(settings, settings.repository, lambda: {settings.model: roll_back(model, settings.version or None)})


def _release(
    settings: RollOutSettings, repository: Path, change: Callable[[], dict[str, int]], *, keep: int = 0
) -> None:
    """Make a change of the repository, and have the Tritons load it; then let all but `keep` versions go (0: none)."""
    addresses, key, credentials = settings.addresses(), settings.admin_key(), settings.credentials()
    with alone(repository):
        before = configurations(repository)
        versions = change()
        if addresses:
            asyncio.run(
                roll_out(
                    repository,
                    versions,
                    before,
                    addresses,
                    admin_key=key,
                    credentials=credentials,
                    timeout_s=settings.load_timeout_s,
                )
            )
        for model in versions if keep else ():
            prune(repository / model, keep)
    for model, version in versions.items():
        print(f"{model}: version {version}")


def _versions(flags: Mapping[str, object]) -> None:
    settings = read_settings(VersionsCommand, prefix=PREFIX, environ=os.environ, flags=flags)
    if not (known := configurations(settings.repository)):
        raise ConfigError(f"--repository: {settings.repository} holds no model")
    for model in known:
        for each in list_versions(settings.repository / model):
            trained = each.card.get("trained", {})
            said = ", ".join(f"{name} {trained[name]}" for name in ("preset", "step", "examples") if name in trained)
            figures = each.card.get("evaluation", {})
            said += "".join(f", {name} {figures[name]}" for name in ("entity_r1",) if name in figures)
            print(f"{model} {each.number}{' served' if each.is_served else ''}{f': {said}' if said else ''}")


RELEASE_COMMANDS: dict[str, Callable[[Mapping[str, object]], None]] = {
    "export": _export,
    "versions": _versions,
    "roll-back": _roll_back,
}
