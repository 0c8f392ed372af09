"""Bills of materials (CycloneDX 1.6): the Python of an environment, and published weights."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from common.checkpoint import MANIFEST, CheckpointError, read_manifest
from common.files import sha256_file, write_atomic
from common.version import VERSION
from deploy.images.provenance import trained_on


def of_environment(python: Path, out: Path) -> None:
    """Write what an environment holds, by its interpreter, as cyclonedx-bom finds it; without times.

    Raises:
        ValueError: the environment cannot be read, or what came out is no CycloneDX.
    """
    if not python.is_file():
        raise ValueError(f"environment: {python} is not there")
    command = [f"{sysconfig.get_path('scripts')}/cyclonedx-py", "environment", "--output-reproducible", "--validate"]
    command += ["--sv", "1.6", "--of", "JSON", "-o", "-", str(python)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    if done.returncode != 0:
        raise ValueError(f"environment: {python}: {done.stderr}")
    write_atomic(out, done.stdout)


def of_weights(folder: Path, out: Path) -> None:
    """Write the bill of a folder of published weights: each file a model, with its digest and what it was trained on.

    Raises:
        CheckpointError: a file is missing, or not what the manifest says.
    """
    models = []
    for name, line in sorted(read_manifest(folder).items()):
        path = folder / name
        if not path.is_file() or sha256_file(path) != line["sha256"]:
            raise CheckpointError(f"weights: {path} is missing, or not what {MANIFEST} says")
        models.append(_model(path, line["sha256"]))
    subject = {"type": "machine-learning-model", "bom-ref": "weights", "name": "reimagen-weights", "version": VERSION}
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": models,
        "dependencies": [{"ref": "weights", "dependsOn": [model["bom-ref"] for model in models]}],
    }
    text = json.dumps(bill, indent=2) + "\n"
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if wrong is not None:
        raise ValueError(f"weights: {wrong}")
    write_atomic(out, text)


def _model(path: Path, sha256: str) -> dict[str, Any]:
    said = [{"name": f"reimagen:trained:{k}", "value": json.dumps(v)} for k, v in trained_on(path).items()]
    return {
        "type": "machine-learning-model",
        "bom-ref": f"{path.name}@sha256:{sha256}",
        "name": path.name,
        "version": sha256[:12],
        "hashes": [{"alg": "SHA-256", "content": sha256}],
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "properties": said,
    }
