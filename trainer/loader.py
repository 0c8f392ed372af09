"""Batches drawn ahead of the step that takes them, and their shares."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from trainer.batches import Batch

Draw = Callable[[int, int], Batch]
"""(step, examples seen before it) -> its batch."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Draws batches while the steps before them run.

    Attributes:
        ahead: batches that are ready or being drawn, each worker's.
        workers: processes that draw; 0: a thread, which is enough where a step takes longer than a batch.
    """

    ahead: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if self.ahead < 1:
            raise ValueError(f"--loader-ahead: {self.ahead} is not at least 1")
        if self.workers < 0:
            raise ValueError(f"--loader-workers: {self.workers} is negative")

    def batches(self, draw: Draw, step: int, examples: int, batch: int) -> Generator[Batch, None, None]:
        """The batches of `step` and of those after it, of `batch` examples each."""
        position = _Positions(step=step, examples=examples, batch=batch)
        if self.workers:
            return self._by_processes(draw, position)
        return self._by_thread(draw, position)

    def _by_thread(self, draw: Draw, positions: _Positions) -> Generator[Batch, None, None]:
        with ThreadPoolExecutor(1) as pool:
            coming: deque[Future[Batch]] = deque()
            try:
                for step in positions:
                    coming.append(pool.submit(draw, step, positions.examples_before(step)))
                    if len(coming) > self.ahead:
                        yield coming.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _by_processes(self, draw: Draw, positions: _Positions) -> Generator[Batch, None, None]:
        loader = DataLoader(
            _Steps(draw, positions),
            sampler=positions,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.ahead,
            multiprocessing_context="fork",  # the mapped corpus is shared, and nothing is sent
            worker_init_fn=_heed_no_signals,
        )
        yield from loader


@dataclass(frozen=True, kw_only=True)
class _Positions:
    """All steps from one on, without end."""

    step: int
    examples: int
    batch: int

    def __iter__(self) -> Iterator[int]:
        step = self.step
        while True:
            yield step
            step += 1

    def examples_before(self, step: int) -> int:
        return self.examples + (step - self.step) * self.batch


class _Steps(Dataset[Batch]):
    """Batches by step."""

    def __init__(self, draw: Draw, positions: _Positions) -> None:
        self.draw = draw
        self.positions = positions

    def __getitem__(self, step: int) -> Batch:
        return self.draw(step, self.positions.examples_before(step))


def _heed_no_signals(worker: int) -> None:
    """A signal to the group asks the run to save itself, which takes a last step; workers go when it closes them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def share_of(batch: Batch, part: int, parts: int) -> Batch:
    """The `part`-th of `parts` of a batch's neighbor sets, as even as can be, with their examples.

    Raises:
        ValueError: there are fewer sets than parts.
    """
    sets, examples = batch.neighbors.shape[0], batch.group.shape[0]
    if sets < parts:
        raise ValueError(f"a batch of {sets} neighbor sets cannot be cut into {parts} parts (ranks x accumulation)")
    first, last = part * sets // parts, (part + 1) * sets // parts
    draws = examples // sets
    rows = slice(first * draws, last * draws)
    cut = {
        name: tensor[rows] if tensor.shape[0] == examples else tensor[first:last]
        for name, tensor in vars(batch).items()
    }
    return replace(batch, **{**cut, "group": cut["group"] - first})
