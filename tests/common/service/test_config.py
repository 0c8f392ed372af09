"""Settings come from flags, the environment and defaults; what is unknown or missing is named."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from common.service.config import ConfigError, add_flags, read_settings, setting
from common.service.server import ServerSettings

PREFIX = "REIMAGEN_TEST_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every kind of field."""

    index: Path = setting(help="a folder")  # noqa: RUF009 (a field)
    num_steps: int = setting(default=3, help="steps")
    grace_s: float = setting(default=1.5, help="seconds, 100 % of them")
    is_loud: bool = setting(default=False, help="noise")
    style: Literal["json", "text"] = setting(default="json", help="style")
    cache: Path | None = setting(default=None, help="a folder, or none")  # noqa: RUF009 (a field)


def test_flags_win_over_the_environment_and_that_over_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    flags = vars(parser.parse_args(["--index", "here", "--num-steps", "5", "--is-loud", "yes"]))
    environ = {f"{PREFIX}NUM_STEPS": "4", f"{PREFIX}GRACE_S": "0.5", f"{PREFIX}CACHE": "there", "PATH": "x"}
    settings = read_settings(Settings, prefix=PREFIX, environ=environ, flags=flags | {"command": "serve"})
    assert settings == Settings(index=Path("here"), num_steps=5, grace_s=0.5, is_loud=True, cache=Path("there"))
    assert "100 %" in parser.format_help()


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, f"--index: missing; give it, or set {PREFIX}INDEX"),
        (
            {"NUM_STEP": "4"},
            f"{PREFIX}NUM_STEP: no such setting; the settings are {PREFIX}INDEX, {PREFIX}NUM_STEPS",
        ),
        ({"num_steps": "4"}, f"{PREFIX}num_steps: no such setting"),
        ({"INDEX": ""}, f"{PREFIX}INDEX: is empty"),
        ({"INDEX": "x", "NUM_STEPS": "4.5"}, f"{PREFIX}NUM_STEPS: '4.5' is not a whole number"),
        ({"INDEX": "x", "GRACE_S": "soon"}, f"{PREFIX}GRACE_S: 'soon' is not a number"),
        ({"INDEX": "x", "IS_LOUD": "very"}, f"{PREFIX}IS_LOUD: 'very' is neither true nor false"),
        ({"INDEX": "x", "STYLE": "xml"}, f"{PREFIX}STYLE: 'xml' is not one of json, text"),
    ],
)
def test_wrong_settings_are_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(Settings, prefix=PREFIX, environ={PREFIX + name: text for name, text in environ.items()})
    assert named in str(caught.value)


def test_kubernetes_service_links_are_no_settings() -> None:
    links = (
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_GRPC",
        "PORT",
        "PORT_50051_TCP",
        "PORT_50051_TCP_ADDR",
    )
    environ = {PREFIX + name: "tcp://10.0.0.1:50051" for name in links} | {f"{PREFIX}INDEX": "here"}
    assert read_settings(Settings, prefix=PREFIX, environ=environ).index == Path("here")
    with pytest.raises(ConfigError, match="PORTS: no such setting"):
        read_settings(Settings, prefix=PREFIX, environ=environ | {f"{PREFIX}PORTS": "1"})


def test_every_server_setting_says_what_it_is() -> None:
    for field in fields(ServerSettings):
        assert field.metadata["help"], field.name
