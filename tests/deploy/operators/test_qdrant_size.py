"""Sizes of Qdrant: the formula by hand, and the plan that the service asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.operators.__main__ import main
from deploy.operators.qdrant_size import PLANS, size
from retrieval_svc.settings import RetrievalSettings

BY_NAME = {plan.name: plan for plan in PLANS}


def test_a_plan_is_what_the_service_makes_collections_with() -> None:
    settings = RetrievalSettings(data=Path("library"))
    assert settings.qdrant_quantization == "turbo4"
    assert BY_NAME["turbo4"].m == settings.qdrant_m


def test_400_million_pairs_by_hand() -> None:
    told = size(400_000_000, BY_NAME["turbo4"], dimensions=512, payload_bytes=500, copies=2, node_gb=128)
    searched = 102.4 + 51.2 + 8.0  # codes, links, ids; GB
    assert told.memory_gb == pytest.approx(1.2 * searched)
    assert told.disk_gb == pytest.approx(1.25 * (searched + 409.6 + 200.0))
    assert told.nodes == 5  # 388 GB of both copies, 96 on each


def test_copies_are_on_different_nodes() -> None:
    assert size(1000, BY_NAME["int8"], dimensions=512, payload_bytes=500, copies=3, node_gb=128).nodes == 3


@pytest.mark.parametrize(
    "flag", ["--pairs=-1", "--pairs=0", "--dimensions=0", "--payload-bytes=nan", "--copies=0", "--node-gb=0"]
)
def test_what_cannot_be_is_named(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag] if flag.startswith("--pairs") else ["--pairs=1", flag]
    assert main(["size-qdrant", *flags]) == 2
    assert flag.split("=")[0].strip("-").replace("-", "_") in capsys.readouterr().err
