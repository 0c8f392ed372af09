"""Batches drawn ahead, by a thread or by processes: those of their steps, in order."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import Any

import pytest
import torch

from trainer.batches import Batch, rng_of
from trainer.dataset import Prepared
from trainer.loader import Loader
from trainer.presets import Preset
from trainer.sources import NeighborSource


@pytest.mark.parametrize(("ahead", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_batches_are_those_of_their_steps(ahead: int, workers: int, prepared: Prepared, tiny: Preset) -> None:
    """The position counts on from where the run is, examples too: the side depends on them."""
    source = NeighborSource(prepared=prepared, preset=tiny)

    def draw(step: int, examples: int) -> Batch:
        return source.batch(rng_of(0, step), tiny.side(examples))

    loader = Loader(ahead=ahead, workers=workers)
    with closing(loader.batches(draw, 5, 5 * tiny.batch, tiny.batch)) as coming:
        for step, batch in enumerate(islice(coming, 5), 5):
            expected = draw(step, step * tiny.batch)
            for name, value in vars(batch).items():
                assert torch.equal(value, getattr(expected, name)), (step, name)


def test_so_many_are_drawn_ahead(prepared: Prepared, tiny: Preset) -> None:
    asked: list[int] = []
    batch = NeighborSource(prepared=prepared, preset=tiny).batch(rng_of(0, 0), 16)

    def draw(step: int, examples: int) -> Batch:
        asked.append(step)
        return batch

    with closing(Loader(ahead=3).batches(draw, 0, 0, 8)) as coming:
        next(coming)
    assert asked == [0, 1, 2, 3][: len(asked)] and len(asked) <= 4


def test_what_fails_in_a_drawing_is_raised_where_the_batch_is_taken() -> None:
    def draw(step: int, examples: int) -> Any:
        raise OSError("the corpus is gone")

    with closing(Loader().batches(draw, 0, 0, 8)) as coming, pytest.raises(OSError, match="the corpus is gone"):
        next(coming)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"ahead": 0}, "--loader-ahead: 0"), ({"workers": -1}, "--loader-workers: -1")]
)
def test_sizes_that_cannot_be_are_named(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Loader(**wrong)
