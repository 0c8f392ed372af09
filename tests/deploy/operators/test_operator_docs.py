"""The pages for operators: their commands run, their tables are what commands print, their links lead somewhere.

Blocks: `sh` is run here; `sh fill` has names of the reader's own and is parsed; `sh cluster`, `sh network` are marked, not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.unet.unet import UNet
from deploy.images.__main__ import main as images_main
from deploy.images.__main__ import parser as images_parser
from deploy.local.children import ROOT
from deploy.operators.__main__ import main
from deploy.operators.__main__ import parser as operators_parser
from generator_svc.__main__ import main as generator_main
from generator_svc.live_bytes import live_bytes
from retrieval_svc.__main__ import main as retrieval_main
from trainer.__main__ import main as trainer_main
from trainer.presets import preset

PAGES = (*sorted((ROOT / "deploy" / "operators").glob("*.md")), ROOT / "deploy" / "images" / "README.md")
KINDS = ("sh", "sh fill", "sh cluster", "sh network", "python", "")
PRESETS = ("demo-64", "demo-256", "demo-1024", "paper-64", "paper-64-small", "paper-256", "paper-1024")
MAINS = {"deploy.operators": main, "deploy.images": images_main}
SERVICES = {"generator_svc": generator_main, "retrieval_svc": retrieval_main, "trainer": trainer_main}
PARSERS = {"deploy.operators": operators_parser, "deploy.images": images_parser}


def blocks(kind: str) -> Iterator[tuple[Path, str]]:
    """Lines of all pages' blocks of this kind."""
    for page in PAGES:
        for found, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.M | re.S):
            assert found in KINDS, f"{page}: a block of kind {found!r}"
            if found == kind:
                yield from ((page, line) for line in text.splitlines() if line.strip())


def test_every_command_of_the_pages_runs(tmp_path: Path) -> None:
    """As it stands, but for what is written and where programs are; the drill itself is test_restore_drill.py's."""
    ran = 0
    for page, line in blocks("sh"):
        words = shlex.split(line)
        if "restore-drill" in words:
            operators_parser().parse_args(words[3:])
            continue
        words = [word.replace("build/", f"{tmp_path}/") for word in words]
        if words[2] in MAINS:
            assert MAINS[words[2]](words[3:]) == 0, f"{page.name}: {line}"
        else:
            program = Path(sys.executable).with_name(words[0])
            command = [str(program) if program.exists() else words[0], *words[1:]]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 8


def test_commands_with_names_to_fill_in_are_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for page, line in blocks("sh fill"):
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"], page
        if words[2] in PARSERS:
            PARSERS[words[2]]().parse_args(words[3:])
            continue
        with pytest.raises(SystemExit) as ended:
            SERVICES[words[2]]([words[3], "--help"])
        said = capsys.readouterr().out
        flags = {word.partition("=")[0] for word in words[4:] if word.startswith("--")}
        assert ended.value.code == 0 and all(flag in said for flag in flags), f"{page.name}: {line}"


def test_what_was_not_run_is_of_clusters_and_networks_alone() -> None:
    for page, line in blocks("sh cluster"):
        assert line.split()[0] in ("kubectl", "cosign", "git"), f"{page.name}: {line}"
    for page, line in blocks("sh network"):
        assert line.split()[0] in ("make", "docker") or "provenance-image" in line, f"{page.name}: {line}"


@pytest.mark.parametrize("command", ["capacity --arrivals 12 --deadline 5", "size-qdrant --pairs 1e6 50e6 400e6"])
def test_tables_are_what_the_commands_print(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 0
    page = "capacity.md" if command.startswith("capacity") else "sizing.md"
    assert capsys.readouterr().out in (ROOT / "deploy" / "operators" / page).read_text()


def test_the_table_of_stages_is_computed_from_their_shapes() -> None:
    """What orders keep, of all presets; parameters of those that are quickly made (`fit --dry-run` tells the others')."""
    text = (ROOT / "deploy" / "operators" / "sizing.md").read_text()
    for name in PRESETS:
        row = preset(name)
        one = live_bytes(
            row.unet, row.stage, num_pictures=1, num_tokens=128, num_neighbors=row.neighbors, element_bytes=2
        )
        (line,) = re.findall(rf"^\| {name} \|.*$", text.partition("## Training")[0], re.M)
        assert line.endswith(f"| {one / 2**20:.1f} MiB | {8 * one / 2**20:.0f} MiB |"), line
        if name.startswith("demo"):
            with torch.device("meta"):
                parameters = sum(parameter.numel() for parameter in UNet(row.unet).parameters())
            assert f"| {parameters / 1e6:,.1f} M | {parameters * 2 / 2**20:,.0f} MiB |" in line


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_guides() -> None:
    index = (ROOT / "deploy" / "operators" / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")
    for guide in (ROOT / "README.md", ROOT / "deploy" / "k8s" / "README.md"):
        assert "operators/README.md" in guide.read_text() and "images/README.md" in guide.read_text(), guide
