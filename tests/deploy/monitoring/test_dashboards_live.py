"""Every query of every dashboard, asked of a real Prometheus that reads a real stack of tiny networks under mixed load:
`make test-dashboards` (REIMAGEN_DASHBOARDS=1), some minutes."""

from __future__ import annotations

import io
import os
import random
import socket
from contextlib import ExitStack

import pytest

from client.display import Lines
from deploy.monitoring.dashboards.boards import BOARDS
from deploy.monitoring.dashboards.description import Source
from deploy.monitoring.dashboards.live.check import Finding, check_until
from deploy.monitoring.dashboards.live.load import Mix, asked
from deploy.monitoring.dashboards.live.prometheus import RULES
from deploy.monitoring.dashboards.live.session import NUM_PORTS, Ground, session
from tests.generator_svc.tiny_stack import write_knowledge_base, write_weights
from tests.trainer.shapes import LetterEncoder, shape_pairs, write_nearest, write_shapes
from trainer.dataset import prepare

pytestmark = pytest.mark.skipif(
    not os.environ.get("REIMAGEN_DASHBOARDS"), reason="make test-dashboards starts its stack"
)

SCRAPE_S, RATE_S, PATIENCE_S = 2.0, 60.0, 240.0
MIX = Mix(
    steps={64: 3, 256: 2, 1024: 1},
    callers=(2, 6),
    methods=("bm25",),
    prompts=("a guide dog, noto style", "an old oak tree"),
    pause_s=0.05,
)


def free_ports() -> int:
    """The first of NUM_PORTS ports in a row that nobody listens on."""
    for first in random.sample(range(12000, 21000, NUM_PORTS), 100):  # test_local_up takes higher ones
        with ExitStack() as probes:
            try:
                for port in range(first, first + NUM_PORTS):
                    probes.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> list[Finding]:
    """What became of every query once all had something to say, or in the end."""
    folder = tmp_path_factory.mktemp("dashboards")
    weights, work, prepared = (folder / name for name in ("weights", "work", "prepared"))
    write_weights(weights)
    write_knowledge_base(work)
    write_shapes(folder / "corpus", shape_pairs())
    prepare(folder / "corpus", prepared, LetterEncoder, lambda task, done, total: None)  # type: ignore[arg-type]
    write_nearest(folder / "corpus", prepared, shape_pairs())
    ground = Ground(
        weights=weights,
        work=work,
        prepared=prepared,
        clip="",
        first_port=free_ports(),
        scrape_s=SCRAPE_S,
        rules=tuple(sorted(RULES.glob("*.yaml"))),
        steps_between=3,
    )
    with session(ground, folder, Lines(io.StringIO())) as running, asked(running.generators, running.retrieval, MIX):
        return check_until(BOARDS, running.prometheus, rate_s=RATE_S, patience_s=PATIENCE_S, pause_s=SCRAPE_S)


def told(findings: list[Finding], source: Source) -> list[str]:
    assert any(each.panel.source is source for each in findings)
    return [
        f"{each.board.name} / {each.panel.title}: {each.fault}: {each.query.expr}"
        for each in findings
        if each.panel.source is source and each.fault
    ]


def test_every_query_on_the_stack_finds_series(findings: list[Finding]) -> None:
    assert told(findings, Source.STACK) == []


@pytest.mark.parametrize("source", [Source.DCGM, Source.QDRANT, Source.KUBERNETES], ids=lambda source: source.name)
def test_every_query_finds_series_of_a_made_up_exporter(findings: list[Finding], source: Source) -> None:
    assert told(findings, source) == []
