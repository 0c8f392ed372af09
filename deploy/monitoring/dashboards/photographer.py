"""A stack of the committed weights under mixed load, with failures on the way: checked, and drawn dashboard by dashboard."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from client.display import Display
from common.corpus import Pair, iter_pairs, read_manifest, write_corpus
from common.files import write_atomic
from deploy.local.children import ROOT, ChildFailed
from deploy.local.knowledge_base import ensure_knowledge_base
from deploy.local.stack import running_retrieval
from deploy.monitoring.dashboards.boards import BOARDS, picture_path
from deploy.monitoring.dashboards.description import Board, Panel, Source, places
from deploy.monitoring.dashboards.drawing import Answered, key, picture
from deploy.monitoring.dashboards.live.check import Finding, check_until, substituted
from deploy.monitoring.dashboards.live.load import Mix, asked
from deploy.monitoring.dashboards.live.prometheus import RULES, Prometheus
from deploy.monitoring.dashboards.live.session import PRESET, Ground, Session, session

NUM_SHOWN, NUM_HELD_OUT, NUM_STYLES = (
    6,
    2,
    5,
)  # entities of the demonstration: shown in training, not shown; styles of each
SCRAPE_S, RATE_S, STEP_S = 5.0, 30.0, 5.0
CHECK_S, PATIENCE_S = 60.0, 300.0
MIX = Mix(steps={64: 8, 256: 3, 1024: 2}, callers=(3, 6), methods=("bm25",), prompts=(), pause_s=0.5)
TRITON_DIES, RETRIEVAL_DIES = 0.35, 0.7  # when, as shares of the load's time
_CAPTION = "What the panels' queries gave, drawn in the dashboard's grid; not a screenshot of Grafana. {load} {made_up}"


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Which weights, on which ports, and where all that it makes is kept."""

    weights: Path
    first_port: int
    state: Path


def check_demonstration(given: Demonstration, display: Display) -> list[Finding]:
    """What became of every query under load: each has some minutes to find something once."""
    with display.live(), _running(given, display) as running, asked(running.generators, running.retrieval, _mix(given)):
        display.say("asking every query")
        return check_until(BOARDS, running.prometheus, rate_s=CHECK_S, patience_s=PATIENCE_S, pause_s=SCRAPE_S)


def draw_demonstration(given: Demonstration, seconds: float, display: Display) -> None:
    """Write every dashboard's picture, of so many seconds of load."""
    with display.live(), _running(given, display) as running, asked(running.generators, running.retrieval, _mix(given)):
        display.say(f"{seconds:.0f} s of load")
        _let_things_fail(running, seconds, display)
        start, end = running.started, time.time()
        for board in BOARDS:
            display.say(f"drawing {board.name}")
            answers = _answers(board, running.prometheus, start, end)
            write_atomic(picture_path(board), picture(board, answers, start, end, _caption(board, end - start)))


def _mix(given: Demonstration) -> Mix:
    """Callers who ask for what is known."""
    return replace(MIX, prompts=[pair.caption for pair in iter_pairs(given.state / "work" / "corpus")])


@contextmanager
def _running(given: Demonstration, display: Display) -> Iterator[Session]:
    folder = given.state.absolute()
    work, prepared = _prepared(folder, display)
    ground = Ground(
        weights=given.weights,
        work=work,
        prepared=prepared,
        clip="",
        first_port=given.first_port,
        scrape_s=SCRAPE_S,
        rules=tuple(sorted(RULES.glob("*.yaml"))),
        steps_between=10,
    )
    with session(ground, folder / f"run-{time.strftime('%Y%m%d-%H%M%S')}", display) as running:
        yield running


def _prepared(folder: Path, display: Display) -> tuple[Path, Path]:
    """A part of the demonstration's corpus with its knowledge base, and what training reads of it; made once."""
    work, prepared, done = folder / "work", folder / "prepared" / "demo", folder / "prepared.done"
    if not done.exists():
        ensure_knowledge_base(ROOT / "build" / "demo", display)
        whole = ROOT / "build" / "demo" / "corpus"
        manifest = read_manifest(whole)
        write_corpus(
            work / "corpus",
            _some(iter_pairs(whole)),
            name=manifest.name,
            version=manifest.version,
            facets=manifest.facets,
            scene_phrases=manifest.scene_phrases,
        )
        library = ensure_knowledge_base(work, display)
        display.say("preparing what the training reads")
        common = [f"--corpus={work / 'corpus'}", f"--data={prepared}"]
        _run("trainer", "prepare", *common, f"--preset={PRESET}")
        with running_retrieval(library, folder / "logs") as address:
            _run("trainer", "knn", *common, f"--retrieval={address}")
        write_atomic(done, "")
    return work, prepared


def _some(pairs: Iterable[Pair]) -> list[Pair]:
    """All pictures of the first entities that are drawn in several styles; some of them are such as no training sees."""
    drawn: dict[str, list[Pair]] = {}
    for pair in pairs:
        drawn.setdefault(pair.entity, []).append(pair)
    known = [found for found in drawn.values() if len(found) >= NUM_STYLES]
    shown = [found for found in known if not found[0].held_out][:NUM_SHOWN]
    held_out = [found for found in known if found[0].held_out][:NUM_HELD_OUT]
    return [pair for found in (*shown, *held_out) for pair in found]


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ChildFailed(f"{' '.join(arguments[:2])}: {done.stderr.strip().splitlines()[-1:]}")


def _let_things_fail(running: Session, seconds: float, display: Display) -> None:
    """Wait so long; on the way Triton is killed once, retrieval three times. Their supervisor starts them again."""
    start = time.monotonic()
    for share, program, times in ((TRITON_DIES, "triton", 1), (RETRIEVAL_DIES, "retrieval", 3)):
        time.sleep(max(0.0, start + share * seconds - time.monotonic()))
        for _ in range(times):
            display.say(f"killing {program}")
            running.kill(program)
            time.sleep(2.0)
    time.sleep(max(0.0, start + seconds - time.monotonic()))


def _answers(board: Board, prometheus: Prometheus, start: float, end: float) -> dict[str, Sequence[Answered]]:
    found: dict[str, Sequence[Answered]] = {}
    for item, place in places(board):
        if isinstance(item, Panel):
            found[key(board, place)] = [
                Answered(
                    query=query,
                    series=prometheus.between(
                        substituted(query.expr, rate_s=RATE_S, range_s=end - start), start, end, STEP_S
                    ),
                )
                for query in item.queries
            ]
    return found


def _caption(board: Board, seconds: float) -> str:
    load = (
        f"{seconds / 60:.0f} minutes of mixed load on the local stack; Triton was killed after {TRITON_DIES:.0%} of them,"
        f" retrieval after {RETRIEVAL_DIES:.0%}."
    )
    sources = {panel.source for panel in board.panels} - {Source.STACK}
    made_up = f"Figures of {', '.join(sorted(sources))} are made up: no such exporter ran." if sources else ""
    return _CAPTION.format(load=load, made_up=made_up).strip()
