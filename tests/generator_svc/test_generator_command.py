"""`python -m generator_svc`: what is wrong with the settings or the weights ends it with one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from common.checkpoint import publish_stage
from generator_svc.__main__ import main
from tests.generator_svc.tiny_stack import TINY_UNETS, tiny_unet

File = Callable[[Path], object]


@pytest.fixture(autouse=True)
def leave_the_logs_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command takes over the logs of its process, which here are pytest's."""
    monkeypatch.setattr("generator_svc.__main__.configure_logs", lambda **settings: None)


def run(capsys: pytest.CaptureFixture[str], weights: Path, socket: Path, *flags: str) -> str:
    """What the command says on standard error, where it ends with status 2 and one line."""
    given = ["serve", f"--address=unix:{socket}", f"--weights={weights}", "--retrieval-address=unix:/nowhere"]
    assert main([*given, *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith("Loading weights")]
    assert len(lines) == 1, said.err
    return lines[0]


def cut(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "named"),
    [
        ("unet_64.safetensors", cut, "unet_64.safetensors is corrupted"),
        ("unet_256.safetensors", flip, "unet_256.safetensors is corrupted"),
        ("unet_1024.safetensors", Path.unlink, "unet_1024.safetensors is missing"),
        ("manifest.json", Path.unlink, "manifest.json does not exist"),
        ("manifest.json", cut, "manifest.json is not JSON"),
    ],
)
def test_damaged_weights_are_named(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, name: str, damage: File, named: str
) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(weights, copy)
    damage(copy / name)
    assert named in run(capsys, copy, tmp_path / "g.sock")


def test_missing_weights_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"{tmp_path}/none/manifest.json does not exist" in run(capsys, tmp_path / "none", tmp_path / "g.sock")


def test_weights_of_another_stage_are_named(capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(weights, copy)
    publish_stage(copy, 256, TINY_UNETS[64], tiny_unet(64).state_dict(), {})
    said = run(capsys, copy, tmp_path / "g.sock")
    assert "unet_256.safetensors" in said and "enlarge 1 times" in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--device=abacus"], "--device: 'abacus' cannot be used here"),
        (["--threads=-1"], "--threads: -1 is negative"),
        (["--threads=some"], "--threads: 'some' is not a whole number"),
        (["--max-batch=0"], "--max-batch: 0 is not positive"),
        (["--max-live-bytes=0"], "--max-live-bytes: 0 is not positive"),
        (["--retrieval-timeout-s=nan"], "--retrieval-timeout-s: nan is not positive"),
        (["--text-encoder=/nowhere/encoder"], "--text-encoder: '/nowhere/encoder' cannot be loaded"),
        (["--triton-key-file=key"], "--triton-certificate-file: missing; each needs the other"),
        (["--retrieval-certificate-file=crt", "--retrieval-key-file=key"], "--retrieval-ca-file: missing;"),
        (
            ["--stages=triton", "--triton-addresses=127.0.0.1:1", "--triton-ca-file=/nowhere/ca.crt"],
            "--triton-ca-file: /nowhere/ca.crt: No such file or directory",
        ),
        (["--retrieval-ca-file=/nowhere/ca.crt"], "--retrieval-ca-file: /nowhere/ca.crt: No such file or directory"),
        (["--address=unix:/nowhere/g.sock"], "folder of 'unix:/nowhere/g.sock' does not exist"),
    ],
)
def test_bad_settings_are_named(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    assert named in run(capsys, weights, tmp_path / "g.sock", *flags)


def test_unknown_and_missing_settings_are_named(
    capsys: pytest.CaptureFixture[str], weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["serve", f"--weights={weights}"]) == 2
    assert "--retrieval-address: missing" in capsys.readouterr().err
    monkeypatch.setenv("REIMAGEN_GENERATOR_WEIGHT", "x")
    assert "REIMAGEN_GENERATOR_WEIGHT: no such setting" in run(capsys, weights, tmp_path / "g.sock")
