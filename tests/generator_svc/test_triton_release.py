"""From weights to what running Tritons serve, and back: no request is lost, and a bad version undoes itself."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.checkpoint import CheckpointError, publish_stage, read_manifest
from deploy.local.tritonserver import TritonServer, TritonSettings, running_triton
from generator_svc.__main__ import main
from generator_svc.export import ExportSettings, export
from generator_svc.model_versions import CARD, CONFIG, alone, list_versions, prune, roll_back, served_version
from tests.generator_svc.served import Asked, asked
from tests.generator_svc.test_triton_conformance import plans, text_inputs
from tests.generator_svc.test_triton_repository import draw, other_weights
from tests.generator_svc.tiny_stack import TINY_UNETS, Host, tiny_unet

MODEL = "unet_64"
LONG = plans(64, 7, 300), text_inputs(3, 2)  # about a second
SHORT = plans(64, 7, 2), text_inputs(3, 2)


@pytest.fixture
def repository(triton_repository: Path, tmp_path: Path) -> Path:
    """A repository of the first stage alone, to be changed."""
    shutil.copytree(triton_repository / MODEL, tmp_path / "repository" / MODEL)
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A tritonserver over it."""
    settings = TritonSettings(repository=repository, log=tmp_path / "triton.log", admin_key="the-key", nice=3)
    with running_triton(settings) as running:
        yield running


def published(weights: Path, repository: Path, **more: object) -> dict[str, int]:
    """The first stage's version after an export."""
    given = {"models": MODEL, "threads": 1, "batches": "1,4"} | more
    return export(ExportSettings(weights=weights, repository=repository, **given))  # type: ignore[arg-type]


def scaled(weights: Path, folder: Path, factor: float) -> Path:
    """The weights with a first stage that draws something else; infinite ones are no network."""
    shutil.copytree(weights, folder)
    tensors = {name: tensor * factor for name, tensor in tiny_unet(64).state_dict().items()}
    publish_stage(folder, 64, TINY_UNETS[64], tensors, {"preset": "tiny-64", "step": round(factor * 100)})
    return folder


def test_a_version_says_what_it_is(weights: Path, tmp_path: Path) -> None:
    figures = tmp_path / "demo.json"
    figures.write_text(json.dumps({"entity_r1": 0.5}))
    repository = tmp_path / "r"
    assert published(weights, repository, evaluation=figures)[MODEL] == 1
    version = repository / MODEL / "1"
    card, manifest = json.loads((version / CARD).read_text()), read_manifest(version)
    assert card["evaluation"] == {"entity_r1": 0.5} and card["stage"]["size"] == 64
    assert card["trained"] == {"examples": 0}
    assert card["weights_sha256"] == manifest[f"{MODEL}.safetensors"]["sha256"]
    assert card["parameters"] == sum(each.numel() for each in tiny_unet(64).parameters())
    assert set(manifest) == {CARD, f"{MODEL}.safetensors"}
    assert (repository / MODEL / CONFIG).read_text() == (version / CONFIG).read_text()
    assert published(weights, repository, evaluation=figures)[MODEL] == 1
    figures.write_text(json.dumps({"entity_r1": 0.6}))
    assert published(weights, repository, evaluation=figures)[MODEL] == 2, "measured again"


def test_going_back_and_forth(weights: Path, tmp_path: Path) -> None:
    repository, model = tmp_path / "r", tmp_path / "r" / MODEL
    for number, factor in ((1, 1.0), (2, 1.1), (3, 1.2)):
        assert published(scaled(weights, tmp_path / f"w{number}", factor), repository)[MODEL] == number
        assert served_version(model) == number
    assert roll_back(model) == 2 == served_version(model)
    assert roll_back(model) == 1 == served_version(model)
    with pytest.raises(CheckpointError, match="no version before 1"):
        roll_back(model)
    with pytest.raises(CheckpointError, match="no version 7"):
        roll_back(model, 7)
    assert roll_back(model, 3) == 3
    file = model / "2" / f"{MODEL}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is not what manifest\.json says"):
        roll_back(model, 2)
    assert [(each.number, each.is_served) for each in list_versions(model)] == [(1, False), (2, False), (3, True)]


def test_old_versions_go_but_not_the_served_one(weights: Path, tmp_path: Path) -> None:
    repository, model = tmp_path / "r", tmp_path / "r" / MODEL
    for number in range(1, 4):
        published(scaled(weights, tmp_path / f"w{number}", 1 + number / 10), repository)
    roll_back(model, 1)
    (model / ".2.old" / "left").mkdir(parents=True)  # by a prune that was killed
    assert prune(model, 1) == [2]
    assert sorted(path.name for path in model.iterdir()) == ["1", "3", CONFIG]
    new = scaled(weights, tmp_path / "w9", 1.9)
    flags = ["--weights", new, "--repository", repository, "--models", MODEL, "--threads", 1, "--keep", 1]
    assert command("export", *flags, "--batches", "1,4") == 0
    assert sorted(path.name for path in model.iterdir()) == ["4", CONFIG]
    assert command("export", *flags, "--batches", "1,2") == 0
    assert served_version(model) == 5, "served in another way: going back gives the way of before, too"


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def key_file(server: TritonServer, tmp_path: Path) -> Path:
    """A file with the server's key."""
    (tmp_path / "key").write_text(f"{server.admin_key}\n")
    return tmp_path / "key"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Runs a command on the repository, which then has the server load what comes of it, in a process of its own."""

    flags: Sequence[object]

    def __call__(self, name: str, *words: object) -> tuple[int, str]:
        small = ["--models", MODEL, "--threads", 1, "--batches", "1,4"] if name == "export" else ["--model", MODEL]
        line = [sys.executable, "-m", "generator_svc", name, *self.flags, *small, *words]
        done = subprocess.run([str(word) for word in line], capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def release(server: TritonServer, repository: Path, key_file: Path) -> Release:
    """Of the server's repository."""
    where = ["--triton-addresses", server.address, "--triton-admin-key-file", key_file]
    return Release(flags=["--repository", repository, *where])


