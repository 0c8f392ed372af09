"""Every command and every program of client/README.md, against the real services with tiny weights; those of training are
in test_trainer_client.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
README = ROOT / "client" / "README.md"
GENERATOR, RETRIEVAL = "127.0.0.1:50052", "127.0.0.1:50051"
TIMEOUT_S = 120.0


def blocks(language: str) -> list[str]:
    """The code of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a picture of a dog."""
    made = tmp_path_factory.mktemp("readme")
    Image.new("RGB", (32, 32), "orange").save(made / "dog.png")
    return made


def ran(command: list[str], code: str, folder: Path, generator: str, retrieval: str) -> str:
    """What code says, in the folder, about the running stack instead of the README's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = code.replace(GENERATOR, generator).replace(RETRIEVAL, retrieval)
    done = subprocess.run(
        [*command, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands(folder: Path, generator_address: str, retrieval_address: str) -> None:
    drawing, bases, _ = blocks("sh")
    shell = ["bash", "-e", "-u", "-c"]
    ran(shell, drawing, folder, generator_address, retrieval_address)
    assert (folder / "out" / "image-7.png").is_file() and (folder / "again" / "image-7.webp").is_file()
    assert len(list((folder / "two").glob("stage-64-*.png"))) == 2 and list((folder / "varied" / "previews").iterdir())
    with Image.open(folder / "out" / "image-7.png") as first, Image.open(folder / "again" / "image-7.webp") as second:
        assert first.convert("RGB").tobytes() == second.convert("RGB").tobytes()
    exports = "".join(line for line in drawing.splitlines(keepends=True) if line.startswith("export"))
    waiting = 'until reimagen kb search toys "toy dog" | grep -q dog; do sleep 0.1; done\n'
    before, search, after = bases.partition("reimagen kb search")
    said = ran(shell, exports + before + waiting + search + after, folder, generator_address, retrieval_address)
    assert "dog\ttoy dog, clay style\tme\tCC0-1.0" in said
    assert (folder / "got.png").read_bytes() == (folder / "dog.png").read_bytes()


def test_the_programs(folder: Path, generator_address: str, retrieval_address: str) -> None:
    program, concurrent, _ = blocks("python")
    said = ran([sys.executable, "-c"], program, folder, generator_address, retrieval_address)
    assert "CC-BY-4.0" in said and "SERVING" in said and (folder / "dog-7.png").is_file()
    assert "StepDone" in said and "['demo']" in said
    said = ran([sys.executable, "-c"], concurrent, folder, generator_address, retrieval_address)
    assert "Done" in said and "INVALID_ARGUMENT" in said and "num_pictures" in said


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert links and all((README.parent / link).is_file() for link in links)
