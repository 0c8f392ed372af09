"""A running stack with tiny weights, a small suite for it, and a folder in which it was drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import Client
from common.corpus import Facet, Pair, write_corpus
from common.scenes import scene_phrases
from evaluation.entitydraw.results import RunFolder
from evaluation.entitydraw.runner import RunSettings, run_suite
from evaluation.entitydraw.scoring import Galleries
from evaluation.entitydraw.suite_file import FORMAT, Suite, read_suite
from evaluation.entitydraw.systems import BUILT_IN
from evaluation.suite import by_style
from tests.client.conftest import generator_address
from tests.generator_svc.conftest import generator, host, knowledge_base, make_generator, retrieval_address, weights
from tests.generator_svc.tiny_stack import STYLES, make_pairs

__all__ = ["generator", "generator_address", "host", "knowledge_base", "make_generator", "retrieval_address", "weights"]

ENTITIES = {"guide dog": 9, "red apple": 5, "steam locomotive": 2}
SCENES = {"noto": "on a blue background", "twemoji": "small in the top left corner, on a red background"}


def suite_document() -> dict[str, Any]:
    """Three entities in two styles, two prompts each."""
    return {
        "format": FORMAT,
        "name": "tiny",
        "about": "coloured squares",
        "categories": {"things": ["{name}, on a white background"]},
        "entities": [
            {
                "name": name,
                "category": "things",
                "frequency": frequency,
                "references": [{"pair": f"{style}--{name.replace(' ', '-')}"} for style in STYLES],
                "prompts": [
                    {"template": f"{{name}}, {style} style, {scene}", "target": f"{style}--{name.replace(' ', '-')}"}
                    for style, scene in SCENES.items()
                ],
            }
            for name, frequency in ENTITIES.items()
        ],
    }


def silent(task: str, done: int, total: int) -> None:
    """Progress that is not shown."""
    assert 0 <= done <= total


@pytest.fixture(scope="session")
def held_out() -> list[Pair]:
    """The pairs of the suite's entities."""
    return [replace(pair, held_out=True) for pair in make_pairs() if pair.entity in ENTITIES]


@pytest.fixture(scope="session")
def corpus(held_out: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their corpus."""
    folder = tmp_path_factory.mktemp("suite") / "corpus"
    style = Facet(name="style", template="{value} style", values=STYLES)
    write_corpus(folder, held_out, name="tiny", version="1", facets=(style,), scene_phrases=scene_phrases())
    return folder


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The suite's file."""
    path = tmp_path_factory.mktemp("suite") / "tiny.json"
    path.write_text(json.dumps(suite_document()))
    return path


@pytest.fixture(scope="session")
def suite(suite_file: Path, corpus: Path) -> Suite:
    """The suite, read."""
    return read_suite(suite_file, corpus)


@pytest.fixture(scope="session")
def galleries(suite: Suite, held_out: list[Pair]) -> Galleries:
    """What its pictures are compared with."""
    return Galleries(suite, by_style(held_out, min_gallery=2))


@pytest.fixture(scope="session")
def drawing(generator_address: str) -> Iterator[Client]:
    """A client of the running generator."""
    with Client(generator_address) as client:
        yield client


@pytest.fixture(scope="session")
def drawn(suite: Suite, drawing: Client, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of all built-in systems, two pictures a prompt. Tests leave it as it is."""
    folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
    run_suite(suite, tuple(BUILT_IN.values()), drawing, folder, RunSettings(pictures=2, command="a command"), silent)
    return folder
