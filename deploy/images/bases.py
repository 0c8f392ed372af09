"""Digests of the images that ours begin with, asked of their registries (OCI Distribution Specification, section 3)."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from email.message import Message
from pathlib import Path

from common.files import write_json
from deploy.images.catalog import BASE_IMAGES, BASES, Base

TIMEOUT_S = 30.0
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')


class RegistryError(ValueError):
    """A registry does not answer, or not what an image's digest is; the message names the image."""


def write_digests(path: Path = BASES, bases: Iterable[Base] = BASE_IMAGES) -> dict[str, str]:
    """Ask for every base's digest and keep them at `path`; gives them by the build's arguments.

    Raises:
        RegistryError: one could not be had; nothing is written.
    """
    found = {base.argument: digest(base) for base in bases}
    write_json(path, found)
    return found


def read_digests(path: Path = BASES) -> dict[str, str]:
    """What `write_digests` wrote.

    Raises:
        ValueError: nothing was written, or what is there is no digest.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"bases: {path} is not there; run `make image-digests` where registries can be reached"
        ) from None
    except ValueError as error:
        raise ValueError(f"bases: {path} is no JSON: {error}") from None
    for argument, value in found.items() if isinstance(found, dict) else [("", found)]:
        if not isinstance(value, str) or not DIGEST.fullmatch(value):
            raise ValueError(f"bases: {path}: {argument} is {value!r}, not sha256: and 64 digits")
    return found


def known_digests(path: Path | None, *, asked: Path = BASES) -> dict[str, str]:
    """Those of `path`; None: those that registries told (`asked`) or, until somebody has asked them, the published ones.

    Raises:
        ValueError: see `read_digests`.
    """
    if path is None and not asked.exists():
        return {base.argument: base.published for base in BASE_IMAGES if base.published}
    return read_digests(path or asked)


def digest(base: Base, *, scheme: str = "https") -> str:
    """The digest of a base's index, as its registry has it now; anonymous, with a token where one is wanted (RFC 6750).

    Raises:
        RegistryError: it could not be had.
    """
    url = f"{scheme}://{base.registry}/v2/{base.repository}/manifests/{base.tag}"
    try:
        headers = _head(url, {})
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise RegistryError(f"{base.name}: {url} answers {error.code}") from None
        headers = _with_token(base, url, error.headers.get("WWW-Authenticate", ""))
    except OSError as error:
        raise RegistryError(f"{base.name}: {url}: {error}") from None
    value = headers.get("Docker-Content-Digest", "")
    if not DIGEST.fullmatch(value):
        raise RegistryError(f"{base.name}: {url} gives {value!r} for a digest")
    return value


def _with_token(base: Base, url: str, challenge: str) -> Message:
    said = dict(_PARAMETER.findall(challenge))
    realm = said.pop("realm", "")
    if not realm.startswith(("https://", "http://127.0.0.1:")):
        raise RegistryError(
            f"{base.name}: {url} wants {challenge!r}, which is no token of an address that is encrypted"
        )
    query = urllib.parse.urlencode({"scope": f"repository:{base.repository}:pull", **said})
    try:
        with urllib.request.urlopen(f"{realm}?{query}", timeout=TIMEOUT_S) as answer:
            given = json.load(answer)
        return _head(url, {"Authorization": f"Bearer {given.get('token') or given.get('access_token', '')}"})
    except (OSError, ValueError, AttributeError) as error:
        raise RegistryError(f"{base.name}: {url}: {error}") from None


def _head(url: str, headers: Mapping[str, str]) -> Message:
    request = urllib.request.Request(url, method="HEAD", headers={"Accept": _MANIFESTS, **headers})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return answer.headers
