"""Provenance, signatures and bills of materials: of the committed weights, and what they refuse."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from common.files import sha256_file
from deploy.images import provenance
from deploy.images.__main__ import main
from deploy.images.catalog import FOLDER, ROOT

WEIGHTS = ROOT / "weights"
COMMIT = "1" * 40
STAGES = ("unet_64", "unet_256", "unet_1024")


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, PEM."""
    private = Ed25519PrivateKey.generate()
    paths = (folder / f"{name}.pem", folder / f"{name}.pub")
    paths[0].write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    paths[1].write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return paths


@pytest.mark.parametrize("stage", STAGES)
def test_a_statement_is_of_the_file_and_says_what_its_header_says(stage: str) -> None:
    path = WEIGHTS / f"{stage}.safetensors"
    made = provenance.of_weights(path, commit=COMMIT)
    assert made["subject"] == [{"name": path.name, "digest": {"sha256": sha256_file(path)}}]
    definition = made["predicate"]["buildDefinition"]
    trained = provenance.trained_on(path)
    assert definition["externalParameters"]["preset"] == trained["preset"]
    assert definition["internalParameters"]["trained"]["examples"] == trained["examples"]
    corpus, source = definition["resolvedDependencies"]
    assert corpus["digest"] == {"sha256": trained["corpus_fingerprint"]}
    assert source["digest"] == {"gitCommit": COMMIT}
    assert definition["internalParameters"]["commit"] == "trained the weights"


def test_without_a_commit_the_one_that_published_the_file_is_named_and_called_so(tmp_path: Path) -> None:
    copied = tmp_path / "unet_64.safetensors"
    shutil.copy(WEIGHTS / copied.name, copied)
    with pytest.raises(ValueError, match="commit: ''"):
        provenance.of_weights(copied)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    head = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    definition = provenance.of_weights(copied)["predicate"]["buildDefinition"]
    assert definition["resolvedDependencies"][1]["digest"] == {"gitCommit": head}
    assert definition["internalParameters"]["commit"] == "published the weights"