def test_a_server_and_its_models_yield_as_they_are_told(server: TritonServer) -> None:
    for pid in (server.pid, *server.stubs()):
        assert os.getpriority(os.PRIO_PROCESS, pid) - os.getpriority(os.PRIO_PROCESS, 0) == 3
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH


def test_requests_under_way_end_with_their_version_and_the_next_have_the_new_one(
    host: Host, server: TritonServer, repository: Path, release: Release, weights: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    async def drawn(asking: Asked, order: tuple[Any, Any]) -> tuple[np.ndarray, str]:
        pictures, info = await asking.draw(*order)
        return pictures, info.version

    async def ask() -> set[str]:
        async with asked(64, server.address) as asking:
            before, version = await drawn(asking, SHORT)
            wanted, _ = await drawn(asking, LONG)
            assert version == "1"
            running = [asyncio.create_task(drawn(asking, LONG)) for _ in range(3)]
            await asyncio.sleep(0.2)
            new = scaled(weights, tmp_path / "new", 1.1)
            status, said = await asyncio.to_thread(release, "export", "--weights", new)
            assert status == 0 and f"{MODEL}: version 2" in said, said
            ended = await asyncio.gather(*running)
            for pictures, by in ended:
                assert by == "2" or np.abs(pictures - wanted).max() < 1 / 255
            after, version = await drawn(asking, SHORT)
            assert version == "2" and np.abs(after - before).max() > 0.01
            status, said = await asyncio.to_thread(release, "roll-back")
            assert status == 0 and f"{MODEL}: version 1" in said, said
            again, version = await drawn(asking, SHORT)
            assert version == "1" and again.tobytes() == before.tobytes()
            return {by for _, by in ended}

    print(host.call(ask(), timeout_s=120.0))
    assert command("versions", "--repository", repository) == 0
    listed = capsys.readouterr().out.splitlines()
    assert f"{MODEL} 1 served: examples 0" in listed and f"{MODEL} 2: preset tiny-64, step 110" in listed


def test_a_version_that_cannot_serve_undoes_itself(
    server: TritonServer, repository: Path, release: Release, weights: Path, tmp_path: Path
) -> None:
    before, version = draw(server)
    assert version == "1"
    # Whole, of the right shapes, finite: and yet its passes are not.
    status, said = release("export", "--weights", scaled(weights, tmp_path / "huge", 2e4), "--keep", 1)
    assert status == 2, said
    assert f"{MODEL} version 2: Triton at {server.address}" in said and "says version 1 again" in said
    assert served_version(repository / MODEL) == 1
    assert (repository / MODEL / "1" / f"{MODEL}.safetensors").is_file(), "what is gone back to is not let go"
    again, version = draw(server)
    assert version == "1" and again.tobytes() == before.tobytes()
    status, said = release("export", "--weights", other_weights(weights, tmp_path / "good"))
    assert status == 0, said
    assert draw(server)[1] == "3"


def test_without_the_key_nothing_is_changed(
    server: TritonServer, repository: Path, release: Release, weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "wrong").write_text("another key")
    new = scaled(weights, tmp_path / "new", 1.1)
    status, said = release("export", "--weights", new, "--triton-admin-key-file", tmp_path / "wrong")
    assert status == 2 and "the admin key is missing, or is another's" in said and "the-key" not in said, said
    assert served_version(repository / MODEL) == 1 and draw(server)[1] == "1"


def test_what_is_asked_for_must_be_there(
    repository: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in (
        (["roll-back", "--repository", repository, "--model", "unet_65"], "--model: 'unet_65' is not one of unet_64"),
        (["roll-back", "--repository", repository, "--model", MODEL], "no version before 1"),
        (["versions", "--repository", tmp_path / "r"], "--repository: "),
        (
            ["export", "--weights", weights, "--repository", tmp_path / "r", "--models", "unet_65"],
            "--models: 'unet_65'",
        ),
        (["export", "--weights", weights, "--repository", tmp_path / "r", "--keep", "0"], "--keep: 0 is not positive"),
        (
            ["export", "--weights", weights, "--repository", tmp_path / "r", "--evaluation", tmp_path / "no"],
            "--evaluation",
        ),
        (
            ["export", "--weights", weights, "--repository", tmp_path / "r", "--triton-addresses", "here"],
            "--triton-addresses: 'here' is not host:port",
        ),
    ):
        assert command(*words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    publish_stage(tmp_path / "one", 64, TINY_UNETS[64], tiny_unet(64).state_dict(), {"step": 1})
    assert command("export", "--weights", tmp_path / "one", "--repository", tmp_path / "r") == 2
    assert "holds no unet_256,unet_1024; --models unet_64 is what it holds" in capsys.readouterr().err
    assert not (tmp_path / "r" / MODEL).exists(), "nothing is released by halves"
    with alone(repository):
        assert command("export", "--weights", weights, "--repository", repository) == 2
    assert "is being changed by another process" in capsys.readouterr().err
