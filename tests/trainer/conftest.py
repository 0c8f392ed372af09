"""A small prepared corpus, and the tiny presets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.images import shrink
from tests.trainer.shapes import LetterEncoder, shape_pairs, write_nearest, write_shapes
from trainer.dataset import Prepared, open_prepared, prepare
from trainer.presets import Preset, preset


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "corpus"
    write_shapes(folder, shape_pairs())
    return folder


@pytest.fixture(scope="session")
def prepared_folder(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prepare` wrote, with neighbors by hand."""
    folder = tmp_path_factory.mktemp("prepared") / "shapes"
    prepare(corpus_folder, folder, LetterEncoder, lambda task, done, total: None)  # type: ignore[arg-type]
    write_nearest(corpus_folder, folder, shape_pairs())
    return folder


@pytest.fixture(scope="session")
def prepared(prepared_folder: Path) -> Prepared:
    """Opened; with an 8-pixel size, so that a small entity can be drawn in a 16-pixel picture."""
    opened = open_prepared(prepared_folder)
    return replace(opened, pictures={**opened.pictures, 8: shrink(np.asarray(opened.pictures[16]), 2)})


@pytest.fixture
def tiny() -> Preset:
    """The first stage, small."""
    return preset("tiny-64")


@pytest.fixture
def tiny_256() -> Preset:
    """A super-resolution stage, small."""
    return preset("tiny-256")
