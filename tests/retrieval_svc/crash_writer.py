"""A process that changes a knowledge base until it is killed: says each change before it is made, and once it is durable."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np

from common.images import encode_png
from retrieval_svc.library import Library
from retrieval_svc.pairs import NewPair

PAIRS = 30
SIZE = 8


def picture(mark: int) -> bytes:
    """A picture that no other mark has."""
    pixels = np.random.default_rng(mark).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return encode_png(pixels)


def pair(number: int, mark: int) -> NewPair:
    """The pair of this number as change `mark` makes it; every third keeps its picture."""
    shown = number if number % 3 == 0 else mark
    embedding = np.random.default_rng([number, mark]).standard_normal(8).astype(np.float32)
    return NewPair(pair_id=f"p{number}", caption=f"thing{number} made{mark}", image=picture(shown), embedding=embedding)


def say(kind: str, change: dict[str, object]) -> None:
    sys.stdout.write(f"{kind} {json.dumps(change)}\n")
    sys.stdout.flush()


def main(folder: Path, seed: int) -> None:
    """Change pairs for ever; marks begin at seed * 1,000,000."""
    rng = random.Random(seed)
    library = Library.open(folder, embedder=None)
    knowledge_base = library.get("kb") if "kb" in library.names() else library.create("kb", embedding_size=8)
    say("open", {})
    mark = seed * 1_000_000
    while True:
        mark += 1
        numbers = rng.sample(range(PAIRS), rng.randint(1, 5))
        if rng.random() < 0.3:
            say("try", {"delete": numbers})
            knowledge_base.delete([f"p{n}" for n in numbers])
        else:
            say("try", {"upsert": numbers, "mark": mark})
            outcomes, _ = knowledge_base.upsert([pair(n, mark) for n in numbers])
            assert all(o.reason == "" for o in outcomes), outcomes
        say("done", {})
        if rng.random() < 0.05:
            knowledge_base.optimize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
