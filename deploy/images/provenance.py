"""Where weights and images come from: in-toto statements (v1) with SLSA's provenance predicate (v1).

What the builder did not witness is not claimed: the subject's digests are computed from the files, what weights were trained on
is read from their headers, the commit is what the caller says, or the last one that changed the file.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from safetensors import SafetensorError, safe_open

from common.files import sha256_file
from deploy.images.catalog import ROOT, dockerfile

PREDICATE = "https://slsa.dev/provenance/v1"
TRAINING = "urn:reimagen:build:training:v1"  # README.md beside this file says what the parameters are
IMAGE = "urn:reimagen:build:image:v1"
BUILDER = "urn:reimagen:builder:unattested"  # a person's machine; a build service names itself
SOURCE = "git+urn:reimagen:source"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def of_weights(path: Path, *, commit: str = "", builder: str = BUILDER) -> dict[str, Any]:
    """Of one file of published weights: its digest; corpus, preset, steps of its training; the code.

    Args:
        commit: of the code that trained it; empty: the commit that published the file, and the statement says so.

    Raises:
        ValueError: the file is no published weights, or no commit is known.
    """
    trained = trained_on(path)
    preset = trained["preset"]["name"] if isinstance(trained.get("preset"), Mapping) else trained.get("preset")
    published = "" if commit else _published(path)
    clip = isinstance(trained.get("preset"), Mapping)
    command = (
        ["python", "-m", "trainer", "fit-clip"] if clip else ["python", "-m", "trainer", "fit", f"--preset={preset}"]
    )
    definition = {
        "buildType": TRAINING,
        "externalParameters": {"preset": preset, "command": command},
        "internalParameters": {
            "trained": {key: value for key, value in trained.items() if key not in ("preset", "corpus_fingerprint")},
            "commit": "published the weights" if published else "trained the weights",
        },
        "resolvedDependencies": [
            {
                "name": "corpus",
                "digest": {"sha256": _hexadecimal(trained.get("corpus_fingerprint"), "corpus_fingerprint")},
            },
            {"name": "source", "uri": SOURCE, "digest": {"gitCommit": _commit(commit or published)}},
        ],
    }
    if isinstance(trained.get("trunk"), str):
        definition["resolvedDependencies"].append({"name": "trunk", "digest": {"sha256": trained["trunk"]}})
    return _statement(path.name, sha256_file(path), definition, builder)


def of_image(
    image: str, sha256: str, *, lock: Path | None, arguments: Mapping[str, str], commit: str, builder: str = BUILDER
) -> dict[str, Any]:
    """Of one image: what its build was given.

    Args:
        sha256: of the image's manifest, as the registry calls it; without `sha256:`.
        lock: of its environment; None where it has none.
        arguments: of the build; those called `*_DIGEST` are what it began with.

    Raises:
        ValueError: a digest or the commit is none.
    """
    recipe = dockerfile(image)
    materials: list[dict[str, Any]] = [
        {"name": "source", "uri": SOURCE, "digest": {"gitCommit": _commit(commit)}},
        {"name": "Dockerfile", "uri": recipe.relative_to(ROOT).as_posix(), "digest": {"sha256": sha256_file(recipe)}},
    ]
    if lock is not None:
        materials.append(
            {"name": "lock", "uri": lock.relative_to(ROOT).as_posix(), "digest": {"sha256": sha256_file(lock)}}
        )
    for argument, value in arguments.items():
        if argument.endswith("_DIGEST"):
            digest = _hexadecimal(value.removeprefix("sha256:"), argument)
            materials.append({"name": argument.removesuffix("_DIGEST").lower(), "digest": {"sha256": digest}})
    definition = {
        "buildType": IMAGE,
        "externalParameters": {"image": image, "arguments": dict(arguments)},
        "resolvedDependencies": materials,
    }
    return _statement(f"reimagen/{image}", _hexadecimal(sha256, "sha256"), definition, builder)


def check(document: Any) -> None:
    """Whether a document is a statement with provenance: in-toto's and SLSA's own messages, without unknown fields.

    Raises:
        ValueError: it is not; the message says what is wrong.
    """
    try:
        parsed = json_format.ParseDict(document, statement_pb2.Statement())  # pyright: ignore[reportAttributeAccessIssue]
        Statement.copy_from_pb(parsed).validate()
        if parsed.predicate_type != PREDICATE:
            raise ValueError(f"predicateType: {parsed.predicate_type!r} is not {PREDICATE}")
        made = json_format.ParseDict(document["predicate"], provenance_pb2.Provenance())  # pyright: ignore[reportAttributeAccessIssue]
        for dependency in made.build_definition.resolved_dependencies:
            ResourceDescriptor.copy_from_pb(dependency).validate()
    except (json_format.ParseError, TypeError, AttributeError) as error:
        raise ValueError(f"statement: {error}") from None
    if not made.build_definition.build_type or not made.run_details.builder.id:
        raise ValueError("statement: buildType and builder.id are required")


def trained_on(path: Path) -> dict[str, Any]:
    """What the header of published weights says of their training: preset, step, examples, corpus, held-out loss.

    Raises:
        ValueError: the file is no published weights.
    """
    try:
        with safe_open(path, "np") as opened:
            return json.loads(opened.metadata()["trained"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weights: {path} does not say what it was trained on ({error!r})") from None


def _statement(name: str, sha256: str, definition: Mapping[str, Any], builder: str) -> dict[str, Any]:
    made = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": sha256}}],
        "predicateType": PREDICATE,
        "predicate": {"buildDefinition": dict(definition), "runDetails": {"builder": {"id": builder}}},
    }
    check(made)
    return made


def _published(path: Path) -> str:
    command = ["git", "-C", str(path.resolve().parent), "log", "-1", "--format=%H", "--", path.name]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def _commit(commit: str) -> str:
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"commit: {commit!r} is no commit's 40 digits; say which with --commit")
    return commit


def _hexadecimal(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{name}: {value!r} is no sha256 of 64 digits")
    return value
