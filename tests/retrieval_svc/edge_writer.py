"""A process that writes into a store and says what it has been promised, until it is killed: `python -m ... FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from retrieval_svc.vectors import EdgePairStore
from tests.retrieval_svc.stores import NOW, pair, vectors


def main() -> None:
    """Print "N M" once pairs N to M - 1 are durable and pair N - 1 is durably deleted."""
    store = EdgePairStore.open(Path(sys.argv[1]))
    number = 0
    while True:
        size = 1 + number % 40
        batch = range(number, number + size)
        store.upsert([pair(i) for i in batch], vectors(size, seed=number))
        store.delete([f"pair/{number - 1}"], NOW + number)
        print(number, number + size, flush=True)
        number += size


if __name__ == "__main__":
    main()
