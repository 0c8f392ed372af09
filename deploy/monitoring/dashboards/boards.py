"""All dashboards, in the order in which one looks at them."""

from __future__ import annotations

from pathlib import Path

from deploy.monitoring.dashboards import generation, gpu, overview, retrieval, training, triton
from deploy.monitoring.dashboards.description import Board

FOLDER = Path(__file__).parent
BOARDS: tuple[Board, ...] = (
    overview.BOARD,
    generation.BOARD,
    retrieval.BOARD,
    triton.BOARD,
    training.BOARD,
    gpu.BOARD,
)


def json_path(board: Board) -> Path:
    """Where a dashboard's JSON is committed."""
    return FOLDER / f"{board.name}.json"


def picture_path(board: Board) -> Path:
    """Where its picture is."""
    return FOLDER / f"{board.name}.png"
