"""Where Prometheus, Alertmanager and their tools are: on the path, or where `make prometheus` puts them."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.local.children import ROOT

INSTALLED = ROOT / "build" / "prometheus"


def installed(name: str, *, folder: Path = INSTALLED) -> str | None:
    """The path of a tool; None: it is not there."""
    return shutil.which(name) or shutil.which(name, path=str(folder))