def test_the_dual_encoder_names_its_trunk() -> None:
    made = provenance.of_weights(WEIGHTS / "clip" / "dual_encoder.safetensors", commit=COMMIT)
    definition = made["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["command"][-1] == "fit-clip"
    assert [line["name"] for line in definition["resolvedDependencies"]] == ["corpus", "source", "trunk"]


def test_a_statement_of_an_image_names_all_that_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bases, out = tmp_path / "bases.json", tmp_path / "s.json"
    bases.write_text(json.dumps({"DEBIAN_DIGEST": "sha256:" + "a" * 64}))
    lock = next(path for path in FOLDER.glob("packages/generator.lock"))
    made = provenance.of_image(
        "generator",
        "b" * 64,
        lock=lock,
        arguments={"DEBIAN_DIGEST": "sha256:" + "a" * 64, "LOCK": "generator"},
        commit=COMMIT,
    )
    named = {line["name"]: line["digest"] for line in made["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert named["debian"] == {"sha256": "a" * 64}
    assert named["lock"] == {"sha256": sha256_file(lock)}
    assert named["Dockerfile"] == {"sha256": sha256_file(FOLDER / "generator.Dockerfile")}
    asked = ["provenance-image", "generator", "--snapshot=20261101T000000Z", f"--bases={bases}", f"--out={out}"]
    monkeypatch.setattr(
        "deploy.images.__main__.source_revision", lambda: (f"{COMMIT}-dirty", "2026-11-29T00:00:00+00:00")
    )
    assert main([*asked, f"--sha256={'b' * 64}"]) == 2
    assert f"source: {COMMIT}-dirty" in capsys.readouterr().err
    monkeypatch.setattr("deploy.images.__main__.source_revision", lambda: (COMMIT, "2026-11-29T00:00:00+00:00"))
    assert main([*asked, "--sha256=zz"]) == 2
    assert not out.exists()
    assert main([*asked, f"--sha256=sha256:{'b' * 64}"]) == 0
    assert json.loads(out.read_text())["subject"][0]["digest"] == {"sha256": "b" * 64}


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        del document[path[-1]]

    return change


def _with(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("_type"),
        _with("https://in-toto.io/Statement/v0.1", "_type"),
        _with([], "subject"),
        _with([{"name": "a"}], "subject"),
        _with("https://slsa.dev/provenance/v0.2", "predicateType"),
        _without("predicate"),
        _without("predicate", "buildDefinition", "buildType"),
        _without("predicate", "runDetails", "builder"),
        _with(1, "predicate", "buildDefinition", "madeUp"),
        _with([{}], "predicate", "buildDefinition", "resolvedDependencies"),
        _with(1, "extra"),
    ],
)
def test_what_is_no_statement_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    made = provenance.of_weights(WEIGHTS / "unet_64.safetensors", commit=COMMIT)
    provenance.check(copy.deepcopy(made))
    change(made)
    with pytest.raises(ValueError):
        provenance.check(made)


def test_a_signature_holds_for_its_file_and_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = key_pair(tmp_path, "ours"), key_pair(tmp_path, "theirs")
    weights, statement, envelope = WEIGHTS / "unet_64.safetensors", tmp_path / "s.json", tmp_path / "e.json"
    assert main(["provenance-weights", str(weights), f"--commit={COMMIT}", f"--out={statement}"]) == 0
    assert main(["sign", str(statement), f"--key={ours[0]}", f"--out={envelope}"]) == 0
    asked = ["verify", str(envelope), f"--key={ours[1]}", f"--of={weights}"]
    assert main(asked) == 0
    assert COMMIT in capsys.readouterr().out
    assert main([*asked[:2], f"--key={theirs[1]}", asked[3]]) == 2, "another's key"
    assert main([*asked[:3], f"--of={WEIGHTS / 'unet_256.safetensors'}"]) == 2, "another file"
    signed = json.loads(envelope.read_text())
    for name, value in (
        ("payload", signed["payload"][:-8] + "AAAAAAA="),
        ("payloadType", "text/plain"),
        ("signatures", []),
    ):
        (tmp_path / "altered.json").write_text(json.dumps({**signed, name: value}))
        assert main(["verify", str(tmp_path / "altered.json"), *asked[2:]]) == 2, name
    assert main(["sign", str(statement), f"--key={ours[1]}", f"--out={tmp_path}/no.json"]) == 2, "no private key"
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize("wrong", ["statement", "envelope", "key"])
def test_a_file_that_is_something_else_is_named(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = key_pair(tmp_path, "ours")
    weights, statement, envelope = WEIGHTS / "unet_64.safetensors", tmp_path / "s.json", tmp_path / "e.json"
    assert main(["provenance-weights", str(weights), f"--commit={COMMIT}", f"--out={statement}"]) == 0
    assert main(["sign", str(statement), f"--key={private}", f"--out={envelope}"]) == 0
    other = tmp_path / "other"
    other.write_text("neither JSON nor PEM")
    asked = {
        "statement": [["sign", str(other), f"--key={private}", f"--out={tmp_path}/no"]],
        "envelope": [["verify", str(path), f"--key={public}", f"--of={weights}"] for path in (other, statement)],
        "key": [
            ["sign", str(statement), f"--key={other}", f"--out={tmp_path}/no"],
            ["verify", str(envelope), f"--key={other}", f"--of={weights}"],
            ["verify", str(envelope), f"--key={private}", f"--of={weights}"],
        ],
    }
    for command in asked[wrong]:
        capsys.readouterr()
        assert main(command) == 2
        said = capsys.readouterr().err
        file = command[2].partition("=")[2] if wrong == "key" else command[1]
        assert f"{wrong}: {file}: " in said, said


def test_the_committed_bill_is_of_the_committed_weights(tmp_path: Path) -> None:
    out = tmp_path / "bill.json"
    assert main(["sbom", f"--weights={WEIGHTS}", f"--out={out}"]) == 0
    committed = FOLDER / "weights.cdx.json"
    assert out.read_text() == committed.read_text(), "python -m deploy.images sbom --weights weights --out ..."
    hashes = {line["name"]: line["hashes"][0]["content"] for line in json.loads(out.read_text())["components"]}
    assert hashes == {f"{stage}.safetensors": sha256_file(WEIGHTS / f"{stage}.safetensors") for stage in STAGES}


def test_a_bill_of_altered_weights_is_not_written(tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    path = tmp_path / "weights" / "unet_256.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert main(["sbom", f"--weights={tmp_path / 'weights'}", f"--out={tmp_path}/bill.json"]) == 2
    assert not (tmp_path / "bill.json").exists()


def test_a_bill_of_an_environment_names_its_packages(tmp_path: Path) -> None:
    """Of a small one; `make test-images` makes that of an image."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "small")], check=True)
    (site,) = (tmp_path / "small").glob("lib/python*/site-packages")
    (site / "toy-1.2.dist-info").mkdir()
    (site / "toy-1.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: toy\nVersion: 1.2\nLicense: MIT\n"
    )
    python, out = tmp_path / "small" / "bin" / "python", tmp_path / "bill.json"
    assert main(["sbom", f"--environment={python}", f"--out={out}"]) == 0
    assert [(line["name"], line["version"]) for line in json.loads(out.read_text())["components"]] == [("toy", "1.2")]
    assert main(["sbom", f"--environment={tmp_path}/nowhere", f"--out={tmp_path}/other.json"]) == 2
