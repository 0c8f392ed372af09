"""JSON documents that are read whole: descriptions of pictures, not the pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retrieval_svc.imports.records import SourceError


def read_json(kind: str, path: Path) -> Any:
    """The document in `path`; `kind` begins the message of an error.

    Raises:
        SourceError: it is no JSON.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{kind}: {path} is not JSON ({error})") from None
