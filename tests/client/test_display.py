"""What a person sees: a table and bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from client.display import Bars, Display, Lines
from client.generation_types import (
    Accepted,
    Done,
    Event,
    Neighbor,
    NeighborsFound,
    Queued,
    StageFinished,
    StageStarted,
    StepDone,
)

NEIGHBOR = Neighbor(
    pair_id="noto--guide-dog",
    caption="guide dog, noto style, on a white background",
    entity="guide dog",
    image=b"",
    image_format="svg",
    facets={"style": "noto"},
    author="Google [Inc]",
    source="https://example.org",
    license="Apache-2.0",
    score=2.7493,
    rank=1,
)
EVENTS: list[Event] = [
    Accepted(prompt="a guide dog", seed=7, num_pictures=1, stages=(64,)),
    NeighborsFound(
        neighbors=(NEIGHBOR,),
        knowledge_base="demo",
        index_fingerprint="",
        shortfall_reason="asked for 2, found 1",
        method="bm25",
    ),
    StageStarted(stage=64, steps=20),
    *(StepDone(stage=64, picture=0, step=step, steps=20, preview_png=b"") for step in range(1, 21)),
    StageFinished(stage=64, picture=0, image=b""),
    Done(record={}),
]


def shown(display: Display, text: io.StringIO) -> str:
    """Everything that a display writes."""
    with display.live():
        for item in range(40):
            display.built("pictures", 40, str(item))
        display.say("starting")
        for event in EVENTS:
            display.show(event)
    return text.getvalue()


def test_bars_on_a_terminal() -> None:
    text = io.StringIO()
    seen = shown(Bars(Console(file=text, force_terminal=True, width=120)), text)
    for part in (
        "seed 7",
        "guide dog",
        "noto",
        "Google [Inc]",
        "Apache-2.0",
        "2.749",
        "found 1",
        "stage 64",
        "20/20",
        "40/40",
    ):
        assert part in seen


def test_lines_elsewhere() -> None:
    text = io.StringIO()
    lines = [line.partition(" s  ")[2] for line in shown(Lines(text), text).splitlines()]
    assert lines[:10] == [f"pictures: {4 * tenth}/40" for tenth in range(1, 11)]
    assert lines[10:12] == ["starting", "seed 7"]
    assert lines[12] == "neighbor  1  2.749  guide dog  noto  Google [Inc]  Apache-2.0"
    assert lines[13] == "asked for 2, found 1"
    assert lines[14:] == [f"stage 64: {2 * tenth}/20" for tenth in range(1, 11)]


def test_what_is_behind_others_or_without_retrieval_is_said() -> None:
    text = io.StringIO()
    display = Lines(text)
    display.show(Accepted(prompt="p", seed=3, num_pictures=2, stages=(64,), seeds=(3, 4), queue_position=2))
    display.show(Queued(queue_position=1))
    found = NeighborsFound(
        neighbors=(),
        knowledge_base="",
        index_fingerprint="",
        shortfall_reason="",
        method="bm25",
        degraded_reason="retrieval: does not answer",
    )
    display.show(found)
    lines = [line.partition(" s  ")[2] for line in text.getvalue().splitlines()]
    assert lines == [
        "seed 3, 4",
        "2 requests go before this one",
        "1 request goes before this one",
        "retrieval: does not answer",
    ]


def test_steps_of_several_pictures_count_together_and_missed_ones_do_not_matter() -> None:
    text = io.StringIO()
    display = Lines(text)
    display.show(Accepted(prompt="p", seed=3, num_pictures=2, stages=(64,), seeds=(3, 3)))
    display.show(StageStarted(stage=64, steps=10))
    for picture, step in ((0, 1), (1, 5), (0, 8)):
        display.show(StepDone(stage=64, picture=picture, step=step, steps=10, preview_png=b""))
    for picture in (0, 1):
        display.show(StageFinished(stage=64, picture=picture, image=b""))
    lines = [line.partition(" s  ")[2] for line in text.getvalue().splitlines()]
    assert lines[1:] == ["stage 64: 6/20", "stage 64: 13/20", "stage 64: 15/20", "stage 64: 20/20"]
